"""Losses against plain loops over the formulas."""

import math

import numpy as np
import pytest
import torch

from vision_lowrank.composer.attention import Maps
from vision_lowrank.composer.layout import Box, Places
from vision_lowrank.composer.losses import CONSTANTS, Constants, centre_weight, evaluate, smooth, smoothing_kernel
from vision_lowrank.errors import ConfigError

SIZE = (6, 8)
BOXES = [Box(0, 0, 0.5, 0.5), Box(1 / 3, 3 / 8, 1, 7 / 8)]
CELLS = [(0, 0, 3, 4), (2, 3, 6, 7)]
TOKENS = [[1, 4], [2]]


def maps(images=2, own=True):
    generator = torch.Generator().manual_seed(0)
    cross = [torch.rand(images, *SIZE, 6, generator=generator, dtype=torch.float64) for _ in BOXES]
    self_map = torch.rand(images, 48, 48, generator=generator, dtype=torch.float64).softmax(-1)
    return Maps([found.softmax(-1) for found in cross], self_map if own else None)


def smoothed(image, sigma):
    """Weighted mean over neighbours, mirrored without repeating the border."""
    padded = np.pad(image, 1, mode="reflect")
    weights = [[math.exp(-(y * y + x * x) / (2 * sigma) ** 2) for x in (-1, 0, 1)] for y in (-1, 0, 1)]
    total = sum(map(sum, weights))
    return np.array(
        [
            [
                sum(weights[y][x] * padded[row + y, column + x] for y in range(3) for x in range(3)) / total
                for column in range(image.shape[1])
            ]
            for row in range(image.shape[0])
        ]
    )


def slow_losses(cross, own, constants):
    """The formulas of one image, one number after the other."""
    height, width = SIZE
    enhancement, fill_x, fill_y, region = [], [], [], []
    for (top, left, bottom, right), tokens, found in zip(CELLS, TOKENS, cross, strict=True):
        mask = np.zeros(SIZE)
        mask[top:bottom, left:right] = 1
        centre = np.zeros(SIZE)
        for row in range(top, bottom):
            for column in range(left, right):
                u = -1 + 2 * (row - top) / (bottom - top - 1)
                v = -1 + 2 * (column - left) / (right - left - 1)
                centre[row, column] = math.exp(-(u * u + v * v) / 2)
        centre /= centre.max()
        count = max(math.floor(constants.top * mask.sum()), constants.least)
        for token in tokens:
            attention = smoothed(found[:, :, token], constants.smoothing)
            strongest = sorted((attention * mask * centre).flatten(), reverse=True)[:count]
            enhancement.append(constants.enhancement * max(0, 1 - sum(strongest) / count))
            columns = sum(abs((attention * mask)[:, x].max() - mask[:, x].max()) for x in range(width))
            rows = sum(abs((attention * mask)[y].max() - mask[y].max()) for y in range(height))
            joint = constants.fill_mean == "joint"
            fill_x.append(constants.fill * columns / (width + height if joint else width))
            fill_y.append(constants.fill * rows / (width + height if joint else height))
        inside = mask.flatten().astype(bool)
        leaving = sorted(own[inside][:, ~inside].flatten(), reverse=True)[:count]
        region.append(constants.region * sum(leaving) / count)
    return enhancement, fill_x, fill_y, region


# the shares of the boxes are 2 and 3 positions
OTHERS = Constants(enhancement=3, fill=5, region=0.5, top=0.2, least=5, smoothing=0.9)


@pytest.mark.parametrize("constants", [*CONSTANTS.values(), OTHERS], ids=[*CONSTANTS, "others"])
def test_losses_are_those_of_the_formulas(constants):
    found = maps()
    losses = evaluate(found, TOKENS, Places(BOXES, SIZE), constants)
    for image in range(2):
        expected = slow_losses([cross[image].numpy() for cross in found.cross], found.own[image].numpy(), constants)
        for name, terms in zip(("enhancement", "fill_x", "fill_y", "region"), expected, strict=True):
            np.testing.assert_allclose(getattr(losses, name)[image].numpy(), terms, rtol=1e-12)
        assert losses.total[image].item() == pytest.approx(sum(map(sum, expected)), rel=1e-12)


