"""Patches around pixels, cut out of one padded cube when they are asked for.

Memory grows with the scene, not with pixels times patch size.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from vision_lowrank.errors import ConfigError, DataError


def allocate_cube(channels: int, height: int, width: int, patch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Makes room for an image and the border that patches around its outer pixels need.

    To be filled in place (a copy of the scene is saved) and finished by `reflect_border`.

    Returns:
        The cube, float32 (channels, height + patch_size - 1, width + patch_size - 1), and the view of it that the image
        belongs into, (channels, height, width).

    Raises:
        ConfigError: `patch_size` is even or below 1.
        DataError: a patch is larger than the scene.
    """
    if patch_size < 1 or patch_size % 2 == 0:
        raise ConfigError(f"patch_size is {patch_size}; give an odd number, so that a patch has a centre pixel")
    if patch_size > min(height, width):
        raise DataError(f"patch_size {patch_size} is larger than the scene, {height} x {width} pixels; make it smaller")
    radius = patch_size // 2
    cube = np.empty((channels, height + 2 * radius, width + 2 * radius), dtype=np.float32)
    return cube, cube[:, radius : radius + height, radius : radius + width]


def reflect_border(cube: np.ndarray, patch_size: int) -> Tensor:
    """Fills the border of a cube from `allocate_cube` by mirroring the image at its outer pixels; shares the memory."""
    radius = patch_size // 2
    for axis in (1, 2):
        lines = np.moveaxis(cube, axis, 0)
        last = len(lines) - 1 - radius
        for distance in range(1, radius + 1):
            lines[radius - distance] = lines[radius + distance]
            lines[last + distance] = lines[last - distance]
    return torch.from_numpy(cube)


class PatchDataset(Dataset[dict[str, Tensor]]):
    """Patches of a padded cube with the labels of their centre pixels.

    A sample is {"image": (channels, patch_size, patch_size), "label": ()} and whatever `shared` holds; a batch, which
    the loader gets from `__getitems__` in one gather, has a leading batch axis on each.

    Args:
        cube: float32 (channels, height + patch_size - 1, width + patch_size - 1), see `reflect_border`.
        patch_size: side of the patches.
        indices: flat pixel indices (row * width + column) of the centres.
        labels: class indices (height, width), or None for samples without label.
        shared: tensors that belong to every sample, such as wavelengths in nanometres (channels,) and gsd in metres ().
    """

    def __init__(
        self,
        cube: Tensor,
        patch_size: int,
        indices: np.ndarray,
        labels: np.ndarray | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.cube = cube
        self.patch_size = patch_size
        self.indices = indices
        self.labels = None if labels is None else torch.from_numpy(labels.reshape(-1)[indices])
        self.shared = dict(shared or {})

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """Returns a whole batch, given positions in `indices`."""
        chosen = np.asarray(positions)
        width = self.cube.shape[2] - self.patch_size + 1
        corners = np.stack(np.divmod(self.indices[chosen], width), axis=1)
        batch = {"image": gather_windows(self.cube, corners, self.patch_size)}
        if self.labels is not None:
            batch["label"] = self.labels[chosen]
        return batch | repeat_shared(self.shared, len(chosen))


def gather_windows(cube: Tensor, corners: np.ndarray, size: int) -> Tensor:
    """Copies windows out of a cube.

    Args:
        cube: (channels, height, width).
        corners: row and column of each window's upper left pixel, (windows, 2).
        size: side of a window.

    Returns:
        (windows, channels, size, size).
    """
    # views are made per call: a dataset that holds one would be pickled to workers with its windows spelt out
    windows = sliding_window_view(cube.numpy(), (size, size), axis=(1, 2))
    # numpy gathers this three times faster than torch's index on the same view
    return torch.from_numpy(windows.transpose(1, 2, 0, 3, 4)[corners[:, 0], corners[:, 1]])


def repeat_shared(shared: Mapping[str, Tensor], samples: int) -> dict[str, Tensor]:
    """Returns what belongs to every sample with a leading batch axis."""
    return {name: value.expand(samples, *value.shape) for name, value in shared.items()}


class EpochShuffle(Sampler[int]):
    """An order of samples that depends on seed and epoch alone, so that a resumed training meets the same batches.

    Args:
        length: number of samples.
        seed: of all orders.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch; Lightning calls it. Without it, each pass counts as one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        self.epoch += 1
        return iter(order.tolist())


def collate_batch(batch: Any) -> Any:
    """Passes on what `__getitems__` has batched already; the loader's `collate_fn`."""
    return batch
