import torch

from vision_lowrank.data.augmentation import SYMMETRIES, apply_symmetry, random_symmetries


def test_the_symmetries_are_the_eight_of_a_square():
    x = torch.arange(9.0).view(1, 3, 3)
    rotations = [torch.rot90(x, turns, (-2, -1)) for turns in range(4)]
    expected = {tuple(y.flatten().tolist()) for r in rotations for y in (r, r.flip(-1))}
    found = {tuple(apply_symmetry(x, index).flatten().tolist()) for index in range(SYMMETRIES)}
    assert found == expected
    assert len(found) == 8


def test_every_sample_takes_one_symmetry_for_all_its_channels():
    torch.manual_seed(0)
    x = torch.rand(400, 2, 3, 3)
    y = random_symmetries(x)
    taken = []
    for before, after in zip(x, y, strict=True):
        matches = [i for i in range(SYMMETRIES) if torch.equal(apply_symmetry(before, i), after)]
        assert len(matches) == 1
        taken += matches
    counts = torch.bincount(torch.tensor(taken), minlength=8)
    # 50 expected of each, standard deviation 6.6
    assert counts.min() > 20