def test_presets_weigh_as_paper_and_code_say():
    code, paper = CONSTANTS["code"], CONSTANTS["paper"]
    assert (code.fill / code.enhancement, code.region / code.enhancement) == (0.25, 1.25)
    assert (paper.fill / paper.enhancement, paper.region / paper.enhancement) == (0.25, 0.8)
    # 20 to 14.1 in the code, to half in a straight line in the paper
    assert [code.step_at(step, 50) for step in (0, 1, 49)] == pytest.approx([20, 19.897697538834457, 14.142135623])
    assert [paper.step_at(step, 51) for step in (0, 25, 50)] == pytest.approx([20, 15, 10])
    assert code.step_at(0, 1) == 20


def test_smoothing_kernel_and_centre_weight_of_the_original():
    assert smoothing_kernel(0.5)[1, 1].item() == pytest.approx((1 + 2 / math.e) ** -2)
    impulse = torch.zeros(1, 1, 4, 5, dtype=torch.float64)
    impulse[0, 0, 0, 2] = 1
    np.testing.assert_allclose(smooth(impulse, 0.5)[0, 0].numpy(), smoothed(impulse[0, 0].numpy(), 0.5), rtol=1e-12)
    assert centre_weight(3, 5)[0, 0].item() == pytest.approx(math.exp(-1))
    assert centre_weight(6, 8)[0, 0].item() == pytest.approx(0.379, abs=5e-4)
    assert torch.equal(centre_weight(2, 2), torch.ones(2, 2))
    assert torch.equal(centre_weight(1, 1), torch.ones(1, 1))


def test_two_losses_of_the_original_are_zero_for_boxes_under_five_positions():
    places = Places([Box(0, 0, 1 / 3, 0.25)], SIZE)
    found = maps()
    original = evaluate(found, TOKENS, places, Constants(least=0))
    ours = evaluate(found, TOKENS, places, Constants())
    # the original takes the larger of 0 and a mean of nothing
    assert torch.equal(original.enhancement, torch.zeros(2, 2, dtype=original.enhancement.dtype))
    assert torch.equal(original.region, torch.zeros(2, 1, dtype=original.region.dtype))
    assert torch.equal(original.fill_x, ours.fill_x)
    assert ours.enhancement.shape == (2, 2)
    assert ours.region[0, 0] == pytest.approx(
        10 * found.own[0][[0, 1, 8, 9]][:, [2, *range(3, 8), *range(10, 48)]].max()
    )


def test_a_box_of_the_whole_image_has_no_region_loss_and_one_without_cells_none_at_all():
    whole = evaluate(maps(), TOKENS, Places([Box(0, 0, 1, 1)], SIZE), Constants())
    assert whole.region.shape == (2, 0)
    assert whole.enhancement.shape == (2, 2)
    places = Places([Box(0.4, 0.4, 0.45, 0.45)], SIZE, cells="inner")
    assert evaluate(maps(), TOKENS, places, Constants()).total.tolist() == [0, 0]


def test_losses_that_are_off_have_no_terms():
    losses = evaluate(maps(own=False), TOKENS, Places(BOXES, SIZE), Constants().only(["fill"]))
    assert losses.enhancement.numel() == losses.region.numel() == 0
    assert losses.total.tolist() == pytest.approx((losses.fill_x + losses.fill_y).sum(1).tolist())


@pytest.mark.parametrize(
    "wrong",
    [
        *({"top": 0}, {"fill": -1}, {"step_size": float("nan")}, {"largest_step": 0}),
        *({"decay": "cosine"}, {"moments": "unit"}),
    ],
)
def test_constants_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Constants(**wrong)
