import numpy as np
import pytest
import torch

from vision_lowrank.data.augmentation import (
    SYMMETRIES,
    apply_symmetries,
    apply_symmetry,
    check_shares,
    mixup,
    random_symmetries,
    sample_channels,
    sampled_count,
)
from vision_lowrank.errors import ConfigError


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


def test_a_share_of_the_channels_keeps_their_wavelengths():
    generator = torch.Generator().manual_seed(1)
    given = {
        "image": torch.randn(2, 20, 4, 4, generator=generator),
        "wavelengths": torch.linspace(450, 950, 20).expand(2, -1),
        "label": torch.tensor([3, 1]),
    }
    counts = set()
    for _ in range(30):
        sampled = sample_channels(given, (0.2, 0.4))
        chosen = torch.searchsorted(given["wavelengths"][0].contiguous(), sampled["wavelengths"][0].contiguous())
        assert torch.equal(sampled["image"], given["image"][:, chosen])
        # each once, in their order
        assert (chosen.diff() > 0).all()
        assert torch.equal(sampled["label"], given["label"])
        counts.add(len(chosen))
    assert min(counts) >= 4
    assert max(counts) <= 8
    assert len(counts) > 2
    assert sample_channels(given, None) is given
    # never a single one, where there are two
    assert sample_channels(given, (0.01, 0.02))["image"].shape[1] == 2
    assert [sampled_count(count, 0.1) for count in (1, 2, 20, 35, 36)] == [1, 2, 2, 4, 4]


@pytest.mark.parametrize("shares", [(0.4, 0.2), (0, 0.5), (0.5, 1.2), (0.5,)])
def test_shares_out_of_order_are_refused(shares):
    with pytest.raises(ConfigError, match="two shares, least first"):
        check_shares(shares)


def test_symmetries_chosen_for_each_sample_move_masks_like_images():
    x = torch.arange(9.0).reshape(1, 3, 3).expand(SYMMETRIES, 3, 3)
    found = apply_symmetries(x, torch.arange(SYMMETRIES))
    turned = [np.rot90(x[0].numpy(), turns) for turns in range(4)]
    expected = {tuple(z.flatten()) for y in turned for z in (y, np.fliplr(y))}
    assert {tuple(y.flatten().tolist()) for y in found} == expected
    pair = apply_symmetries(torch.stack([x, x + 9], 1), torch.arange(SYMMETRIES))
    assert torch.equal(pair, torch.stack([found, found + 9], 1))
