"""How well images show the right concept in each box: success, confusion, vanishing, boxes, with intervals.

Boxes are (top, left, bottom, right) in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from vision_lowrank.evaluation.tables import t_interval

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
    """A mean over scenes, or a mean difference, with its 95 % interval."""

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


def share_over_scenes(values: np.ndarray) -> Share:
    """Returns the share of successes with an interval in which a scene's images may depend on each other.

    It is Wilson's, for as many independent trials as would vary like the scenes' means. The variance of these is
    estimated with two scenes of nothing but successes and two without any put beside them, as Agresti and Coull (1998)
    do with trials: next to 0 and 1 the scenes themselves hardly vary, however few they are.

    Args:
        values: (scenes, seeds) successes, or shares of successes.
    """
    means = np.asarray(values, float).mean(1)
    padded = np.append(means, (0, 0, 1, 1))
    design_effect = padded.var() / (padded.mean() * (1 - padded.mean()))
    return wilson(float(means.mean()), len(means) / design_effect)


def mean_over_scenes(values: np.ndarray) -> Share:
    """Returns a mean of measures between 0 and 1 with Student's interval over scenes, which a single one leaves open.

    Args:
        values: (scenes, seeds) measures.
    """
    return _student(np.asarray(values, float).mean(1), 0)


def difference_over_scenes(one: np.ndarray, other: np.ndarray) -> Share:
    """Returns the mean difference of two methods on the same scenes with Student's interval over scenes.

    Args:
        one: (scenes, seeds) successes, or measures between 0 and 1.
        other: likewise.
    """
    return _student((np.asarray(one, float) - np.asarray(other, float)).mean(1), -1)


def _student(means: np.ndarray, lowest: float) -> Share:
    mean = float(means.mean())
    low, high = t_interval(means.tolist()) or (lowest, 1)
    if len(means) > 1 and np.ptp(means) < 1e-9:
        # scenes that do not differ say nothing of their spread: as cautious as for a share of none or all
        half = wilson(0, len(means)).high
        low, high = mean - half, mean + half
    return Share(mean, max(low, lowest), min(high, 1))


def wilson(share: float, trials: float) -> Share:
    """Returns a share with Wilson's 95 % interval (1927)."""
    z = QUANTILE
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
