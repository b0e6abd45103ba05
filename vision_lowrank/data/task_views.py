"""Views of a task: fewer channels, the middle of each tile, tiles enlarged."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from vision_lowrank.data.image_tasks import TaskData
from vision_lowrank.errors import ConfigError, DataError

Sample = dict[str, Tensor]


class View(Dataset[Sample]):
    """Samples of another set as a function makes them, of which `what` tells; `groups` are those of the set."""

    def __init__(self, samples: Any, change: Callable[[Sample], Sample], what: str) -> None:
        self.samples = samples
        self.change = change
        self.groups = samples.groups
        self.fingerprint = f"{samples.fingerprint}, {what}"

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.change(self.samples[index])


class _Channels:
    def __init__(self, indices: np.ndarray) -> None:
        self.indices = torch.from_numpy(indices)

    def __call__(self, sample: Sample) -> Sample:
        return {
            **sample,
            "image": sample["image"][self.indices],
            "wavelengths": sample["wavelengths"][self.indices],
        }


class _Middle:
    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, sample: Sample) -> Sample:
        height, width = sample["image"].shape[-2:]
        if min(height, width) < self.side:
            raise DataError(f"a tile of {height} x {width} pixels has no middle of {self.side}; crop to fewer")
        top, left = (height - self.side) // 2, (width - self.side) // 2
        window = (..., slice(top, top + self.side), slice(left, left + self.side))
        return {**sample, **{name: sample[name][window] for name in ("image", "mask") if name in sample}}


class _Enlarged:
    def __init__(self, scale: int) -> None:
        self.scale = scale

    def __call__(self, sample: Sample) -> Sample:
        image = F.interpolate(sample["image"][None], scale_factor=self.scale, mode="bicubic")[0]
        return {**sample, "image": image, "gsd": sample["gsd"] / self.scale}


def select_bands(data: TaskData, limits: Sequence[float]) -> TaskData:
    """Returns a task whose images have the channels from one wavelength to another only.

    Args:
        data: the task.
        limits: nanometres, from and to, both included.

    Raises:
        ConfigError: no channel lies there.
    """
    least, greatest = limits
    indices = np.flatnonzero((data.wavelengths >= least) & (data.wavelengths <= greatest))
    if not len(indices):
        raise ConfigError(
            f"{data.name}: no channel from {least:g} to {greatest:g} nm; its channels lie from "
            f"{data.wavelengths.min():g} to {data.wavelengths.max():g}"
        )
    return replace(
        _changed(data, _Channels(indices), f"channels {indices.tolist()}"), wavelengths=data.wavelengths[indices]
    )


def crop_middle(data: TaskData, side: int) -> TaskData:
    """Returns a task with the middle of each tile, `side` pixels along a side; reading a smaller one is a DataError."""
    return _changed(data, _Middle(side), f"middle {side}")


def enlarge(data: TaskData, scale: int) -> TaskData:
    """Returns a task whose tiles are resized bicubically, each pixel to `scale` x `scale` smaller ones.

    Raises:
        ConfigError: each pixel of the task has a label of its own.
    """
    if data.kind == "segmentation":
        raise ConfigError(f"{data.name}: scale={scale} would invent labels of pixels; segmentation has scale 1")
    return replace(_changed(data, _Enlarged(scale), f"enlarged {scale}"), gsd=data.gsd / scale)


def _changed(data: TaskData, change: Callable[[Sample], Sample], what: str) -> TaskData:
    train, validation, test = (View(samples, change, what) for samples in (data.train, data.validation, data.test))
    return replace(data, fingerprint=f"{data.fingerprint}, {what}", train=train, validation=validation, test=test)
