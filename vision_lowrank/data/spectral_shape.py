"""Spectra without their brightness, which differs from field to field more than the shape of a crop's spectrum does."""

import numpy as np

from vision_lowrank.data.preprocessing import ScenePreprocessor


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


class ShapePreprocessor(ScenePreprocessor):
    """Scales and projects as `ScenePreprocessor` does, after `spectral_shape`."""

    def fit(self, spectra: np.ndarray) -> "ShapePreprocessor":
        """See `ScenePreprocessor.fit`."""
        super().fit(spectral_shape(spectra, axis=1))
        return self

    def transform(self, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """See `ScenePreprocessor.transform`."""
        return super().transform(spectral_shape(image, axis=0), out)
