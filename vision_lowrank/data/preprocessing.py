"""Scaling and principal components of spectra, fitted on training pixels only and stored with the model."""

import logging
from collections.abc import Mapping

import numpy as np
from sklearn.decomposition import PCA

from vision_lowrank.data.spectral_shape import check_shapes, spectral_shape
from vision_lowrank.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 18
# bands that repeat each other leave components of rounding noise; whitening must not blow them up
LEAST_VARIANCE_RATIO = 1e-10


class ScenePreprocessor:
    """Standardises each band, then optionally projects onto principal components.

    One affine map for the whole scene: standardising each patch by itself would subtract its mean spectrum, which is
    most of what tells classes apart. Bands without variation among the training pixels come out as 0.

    Args:
        components: principal components to keep, or None for all bands, standardised.
        whiten: scale the components to unit variance on the training pixels.
        brightness: keep it; without, spectra are first replaced by their `spectral_shape`.
    """

    def __init__(self, components: int | None, whiten: bool, brightness: bool = True) -> None:
        if components is not None and components < 1:
            raise ConfigError(f"components is {components}; give at least 1, or null for all bands")
        if whiten and components is None:
            raise ConfigError("whiten needs principal components; set components, or whiten to false")
        self.components = components
        self.whiten = whiten
        self.brightness = brightness
        self.mean = np.empty(0, np.float32)
        self.gain = np.empty(0, np.float32)
        self.projection: np.ndarray | None = None

    def fit(self, spectra: np.ndarray) -> "ScenePreprocessor":
        """Learns the map from training spectra (pixels, channels) and returns itself.

        Raises:
            ConfigError: more components than pixels or varying bands.
            DataError: a value is NaN or infinite, or the values are too small for `spectral_shape`.
        """
        if not np.isfinite(spectra).all():
            raise DataError("training spectra hold NaN or infinite values; take pixels of the scene that are valid")
        if not self.brightness:
            check_shapes(spectra)
            spectra = spectral_shape(spectra, axis=1)
        spectra = spectra.astype(np.float64)
        mean = spectra.mean(axis=0)
        spectra -= mean
        # np.std would hold a second copy of the spectra
        deviation = np.sqrt(np.einsum("pc,pc->c", spectra, spectra) / len(spectra))
        # rounding leaves a constant band with a deviation of about the machine precision times its mean
        varying = deviation > 1e-9 * np.abs(mean)
        if not varying.all():
            constant = np.flatnonzero(~varying).tolist()
            logger.warning("%d bands constant over the training pixels, masked; indices %s", len(constant), constant)
        gain = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=varying)
        self.mean, self.gain = mean.astype(np.float32), gain.astype(np.float32)
        if self.components is not None:
            most = min(len(spectra) - 1, int(varying.sum()))
            if self.components > most:
                raise ConfigError(
                    f"components is {self.components}, but {len(spectra)} training pixels with {int(varying.sum())} "
                    f"varying bands have {most} at most; lower it"
                )
            spectra *= gain
            pca = PCA(self.components, copy=False, svd_solver="covariance_eigh").fit(spectra)
            variance = np.maximum(pca.explained_variance_, LEAST_VARIANCE_RATIO * pca.explained_variance_[0])
            scale = np.sqrt(variance) if self.whiten else np.ones(self.components)
            # safetensors writes the memory of an array as it lies, whatever its order
            self.projection = np.ascontiguousarray(pca.components_ / scale[:, None], dtype=np.float32)
        return self

    @property
    def num_channels(self) -> int:
        """Channels after `transform`."""
        return len(self.mean) if self.projection is None else len(self.projection)

    def transform(self, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Maps an image (channels, height, width) to float32 (components, height, width), some rows at a time.

        Args:
            image: values in the units of the training spectra.
            out: array to write the result into, such as the inside of a padded cube; new if None.

        Raises:
            DataError: the image has another number of channels than the training spectra.
        """
        channels, height, width = image.shape
        if channels != len(self.mean):
            raise DataError(f"image has {channels} channels, the preprocessing was fitted on {len(self.mean)}")
        result = np.empty((self.num_channels, height, width), dtype=np.float32) if out is None else out
        step = max(1, CHUNK_BYTES // (4 * channels * width))
        for start in range(0, height, step):
            rows = slice(start, start + step)
            values = image[:, rows] if self.brightness else spectral_shape(image[:, rows], axis=0)
            scaled = (values - self.mean[:, None, None]) * self.gain[:, None, None]
            result[:, rows] = scaled if self.projection is None else np.tensordot(self.projection, scaled, axes=1)
        return result

    def spread(self, spectra: np.ndarray) -> float:
        """Returns how much spectra (pixels, channels) vary compared with those of training: 1 is as much.

        The median over the bands; far from 1 where values are in another unit than those of training.
        """
        if not self.brightness:
            spectra = spectral_shape(spectra, axis=1)
        return float(np.median((spectra.std(axis=0, dtype=np.float64) * self.gain)[self.gain > 0]))

    def state(self) -> dict[str, np.ndarray]:
        """Returns the fitted arrays, float32: `mean` and `gain` (channels,), `projection` (components, channels).

        Where brightness is left out, also `brightness`, false.
        """
        state = {"mean": self.mean, "gain": self.gain}
        if self.projection is not None:
            state["projection"] = self.projection
        return state if self.brightness else {**state, "brightness": np.array([False])}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> "ScenePreprocessor":
        """Rebuilds a fitted preprocessor from `state`.

        Raises:
            DataError: arrays are missing or do not fit together.
        """
        try:
            mean, gain = state["mean"], state["gain"]
        except KeyError as error:
            raise DataError(f"preprocessing state: {error} is missing; it holds {', '.join(state)}") from error
        projection = state.get("projection")
        if mean.shape != gain.shape or (projection is not None and projection.shape[1:] != mean.shape):
            raise DataError("preprocessing state: mean, gain and projection differ in channels")
        # a stored projection carries the whitening in its rows
        brightness = bool(np.all(state.get("brightness", True)))
        preprocessor = cls(None if projection is None else len(projection), False, brightness)
        preprocessor.mean, preprocessor.gain, preprocessor.projection = mean, gain, projection
        return preprocessor
