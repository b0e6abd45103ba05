"""Random walks on the pixels of a scene: labels spread along what looks alike and stop at edges.

The random walker of Grady (2006, IEEE TPAMI 28(11)) with priors (Grady 2005, CVPR), as Kang et al. (2015, IEEE TGRS
53(1)) used it after a spectral classifier. It sees the whole scene, test pixels included, but labels of training pixels
only: results with it are transductive and say so in their name.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from scipy.ndimage import uniform_filter
from scipy.sparse.linalg import splu

from vision_lowrank.data.scene import IGNORE
from vision_lowrank.errors import ConfigError
from vision_lowrank.records import make_record

# holds the known labels in place: large against the edges, which are at most 1
CLAMP = 100.0
# keeps the graph connected where an edge would vanish
LEAST_EDGE = 1e-6


@dataclass(frozen=True)
class Walk:
    """Settings of a walk.

    Attributes:
        sharpness: beta; larger stops at weaker edges.
        prior: lambda; how strongly the classifier holds against neighbours. 0 spreads the seeds alone.
        smoothing: side of the window that features are averaged over first, against noise; 1 for none.

    Raises:
        ConfigError: a setting is negative.
    """

    sharpness: float
    prior: float
    smoothing: int

    def __post_init__(self) -> None:
        if not (0 <= self.sharpness < math.inf and 0 <= self.prior < math.inf and self.smoothing >= 1):
            raise ConfigError(
                f"random_walk: sharpness={self.sharpness}, prior={self.prior}, smoothing={self.smoothing}; give at "
                "least 0, 0 and 1"
            )


def read_walk(settings: Mapping[str, Any]) -> Walk:
    """Returns the settings that a configuration gives.

    Raises:
        ConfigError: one is unknown, missing or of another kind, or negative.
    """
    return make_record(Walk, settings, "random_walk", ConfigError)


def random_walk(
    probabilities: np.ndarray, image: np.ndarray, seeds: np.ndarray, walk: Walk, valid: np.ndarray
) -> np.ndarray:
    r"""Returns the probabilities that a walk from each pixel first reaches a seed of each class.

    Minimises :math:`\sum_{ij} w_{ij} (x_i - x_j)^2 + c \sum_{seeds} (x_i - s_i)^2 + \lambda \sum_i (x_i - p_i)^2` for
    each class over the 8-neighbourhood, with :math:`w_{ij} = \exp(-\beta |f_i - f_j|^2 / m)`, `m` the median of the
    squared differences between neighbours. Pixels without values take no part: their edges have the least weight.

    Args:
        probabilities: the classifier's, p, (height * width, classes).
        image: features of the pixels, f, (channels, height, width), each channel in the units its weight should have.
        seeds: class indices of the known pixels, 255 elsewhere, (height, width).
        walk: beta, lambda and the averaging of features.
        valid: pixels that have values, bool (height, width).

    Returns:
        float64 (height * width, classes).
    """
    adjacency = _adjacency(_smooth(image, walk.smoothing, valid), walk.sharpness, valid)
    degree = np.asarray(adjacency.sum(axis=1)).ravel()
    known = np.flatnonzero(seeds.ravel() != IGNORE)
    clamp = np.zeros(degree.size)
    clamp[known] = CLAMP
    target = walk.prior * probabilities.astype(np.float64)
    target[known, seeds.ravel()[known]] += CLAMP
    system = sparse.diags(degree + clamp + walk.prior) - adjacency
    # symmetric and positive definite: a symmetric ordering without pivoting fills in far less
    options = {"SymmetricMode": True}
    return splu(system.tocsc(), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options).solve(target)


def _smooth(image: np.ndarray, side: int, valid: np.ndarray) -> np.ndarray:
    """Returns the means of the valid pixels in windows of so many pixels, where the pixel itself is valid."""
    if valid.all():
        return uniform_filter(image, (0, side, side), mode="mirror")
    sums = uniform_filter(np.where(valid, image, 0), (0, side, side), mode="mirror")
    share = uniform_filter(valid.astype(np.float64), side, mode="mirror")
    return np.divide(sums, share, out=np.zeros_like(sums), where=valid)


def _adjacency(image: np.ndarray, sharpness: float, valid: np.ndarray) -> sparse.csr_array:
    """Returns the weights between 8-neighbours, symmetric (pixels, pixels)."""
    height, width = image.shape[1:]
    index = np.arange(height * width).reshape(height, width)
    pairs = (
        (index[:, :-1], index[:, 1:]),
        (index[:-1], index[1:]),
        (index[:-1, :-1], index[1:, 1:]),
        (index[:-1, 1:], index[1:, :-1]),
    )
    first = np.concatenate([pair[0].ravel() for pair in pairs])
    second = np.concatenate([pair[1].ravel() for pair in pairs])
    values = image.reshape(len(image), -1)
    distance = np.square(values[:, first] - values[:, second]).sum(axis=0)
    both = valid.ravel()[first] & valid.ravel()[second]
    median = float(np.median(distance[both])) if both.any() else 0.0
    weight = np.where(both, np.exp(-sharpness * distance / max(median, 1e-12)), 0) + LEAST_EDGE
    upper = sparse.coo_array((weight, (first, second)), shape=(index.size, index.size))
    return (upper + upper.T).tocsr()
