"""A scene in two parts: one to pretrain on without labels, one whose labelled pixels are trained on and tested."""

from typing import Any

import numpy as np

from vision_lowrank.data.modules import SceneDataModule
from vision_lowrank.data.scene import IGNORE
from vision_lowrank.errors import ConfigError


class ScenePartModule(SceneDataModule):
    """Patches of one scene, the columns on the left for pretraining, those on the right split, as of a new scene.

    Scaling and components are fitted on the left part, so that one pretrained base goes with all splits of the right
    one. Patches of pretraining share no pixel with patches around labelled pixels.

    Args:
        border: share of the columns on the left.
        options: as for `SceneDataModule`.

    Raises:
        ConfigError: a part is left without columns.
    """

    def __init__(self, border: float, **options: Any) -> None:
        super().__init__(**options)
        width = self.card.shape.width
        # a patch around the last column of the one part ends before a patch around the first of the other begins
        self.columns = round(border * width), round(border * width) + self.patch_size - 1
        if not 0 < self.columns[0] < self.columns[1] < width:
            raise ConfigError(
                f"data.border={border}: of {width} columns it leaves {self.columns[0]} to pretrain on and "
                f"{max(0, width - self.columns[1])} to split; give a share between 0 and 1"
            )

    def splittable_labels(self) -> np.ndarray:
        """Returns the labels of the right part, `IGNORE` elsewhere, (height, width)."""
        labels = self.scene.labels.copy()
        labels[:, : self.columns[1]] = IGNORE
        return labels

    def scaling_pixels(self) -> np.ndarray:
        """Returns the flat indices of the left part's pixels that have values."""
        return self.pretraining_pixels()

    def pretraining_pixels(self) -> np.ndarray:
        """Returns the flat indices of the left part's pixels that have values; no test pixel is among them."""
        left = self.scene.valid.copy()
        left[:, self.columns[0] :] = False
        return np.flatnonzero(left)
