"""Outcomes of scenes that can be judged by eye, and intervals against scipy."""

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp

from vision_lowrank.evaluation.composition import (
    confusion,
    difference_over_scenes,
    intersection_over_union,
    judge,
    mean_over_scenes,
    share_over_scenes,
    wilson,
)

LEFT, RIGHT = (0.0, 0.0, 64.0, 32.0), (0.0, 32.0, 64.0, 64.0)
ASKED = [("fox", LEFT), ("bus", RIGHT)]


def at(row, column, size=20.0):
    return (row - size / 2, column - size / 2, row + size / 2, column + size / 2)


@pytest.mark.parametrize(
    ("found", "success", "shown", "vanished", "strays"),
    [
        ([("fox", at(30, 15)), ("bus", at(30, 50))], True, ("fox", "bus"), (False, False), 0),
        # twice in its own box does no harm
        ([("fox", at(12, 15)), ("fox", at(50, 15)), ("bus", at(30, 50))], True, ("fox", "bus"), (False, False), 0),
        ([("fox", at(30, 50)), ("bus", at(30, 15))], False, ("bus", "fox"), (False, False), 0),
        # a second concept in a box spoils it, though the surest is right
        ([("fox", at(12, 15)), ("bus", at(30, 50)), ("bus", at(50, 15))], False, ("fox", "bus"), (False, False), 0),
        # a middle on an edge is in the box
        ([("fox", at(64, 32)), ("bus", at(0, 64))], False, ("fox", "fox"), (False, False), 0),
        ([("fox", at(30, 15))], False, ("fox", "none"), (False, True), 0),
        ([], False, ("none", "none"), (True, True), 0),
    ],
)
def test_outcomes(found, success, shown, vanished, strays):
    outcome = judge(ASKED, found)
    assert (outcome.success, outcome.shown, outcome.vanished, outcome.strays) == (success, shown, vanished, strays)


def test_finds_in_no_box_are_strays():
    small = [("fox", (0.0, 0.0, 20.0, 20.0))]
    outcome = judge(small, [("fox", (2.0, 2.0, 20.0, 20.0)), ("fox", (40.0, 40.0, 60.0, 60.0))])
    assert outcome.success
    assert outcome.strays == 1
    assert outcome.overlaps == (18 * 18 / 400,)


def test_overlap_counts_pixels():
    one, other = (2, 3, 12, 9), (5, 0, 10, 7)
    masks = np.zeros((2, 20, 20), bool)
    for mask, (top, left, bottom, right) in zip(masks, (one, other), strict=True):
        mask[top:bottom, left:right] = True
    assert intersection_over_union(one, other) == pytest.approx((masks[0] & masks[1]).sum() / masks.any(0).sum())
    assert intersection_over_union(LEFT, RIGHT) == 0


@pytest.mark.parametrize(("successes", "trials"), [(0, 20), (20, 20), (13, 40), (1, 7)])
def test_wilson_is_scipys(successes, trials):
    interval = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    found = wilson(successes / trials, trials)
    np.testing.assert_allclose((found.low, found.high), (interval.low, interval.high), atol=1e-9)
    assert found.value == successes / trials


def test_intervals_are_those_of_scenes_not_of_images():
    generator = np.random.default_rng(1)
    scenes = generator.random((50, 1)) < 0.6
    alike = share_over_scenes(np.repeat(scenes, 4, 1))
    apart = share_over_scenes(generator.random((50, 4)) < 0.6)
    assert alike.value == scenes.mean()
    # for scenes whose images all agree, it is the interval of 50 trials, not of 200
    spread = 2 * 1.96 * (scenes.mean() * (1 - scenes.mean()) / 50) ** 0.5
    assert alike.high - alike.low == pytest.approx(spread, rel=0.1)
    assert apart.high - apart.low < 0.7 * spread
    assert share_over_scenes(np.ones((30, 4), bool)).low == pytest.approx(wilson(1, 30).low)


@pytest.mark.parametrize(("share", "agreement"), [(0.02, 0.3), (0.1, 0.05), (0.1, 0.6), (0.5, 0.3), (0.95, 0.6)])
def test_intervals_of_shares_hold_the_true_one(share, agreement):
    generator = np.random.default_rng(3)
    concentration = (1 - agreement) / agreement
    chances = generator.beta(share * concentration, (1 - share) * concentration, (2000, 18, 1))
    found = [share_over_scenes(one) for one in generator.random((2000, 18, 4)) < chances]
    # a bootstrap over scenes has 0.87 to 0.91 at shares of 0.1 and 0.95, even with this interval where all are equal
    assert np.mean([one.low <= share <= one.high for one in found]) > 0.94


def test_one_success_is_no_surer_than_none():
    nothing, single = np.zeros((18, 4)), np.zeros((18, 4))
    single[5, 2] = 1
    none, one = share_over_scenes(nothing), share_over_scenes(single)
    assert none.high == pytest.approx(wilson(0, 18).high)
    assert one.low > 0
    assert one.high > none.high


def test_means_and_differences_have_students_interval():
    values = np.random.default_rng(4).random((12, 3)) * 0.5
    expected = ttest_1samp(values.mean(1), 0).confidence_interval()
    for found in (mean_over_scenes(values), difference_over_scenes(values, np.zeros((12, 3)))):
        assert (found.value, found.low, found.high) == pytest.approx((values.mean(), expected.low, expected.high))
    # no end lies beyond the scale, and one scene leaves all of it open
    assert mean_over_scenes(np.array([[0.0], [0.0], [0.1]])).low == 0
    for one, lowest in ((mean_over_scenes(values[:1]), 0), (difference_over_scenes(values[:1], values[1:2]), -1)):
        assert (one.low, one.high) == (lowest, 1)


def test_confusion_counts_what_boxes_showed():
    counts = confusion(["fox", "fox", "bus", "bus"], ["fox", "bus", "bus", "none"], ["fox", "bus"])
    assert counts.tolist() == [[1, 1, 0], [0, 1, 1]]


def test_differences_are_paired_by_scene():
    hard = np.random.default_rng(2).random((40, 1))
    one, other = (hard + shift > 0.5 for shift in (0.2, 0.0))
    found = difference_over_scenes(one, other)
    assert found.value == pytest.approx(one.mean() - other.mean())
    # each alone is as uncertain as the scenes are hard, which cancels
    assert found.high - found.low < share_over_scenes(one).high - share_over_scenes(one).low


def test_differences_that_never_vary_are_not_taken_for_certain():
    none, every = np.zeros((30, 4), bool), np.ones((30, 4), bool)
    edge = wilson(1, 30).low
    for one, other, expected in (
        (every, none, (1, edge, 1)),
        (none, every, (-1, -1, -edge)),
        (every, every, (0, edge - 1, 1 - edge)),
    ):
        found = difference_over_scenes(one, other)
        assert (found.value, found.low, found.high) == pytest.approx(expected)
