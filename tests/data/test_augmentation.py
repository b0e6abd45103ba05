import torch

from vision_lowrank.data.augmentation import SYMMETRIES, apply_symmetry, mixup, random_symmetries


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


def test_mixup_adds_a_share_of_a_partner():
    torch.manual_seed(0)
    x = torch.rand(32, 3, 2, 2)
    mixed, partner, share = mixup(x, 0.5)
    assert 0.5 <= share < 1
    assert sorted(partner.tolist()) == list(range(32))
    torch.testing.assert_close(mixed, share * x + (1 - share) * x[partner])
    assert (mixed - x).abs().max() > 0.01
    shares = [mixup(x, 0.5)[2] for _ in range(2000)]
    # the larger of two shares of Beta(1/2, 1/2) has the mean 1/2 + 1/pi
    assert abs(sum(shares) / 2000 - (0.5 + 1 / torch.pi)) < 0.01
    same, partner, share = mixup(x, 0.0)
    assert torch.equal(same, x)
    assert partner.tolist() == list(range(32))
    assert share == 1
