"""The spectral SVM on the shapes of spectra: what leaving out brightness does by itself."""

import numpy as np

from vision_lowrank.baselines import SpectralSVM
from vision_lowrank.data.modules import SceneDataModule
from vision_lowrank.data.spectral_shape import spectral_shape


class ShapeSVM(SpectralSVM):
    """`SpectralSVM` after `spectral_shape`."""

    def features(self, data: SceneDataModule, pixels: np.ndarray) -> np.ndarray:
        """Returns the shapes of the spectra, (pixels, bands)."""
        return spectral_shape(super().features(data, pixels), axis=1)
