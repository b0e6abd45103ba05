"""Windows of one scene with a label for every pixel, for models that classify all pixels of an image at once."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset

from vision_lowrank.data.modules import Loader, SceneDataModule
from vision_lowrank.data.patches import EpochShuffle, gather_windows, repeat_shared
from vision_lowrank.data.scene import IGNORE
from vision_lowrank.errors import ConfigError
from vision_lowrank.processes import SharedBatches

# wavelengths in nanometres that stand for the index of a channel: the first, and from one to the next
INDEX_START, INDEX_STEP = 400.0, 10.0


class WindowDataset(Dataset[dict[str, Tensor]]):
    """Windows of a padded cube with their label masks.

    A sample is {"image": (channels, size, size), "label": (size, size)} and whatever `shared` holds; a batch, which the
    loader gets from `__getitems__`, has a leading batch axis on each.

    Args:
        cube: float32 (channels, height, width).
        labels: class indices (height, width) of the cube, `IGNORE` where a pixel does not count.
        corners: row and column of each window's upper left pixel, (windows, 2).
        size: side of a window.
        channels: indices of the channels of a sample.
        shared: tensors that belong to every sample.
    """

    def __init__(
        self,
        cube: Tensor,
        labels: np.ndarray,
        corners: np.ndarray,
        size: int,
        channels: np.ndarray,
        shared: Mapping[str, Tensor],
    ) -> None:
        self.cube = cube
        self.labels = torch.from_numpy(labels)[None]
        self.corners = corners
        self.size = size
        self.channels = torch.from_numpy(channels)
        self.shared = dict(shared)

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """Returns a whole batch, given positions in `corners`."""
        chosen = self.corners[np.asarray(positions)]
        batch = {
            "image": gather_windows(self.cube, chosen, self.size)[:, self.channels],
            "label": gather_windows(self.labels, chosen, self.size)[:, 0],
        }
        return batch | repeat_shared(self.shared, len(chosen))


class SceneWindowModule(SceneDataModule):
    """Windows of one scene, split, scaled and batched, with wavelengths; predictions of windows that overlap averaged.

    Pixels of one window see each other, so what a pixel's prediction may depend on are the `2 size - 1` pixels around
    it each way: that is the patch size by which guard bands and leakage are reckoned.

    Args:
        card: this and `root` as for `SceneDataModule`.
        root: see there.
        size: side of a window in pixels.
        stride: pixels from one window to the next in prediction; those for training lie at every place.
        split: as for `SceneDataModule`, like what follows up to `num_workers`.
        batch_size: see there.
        evaluation_batch_size: see there.
        seed: see there.
        num_workers: see there.
        bands: least and greatest wavelength in nanometres of the channels to train, validate and predict on; None for
            all.
        other_bands: further ranges to predict on, by name: sensors that training has not seen.
        wavelengths: physical, or index: channels are told apart by their number among those of `bands` or of the other
            range, as in models with an embedding for each channel.
        brightness: as for `SceneDataModule`; false takes a mean over all bands, so that neither `bands` nor
            `other_bands` can be.

    Raises:
        ConfigError: an option is out of range.
    """

    def __init__(
        self,
        card: str,
        root: str,
        size: int,
        stride: int,
        split: Mapping[str, Any],
        batch_size: int,
        evaluation_batch_size: int,
        seed: int,
        num_workers: int = 0,
        bands: Sequence[float] | None = None,
        other_bands: Mapping[str, Sequence[float]] | None = None,
        wavelengths: Literal["physical", "index"] = "physical",
        brightness: bool = True,
    ) -> None:
        if size < 1 or not 1 <= stride <= size:
            raise ConfigError(f"size is {size}, stride {stride}; give pixels, stride from 1 up to size")
        if wavelengths not in ("physical", "index"):
            raise ConfigError(f"wavelengths is {wavelengths!r}; it can be physical or index")
        if not brightness and (bands is not None or other_bands):
            raise ConfigError("brightness=false needs all bands of a spectrum; leave bands and other_bands null")
        super().__init__(
            *(card, root, 2 * size - 1, None, False, split, batch_size, evaluation_batch_size, seed, num_workers),
            brightness,
        )
        self.size = size
        self.stride = stride
        self.ranges = {"": bands, **(other_bands or {})}
        self.wavelengths = wavelengths

    def setup(self, stage: str | None = None) -> None:
        """See `SceneDataModule.setup`.

        Raises:
            ConfigError: no band lies in a range that was asked for.
        """
        super().setup(stage)
        for name in self.ranges:
            self._channels(name)

    def model_arguments(self) -> dict[str, Any]:
        """Returns what a model has to be told of the data."""
        return {"num_classes": self.num_classes}

    def pretrain_dataloader(self) -> Loader:
        """Refuses.

        Raises:
            ConfigError: always; `hyper_mae_indian_pines` pretrains on tiles.
        """
        raise ConfigError("regime=adapt needs a base here: give the `encoder` folder of a run of Hyper-MAE as base=")

    def predict_dataloaders(self) -> dict[str, Loader]:
        """Returns windows all over the scene, for each range of bands by its name; "" is that of training."""
        corners = self._grid(self.stride)
        nothing = np.empty(0, np.int64)
        batches = BatchSampler(range(len(corners)), self.evaluation_batch_size, drop_last=False)
        return {name: self._batched(self._windows(corners, nothing, name), batches) for name in self.ranges}

    def assemble(self, predictions: np.ndarray) -> np.ndarray:
        """Averages the predictions of a loader of `predict_dataloaders`.

        Args:
            predictions: float32 (windows, classes, size, size).

        Returns:
            float32 (height * width, classes).
        """
        border = self.size - 1
        total = np.zeros((predictions.shape[1], *self.cube.shape[1:]), np.float32)
        count = np.zeros(self.cube.shape[1:], np.float32)
        for (row, column), window in zip(self._grid(self.stride), predictions, strict=True):
            place = (slice(row, row + self.size), slice(column, column + self.size))
            total[:, *place] += window
            count[place] += 1
        inside = (slice(border, -border or None),) * 2
        mean: np.ndarray = (total[:, *inside] / count[inside]).reshape(len(total), -1).T
        return mean

    def _shuffled(self, indices: np.ndarray) -> Loader:
        dataset = self._windows(self._seeing(indices, 1), indices, "")
        return self._batched(dataset, SharedBatches(EpochShuffle(len(dataset), self.seed), self.batch_size))

    def _dataset(self, indices: np.ndarray) -> WindowDataset:  # type: ignore[override]
        # side by side, so that validation and test count every pixel once
        return self._windows(self._seeing(indices, self.size), indices, "")

    def _windows(self, corners: np.ndarray, indices: np.ndarray, name: str) -> WindowDataset:
        """Returns windows with the labels of the pixels `indices`."""
        channels = self._channels(name)
        shared = {"gsd": torch.tensor(self.scene.gsd), "wavelengths": self._wavelengths(channels)}
        return WindowDataset(self.cube, self._mask(indices), corners, self.size, channels, shared)

    def _wavelengths(self, channels: np.ndarray) -> Tensor:
        """Returns what tells channels apart, nanometres (channels,)."""
        if self.wavelengths == "index":
            return INDEX_START + INDEX_STEP * torch.arange(len(channels), dtype=torch.float32)
        return torch.from_numpy(self.scene.bands.wavelengths[channels])

    def _channels(self, name: str) -> np.ndarray:
        """Returns the indices of the channels of a range of bands."""
        nanometres = self.scene.bands.wavelengths
        limits = self.ranges[name]
        if limits is None:
            return np.arange(len(nanometres))
        found = np.flatnonzero((nanometres >= limits[0]) & (nanometres <= limits[1]))
        if not found.size:
            raise ConfigError(
                f"bands {list(limits)}: {self.scene.name} has {nanometres.min():.0f} to {nanometres.max():.0f} nm; "
                "give a range with at least one band"
            )
        return found

    def _mask(self, indices: np.ndarray) -> np.ndarray:
        """Returns the labels of these pixels, `IGNORE` elsewhere, with the border of the cube."""
        mask = np.full(self.scene.labels.size, IGNORE, np.int64)
        mask[indices] = self.scene.labels.flat[indices]
        return np.pad(mask.reshape(self.split.shape), self.size - 1, constant_values=IGNORE)

    def _seeing(self, indices: np.ndarray, stride: int) -> np.ndarray:
        """Returns the corners of the windows of a grid that hold at least one of these pixels."""
        counted = self._mask(indices) != IGNORE
        corners = self._grid(stride)
        held = sliding_window_view(counted, (self.size, self.size))[corners[:, 0], corners[:, 1]]
        return corners[held.any(axis=(1, 2))]

    def _grid(self, stride: int) -> np.ndarray:
        """Returns the corners, in the padded cube, of windows that cover the scene, (windows, 2)."""
        border = self.size - 1
        # every pixel lies in equally many windows, save at the far border
        lines = [np.arange(border % stride, border + length, stride) for length in self.split.shape]
        return np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1).reshape(-1, 2)
