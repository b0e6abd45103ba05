"""Spectra without their brightness, which differs from field to field more than the shape of a crop's spectrum does."""

import numpy as np


def spectral_shape(values: np.ndarray, axis: int) -> np.ndarray:
    """Returns the logarithm of each spectrum less its mean over the bands, float32 of the same shape.

    A factor on all bands, as of another slope or sun, falls out. Values below 1 count as 1: give digital numbers or
    scaled reflectances, not reflectances between 0 and 1.

    Args:
        values: spectra.
        axis: that of the bands.
    """
    logarithm = np.log(np.maximum(values, 1, dtype=np.float32))
    shape: np.ndarray = logarithm - logarithm.mean(axis=axis, keepdims=True)
    return shape
