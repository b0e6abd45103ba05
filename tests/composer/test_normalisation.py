"""Group normalisation by what each position sees; the sampler's tests compare it with a slow one inside a UNet."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vision_lowrank.composer.layout import Box, Places
from vision_lowrank.composer.normalisation import RegionalNorm, normalise


def norm_of(groups, channels, dtype):
    torch.manual_seed(0)
    norm = nn.GroupNorm(groups, channels, dtype=dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def test_each_view_is_normalised_as_a_map_of_its_own():
    norm = norm_of(2, 6, torch.float64)
    x = torch.randn(3, 6, 4, 6, dtype=torch.float64)
    view = torch.arange(24) % 2
    seen = torch.stack([torch.arange(24) < 15, torch.arange(24) >= 4])
    found = normalise(norm, x, view, seen).flatten(2)
    for index in range(2):
        inside = (view == index) & seen[index]
        alone = F.group_norm(x.flatten(2)[..., seen[index]], 2, norm.weight, norm.bias)
        torch.testing.assert_close(found[..., inside], alone[..., inside[seen[index]]], rtol=1e-12, atol=1e-12)


def test_a_box_of_one_value_far_from_the_others_stays_finite():
    # its variance is a difference of equal squares, below zero by rounding
    values = 1000 * torch.rand(64, generator=torch.Generator().manual_seed(0))
    x = torch.zeros(64, 2, 4, 4)
    x[..., :2] = values[:, None, None, None]
    view, seen = (torch.arange(16) % 4 < 2).long(), torch.arange(16) % 4 < 2
    found = normalise(nn.GroupNorm(1, 2), x, view, torch.stack([~seen, seen]))
    assert found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_far_from_zero_keep_their_digits(dtype):
    norm = norm_of(4, 8, dtype)
    x = (1000 + torch.randn(2, 8, 6, 6)).to(dtype)
    places = Places([Box(0, 0, 0.5, 0.5), Box(0.5, 0.5, 1, 1)], (6, 6))
    view, seen = places.views
    exact = normalise(norm.double(), x.double(), view, seen)
    found = normalise(norm.to(dtype), x, view, seen)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=0.02, atol=0.02 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("boxes", [[], [Box(0, 0, 1, 1)], [Box(0, 0, 0.5, 0.5)]])
def test_where_all_see_all_the_layer_s_own_output_stays(boxes):
    norm = norm_of(2, 4, torch.float32)
    x = torch.randn(1, 4, 6, 6)
    handle = norm.register_forward_hook(RegionalNorm(lambda size: Places(boxes, size)))
    found = norm(x)
    handle.remove()
    assert torch.equal(found, norm(x))
