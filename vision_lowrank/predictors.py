"""Trained models as functions of a window of a scene, whose results do not depend on how the scene is cut."""

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vision_lowrank.data.patches import gather_windows
from vision_lowrank.data.windows import INDEX_START, INDEX_STEP
from vision_lowrank.errors import ConfigError
from vision_lowrank.inference import autocast
from vision_lowrank.models import LolaSpecViT
from vision_lowrank.models.heads import LessSegmentation
from vision_lowrank.pixel_predictor import Advance, PixelPredictor
from vision_lowrank.trained_run import TrainedRun


class Predictor(Protocol):
    """What turns scaled values into probabilities or embeddings.

    Attributes:
        margin: pixels around a window that it sees.
        scale: pixels along a side of a cell, which has one result.
        outputs: numbers in a result.
    """

    margin: int
    scale: int
    outputs: int

    def __call__(self, image: Tensor, top: int, left: int, advance: Advance) -> np.ndarray:
        """Returns float32 (outputs, ceil(height / scale), ceil(width / scale)).

        Args:
            image: float32 (components, height + 2 margin, width + 2 margin).
            top: row of the window in the scene, a multiple of `scale`.
            left: its column, likewise.
            advance: told the number of pixels that are done, now and then.
        """


def make_predictor(run: TrainedRun, what: str, gsd: float, precision: str, device: str) -> Predictor:
    """Returns the predictor of a run.

    Args:
        run: its model is moved to the device, and for embeddings loses its head.
        what: classes (results are probabilities) or embeddings.
        gsd: pixel size in metres.
        precision: Lightning's precision string; "…-mixed" means autocast.
        device: where to compute.

    Raises:
        ConfigError: windows of the run do not hold whole patches.
    """
    embeddings = what == "embeddings"
    if isinstance(run.model, LolaSpecViT):
        return PixelPredictor(run.model, embeddings, precision, device)
    return WindowPredictor(run, run.model, embeddings, gsd, precision, device)


class WindowPredictor:
    """LESS ViT segmentation: the mean over the windows of training's grid that hold a pixel, or a patch.

    Probabilities come from windows that overlap as in the run; embeddings from windows side by side, whose patches lie
    on one grid.

    Args:
        run: this and the other arguments as for `make_predictor`.
        model: of the run.
        embeddings: what the head reads rather than probabilities.
        gsd: see there.
        precision: see there.
        device: see there.

    Raises:
        ConfigError: see there.
    """

    def __init__(
        self, run: TrainedRun, model: LessSegmentation, embeddings: bool, gsd: float, precision: str, device: str
    ) -> None:
        self.size, patch = int(run.data["size"]), model.encoder.patch_size
        if embeddings and self.size % patch:
            raise ConfigError(
                f"what=embeddings: windows of {self.size} pixels do not hold whole patches of {patch}; train with "
                "data.size a multiple of model.encoder.patch_size"
            )
        self.margin = self.size - 1
        self.scale = patch if embeddings else 1
        self.stride = self.size if embeddings else int(run.data["stride"])
        self.outputs = model.encoder.num_features if embeddings else model.num_classes
        self.embeddings = embeddings
        self.precision = precision
        self.device = device
        self.batch = int(run.data["evaluation_batch_size"])
        if embeddings:
            model.head = _LastMap()  # type: ignore[assignment]
        self.model = model.eval().to(device)
        nanometres, limits = run.bands.wavelengths, run.data["bands"]
        low, high = (-math.inf, math.inf) if limits is None else limits
        self.channels = torch.from_numpy(np.flatnonzero((nanometres >= low) & (nanometres <= high)))
        if run.data["wavelengths"] == "index":
            told = INDEX_START + INDEX_STEP * torch.arange(len(self.channels), dtype=torch.float32)
        else:
            told = torch.from_numpy(nanometres)[self.channels]
        known = {"wavelengths": told, "gsd": torch.tensor(gsd)}
        self.shared = [known[name].to(device) for name in run.inputs if name != "image"]

    @torch.inference_mode()
    def __call__(self, image: Tensor, top: int, left: int, advance: Advance) -> np.ndarray:
        """See `Predictor`."""
        image = image[self.channels]
        height, width = (side - 2 * self.margin for side in image.shape[1:])
        corners = np.stack(
            np.meshgrid(self._corners(top, height), self._corners(left, width), indexing="ij"), axis=-1
        ).reshape(-1, 2)
        beyond, cells = -(-self.margin // self.scale), self.size // self.scale
        rows, columns = -(-height // self.scale), -(-width // self.scale)
        total = np.zeros((self.outputs, rows + 2 * beyond, columns + 2 * beyond), np.float32)
        count = np.zeros(total.shape[1:], np.float32)
        done = 0
        for start in range(0, len(corners), self.batch):
            chosen = corners[start : start + self.batch]
            for (row, column), values in zip(chosen // self.scale + beyond, self._apply(image, chosen), strict=True):
                place = (slice(row, row + cells), slice(column, column + cells))
                total[:, *place] += values
                count[place] += 1
            reached = height * width * min(start + self.batch, len(corners)) // len(corners)
            advance(reached - done)
            done = reached
        inside = (slice(beyond, beyond + rows), slice(beyond, beyond + columns))
        mean: np.ndarray = total[:, *inside] / count[inside]
        return mean

    def _corners(self, first: int, length: int) -> np.ndarray:
        """Returns the first lines of the windows that reach into lines of the scene, relative to the first of these."""
        start = -(-(first - self.margin) // self.stride) * self.stride
        return np.arange(start, first + length, self.stride) - first

    def _apply(self, image: Tensor, corners: np.ndarray) -> np.ndarray:
        """Returns (windows, outputs, cells, cells) of windows at corners relative to the inside of the image."""
        windows = gather_windows(image, corners + self.margin, self.size).to(self.device)
        shared = [value.expand(len(corners), *value.shape) for value in self.shared]
        with autocast(self.device, self.precision):
            values: Tensor = self.model(windows, *shared).float()
        return (values if self.embeddings else values.softmax(dim=1)).cpu().numpy()


class _LastMap(nn.Module):
    """In place of a head, returns the last map that it would read."""

    def forward(self, maps: Tensor | list[Tensor]) -> Tensor:
        """Maps a map (B, D, h, w), or several of them to the last."""
        return maps if isinstance(maps, Tensor) else maps[-1]
