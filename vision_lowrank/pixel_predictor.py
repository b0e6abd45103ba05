"""LoLA-SpecViT at every pixel of a scene, through its dense form."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from vision_lowrank.inference import autocast
from vision_lowrank.models import LolaSpecViT
from vision_lowrank.models.dense_lola import DenseLola

# side in pixels of what the dense front-end is applied to at once
TILE = 32

Advance = Callable[[int], None]


class PixelPredictor:
    """A result for each pixel, from the patch around it; see `predictors.Predictor`.

    Args:
        model: moved to the device; for embeddings it loses its head.
        embeddings: features rather than probabilities.
        precision: Lightning's precision string; "…-mixed" means autocast.
        device: where to compute.
    """

    scale = 1

    def __init__(self, model: LolaSpecViT, embeddings: bool, precision: str, device: str) -> None:
        if embeddings:
            model.reset_classifier(0)
        self.margin = model.img_size // 2
        self.outputs = model.num_features if embeddings else model.num_classes
        self.embeddings = embeddings
        self.precision = precision
        self.device = device
        self.dense = DenseLola(model).eval().to(device)

    def __call__(self, image: Tensor, top: int, left: int, advance: Advance) -> np.ndarray:
        """Returns float32 (outputs, height, width).

        Args:
            image: float32 (components, height + 2 margin, width + 2 margin).
            top: of no consequence here, like `left`.
            left: see there.
            advance: told the number of pixels that are done, now and then.
        """
        height, width = (side - 2 * self.margin for side in image.shape[1:])
        found = torch.empty(self.outputs, height, width)
        reach = TILE + 2 * self.margin
        corners = [(row, column) for row in range(0, height, TILE) for column in range(0, width, TILE)]

        def apply(corner: tuple[int, int]) -> Tensor:
            row, column = corner
            return self._apply(image[:, row : row + reach, column : column + reach])

        with _each_alone(self.device) as pool:
            for (row, column), values in zip(corners, pool.map(apply, corners), strict=True):
                found[:, row : row + TILE, column : column + TILE] = values
                advance(values.shape[1] * values.shape[2])
        return found.numpy()

    @torch.inference_mode()
    def _apply(self, tile: Tensor) -> Tensor:
        """Returns float32 (outputs, height, width) of a tile with its margin."""
        with autocast(self.device, self.precision):
            values = self.dense(tile.to(self.device)).float()
        return (values if self.embeddings else values.softmax(-1)).permute(2, 0, 1).cpu()


@contextmanager
def _each_alone(device: str) -> Iterator[ThreadPoolExecutor]:
    """Gives threads that compute side by side, each alone; one where the device is no processor.

    A model of many small operations gains more by this than by sharing out each of them.
    """
    threads = torch.get_num_threads()
    workers = threads if torch.device(device).type == "cpu" else 1
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        # the number holds for threads to come, too
        torch.set_num_threads(threads)
