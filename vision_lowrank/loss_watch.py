"""A training whose loss is no number ends at that step, and names the pixels or tiles that the batch came from."""

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from vision_lowrank.batch_order import samples_of_batch
from vision_lowrank.data.patches import PatchDataset
from vision_lowrank.data.tile_module import TileDataset
from vision_lowrank.data.windows import WindowDataset
from vision_lowrank.errors import DataError, TrainingError

# samples that a message names
_NAMED = 8


class LossWatch(Callback):
    """Ends training before a loss that is not finite reaches the weights; the last checkpoint is sound."""

    def __init__(self) -> None:
        self._batch: Mapping[str, Any] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the batch, to look into if need be."""
        self._batch = batch

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Looks at the loss.

        Raises:
            DataError: it is not finite, and neither is what the batch holds.
            TrainingError: it is not finite, and the batch is sound.
        """
        if loss.isfinite():
            return
        index = trainer.fit_loop.epoch_loop.batch_idx
        loader: Any = trainer.train_dataloader
        samples = samples_of_batch(loader, trainer.current_epoch, index)
        place = f"epoch {trainer.current_epoch + 1}, batch {index + 1}"
        damaged = _not_finite(self._batch, len(samples))
        if damaged.any():
            found = [sample for sample, bad in zip(samples, damaged, strict=True) if bad]
            raise DataError(f"{place}: NaN or infinite values in {origin(loader.dataset, found)}; mend or mask them")
        raise TrainingError(
            f"{place}: the loss is {float(loss)} on {origin(loader.dataset, samples)}, whose values are finite; lower "
            "task.learning_rate, or train with trainer.precision=32-true; checkpoints/last.ckpt is from before"
        )

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Looks at the weights: a gradient may be no number though the loss is one.

        Raises:
            TrainingError: they are not finite; nothing is written.
        """
        for name, value in checkpoint["state_dict"].items():
            # those that are shared out among processes have another type
            if type(value) is Tensor and value.is_floating_point() and not value.isfinite().all():
                raise TrainingError(
                    f"epoch {trainer.current_epoch + 1}: {name} is not finite, though the loss was; lower "
                    "task.learning_rate, or train with trainer.precision=32-true; checkpoints/last.ckpt is from before"
                )


def _not_finite(batch: Mapping[str, Any], count: int) -> np.ndarray:
    """Tells which samples of a batch hold values that are not finite, bool (count,)."""
    found = np.zeros(count, bool)
    for value in batch.values():
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape[:1] == (count,):
            found |= ~value.isfinite().reshape(count, -1).all(1).cpu().numpy()
    return found


@singledispatch
def origin(dataset: Any, samples: Sequence[Any]) -> str:
    """Says in words where samples of a data set come from, given what it is indexed with."""
    return f"samples {_listed([str(sample) for sample in samples])} of the epoch"


@origin.register
def _(dataset: PatchDataset, samples: Sequence[Any]) -> str:
    width = dataset.cube.shape[2] - dataset.patch_size + 1
    places = np.stack(np.divmod(dataset.indices[np.asarray(samples)], width), axis=1)
    return f"patches around the pixels (row, column) {_pairs(places)}"


@origin.register
def _(dataset: WindowDataset, samples: Sequence[Any]) -> str:
    # the cube has a border that lets windows hang over the scene
    corners = dataset.corners[np.asarray(samples)] - (dataset.size - 1)
    return f"windows of {dataset.size} x {dataset.size} pixels from (row, column) {_pairs(corners)}"


@origin.register
def _(dataset: TileDataset, samples: Sequence[Any]) -> str:
    named = [(dataset.subsets[number], position) for number, position in samples]
    return f"tiles {_listed([f'{subset.name} {int(subset.indices[position])}' for subset, position in named])}"


def _pairs(places: np.ndarray) -> str:
    return _listed([f"({row}, {column})" for row, column in places.tolist()])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
