"""How well images show the right concept in each box: success, confusion, vanishing, boxes, with intervals.

Boxes are (top, left, bottom, right) in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

Edges: TypeAlias = tuple[float, float, float, float]
NONE = "none"
QUANTILE = 1.959964  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Outcome:
    """What one image shows of what was asked for.

    Attributes:
        success: each concept is in its own box, and no other there.
        shown: for each region the concept found in its box, the surest where there are several, or "none".
        vanished: for each region whether its concept is nowhere in the image.
        overlaps: for each region the intersection over union of its box and its concept's, 0 where there is none.
        strays: concepts found in no box.
    """

    success: bool
    shown: tuple[str, ...]
    vanished: tuple[bool, ...]
    overlaps: tuple[float, ...]
    strays: int


@dataclass(frozen=True)
class Share:
    """A share, or a difference of two, with its 95 % interval (Wilson's for independent trials, else a bootstrap's)."""

    value: float
    low: float
    high: float


def judge(asked: Sequence[tuple[str, Edges]], found: Sequence[tuple[str, Edges]]) -> Outcome:
    """Compares what was asked for with what a detector found; a find is in a box if its middle is.

    Args:
        asked: name and box of each region.
        found: name and box of each find, the surest first.
    """
    boxes = [box for _, box in asked]
    inside = [[name for name, place in found if _holds(box, place)] for box in boxes]
    shown = tuple(names[0] if names else NONE for names in inside)
    present = {name for name, _ in found}
    overlaps = tuple(
        max((intersection_over_union(box, place) for other, place in found if other == name), default=0.0)
        for name, box in asked
    )
    return Outcome(
        success=all(set(names) == {name} for (name, _), names in zip(asked, inside, strict=True)),
        shown=shown,
        vanished=tuple(name not in present for name, _ in asked),
        overlaps=overlaps,
        strays=sum(not any(_holds(box, place) for box in boxes) for _, place in found),
    )


def intersection_over_union(one: Edges, other: Edges) -> float:
    """Returns the common share of two boxes."""
    height, width = (min(one[axis + 2], other[axis + 2]) - max(one[axis], other[axis]) for axis in (0, 1))
    common = max(height, 0.0) * max(width, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return common / (sum(areas) - common)


def mean_over_scenes(values: np.ndarray, draws: int = 10_000, seed: int = 0) -> Share:
    """Returns the mean with a 95 % interval in which whole scenes are drawn anew, not single images.

    Args:
        values: (scenes, seeds) successes or shares.
        draws: of the bootstrap.
        seed: of the bootstrap.
    """
    means = np.asarray(values, float).mean(1)
    if means.min() == means.max() and means[0] in (0, 1):
        # the bootstrap of equal values has no width; as many scenes of one trial each are the cautious reading
        return wilson(int(means.sum()), len(means))
    return _bootstrap(means, draws, seed)


def difference_over_scenes(one: np.ndarray, other: np.ndarray, draws: int = 10_000, seed: int = 0) -> Share:
    """Returns the mean difference of two methods on the same scenes, with its interval as for `mean_over_scenes`.

    Args:
        one: (scenes, seeds) successes or shares.
        other: likewise.
        draws: of the bootstrap.
        seed: of the bootstrap.
    """
    gaps = (np.asarray(one, float) - np.asarray(other, float)).mean(1)
    if gaps.min() == gaps.max() and gaps[0] in (-1, 0, 1):
        # as cautious as for a share, on both sides of 0
        size = wilson(int(abs(gaps).sum()), len(gaps))
        low, high = (-size.high, size.high) if gaps[0] == 0 else sorted((gaps[0] * size.low, gaps[0] * size.high))
        return Share(float(gaps[0]), float(low), float(high))
    return _bootstrap(gaps, draws, seed)


def _bootstrap(means: np.ndarray, draws: int, seed: int) -> Share:
    chosen = np.random.default_rng(seed).integers(len(means), size=(draws, len(means)))
    low, high = np.quantile(means[chosen].mean(1), (0.025, 0.975))
    return Share(float(means.mean()), float(low), float(high))


def wilson(successes: int, trials: int) -> Share:
    """Returns a share with Wilson's 95 % interval (1927)."""
    share, z = successes / trials, QUANTILE
    middle = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * (share * (1 - share) / trials + z**2 / (4 * trials**2)) ** 0.5
    return Share(share, max(0.0, middle - half), min(1.0, middle + half))


def confusion(asked: Sequence[str], shown: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Counts (names, names + 1) how often a region that asked for one concept showed another; the last is none."""
    order = {name: index for index, name in enumerate([*names, NONE])}
    counts = np.zeros((len(names), len(names) + 1), np.int64)
    np.add.at(counts, ([order[name] for name in asked], [order[name] for name in shown]), 1)
    return counts


def _holds(box: Edges, place: Edges) -> bool:
    row, column = (place[0] + place[2]) / 2, (place[1] + place[3]) / 2
    return box[0] <= row <= box[2] and box[1] <= column <= box[3]
