"""Spectra without their brightness, which differs from field to field more than the shape of a crop's spectrum does."""

import numpy as np

from vision_lowrank.errors import DataError


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


def check_shapes(values: np.ndarray) -> None:
    """Refuses values without shapes worth the name.

    Raises:
        DataError: most are 1 or less.
    """
    if (values > 1).mean() < 0.5:
        raise DataError(
            "brightness=false takes logarithms, but most values of the spectra are 1 or less; give digital numbers or "
            "scaled reflectances, or brightness=true"
        )
