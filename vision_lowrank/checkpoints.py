"""Checkpoints of training: whole or absent on the disk, also within an epoch, and a resumed run that is the same run.

checkpoints/best.ckpt   the epoch with the best value of the metric that the run is judged by
checkpoints/last.ckpt   the end of the last epoch, or, where epochs are long, a step of this one
pretraining/last.ckpt   the same of a pretraining that comes first
"""

import errno
import pickle
import time
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ModelCheckpoint
from torch import Tensor
from torchmetrics import Metric

from vision_lowrank.batch_order import choose_epoch
from vision_lowrank.errors import CheckpointError
from vision_lowrank.runs import atomic_path, process_rank, remove_leftovers

# an interruption costs no more work than this
SAVE_EVERY = timedelta(minutes=10)


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint under another name first: Lightning's own writer moves one in from the temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint.

        Raises:
            OSError: the disk is full, the folder is read-only, or the like; `filename` is `path`.
        """
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # a full disk shows itself to the zip writer as a wrong position
                raise OSError(errno.ENOSPC, f"cannot be written whole ({error})", str(path)) from error


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` after each epoch, and within an epoch when the last one is `SAVE_EVERY` old.

    Args:
        folder: where to.
        run: folder of the run, in which unfinished files of one that was killed are removed.
    """

    def __init__(self, folder: Path, run: Path) -> None:
        self.path = folder / "last.ckpt"
        self.run = run
        self._saved = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Cleans up, and starts the clock."""
        if process_rank() == 0:
            remove_leftovers(self.run)
        self._saved = time.monotonic()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Writes what the last step led to: at its own end some of its hooks would still be to come."""
        due = time.monotonic() - self._saved >= SAVE_EVERY.total_seconds()
        # between batches that are accumulated to one step, half a gradient would be lost
        begun = batch_idx % trainer.accumulate_grad_batches
        if batch_idx == 0 or begun or not trainer.strategy.broadcast(due):
            return
        progress = trainer.fit_loop.epoch_loop.batch_progress
        # nothing of this batch has happened yet, and a file that counts it would let a resumed run go astray
        for counter in (progress.total, progress.current):
            counter.ready -= 1
        self._save(trainer)
        for counter in (progress.total, progress.current):
            counter.ready += 1

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the end of the whole epoch: the history in the file holds it."""
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved = time.monotonic()


class Resumption(Callback):
    """Lets a resumed run meet the batches that the uninterrupted one met, and count on where it stopped.

    Lightning starts the loader before it tells it the epoch, so that worker processes would fetch the first epoch's
    batches, and keeps neither the place within an epoch nor what was logged in it, nor the state of torch's generator.
    Batches that were trained on are read and dropped. Sums of what was logged are those of one process: where several
    train, the first epoch after resumption logs the part that process 0 saw, twice over; weights are exact. The
    generator is the processor's, of process 0.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._random: Tensor | None = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the state of torch's generator, and the sums of what was logged and scored in this epoch."""
        checkpoint["random"] = torch.get_rng_state()
        # those of a checkpoint that no step has followed are not in the metrics yet
        checkpoint["sums"] = self._sums or {
            name: dict(metric.metric_state) for name, metric in _metrics(trainer, pl_module)
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the sums and the generator's state until they can be put back."""
        self._sums = checkpoint.get("sums", {})
        self._random = checkpoint.get("random")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins the epoch's batches anew, where this one is resumed."""
        loop: Any = trainer.fit_loop
        if not loop.is_resuming:
            return
        within = loop.restarted_mid_epoch
        if not within:
            self._sums = {}
        loader: Any = trainer.train_dataloader
        choose_epoch(loader, loop.epoch_progress.current.processed)
        fetcher = loop._data_fetcher
        # a loader draws a number when it is started; where the epoch goes on, the saved state is of later
        if not within:
            self._put_generator_back()
        iter(fetcher)
        if within:
            # the loader is no stateful one, and need not be
            warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
            for _ in range(loop.epoch_loop.batch_progress.current.completed):
                next(fetcher.iterator)
            self._put_generator_back()
            # Lightning leaves this hook out of an epoch that it resumes
            pl_module.on_train_epoch_start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the sums after the first step, which makes the metrics of what is logged."""
        if not self._sums:
            return
        for name, metric in _metrics(trainer, pl_module):
            for part, value in self._sums.get(name, {}).items():
                setattr(metric, part, getattr(metric, part) + value.to(metric.device))
        self._sums = {}

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Puts the generator back where the checkpoint was of the end, and nothing was left to train."""
        self._put_generator_back()

    def _put_generator_back(self) -> None:
        if self._random is not None:
            torch.set_rng_state(self._random)
        self._random = None


class Patience(EarlyStopping):
    """Stops at once when a run is resumed that had stopped before: Lightning's own would train one more epoch."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops where training had."""
        if self.stopped_epoch:
            trainer.should_stop = True


class BestCheckpoint(ModelCheckpoint):
    """Writes the best epoch, and keeps to its own folder.

    Lightning's own takes over the paths that a checkpoint names, deletes what lies there once an epoch is better, and
    forgets the best score where the run was moved.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the scores of a checkpoint; the file they are of is the one in this folder, if there is one."""
        path = Path(str(self.dirpath)) / f"{self.filename}{self.FILE_EXTENSION}"
        score = state_dict.get("best_model_score")
        if not isinstance(score, Tensor) or not path.is_file():
            return
        self.best_model_path = self.kth_best_model_path = str(path)
        self.best_model_score = self.kth_value = score
        self.best_k_models = {str(path): score}


def checkpoints(folder: Path, monitor: str, mode: str) -> tuple[ModelCheckpoint, LastCheckpoint]:
    """Returns what writes `checkpoints/best.ckpt`, by a metric that is to be "min" or "max", and `last.ckpt`."""
    place = folder / "checkpoints"
    return best_checkpoint(place, monitor, mode), LastCheckpoint(place, folder)


def best_checkpoint(folder: Path, monitor: str, mode: str, save_weights_only: bool = False) -> ModelCheckpoint:
    """Returns what writes `best.ckpt` into a folder, see `checkpoints`."""
    return BestCheckpoint(
        *(folder, "best", monitor),
        mode=mode,
        save_weights_only=save_weights_only,
        enable_version_counter=False,
        # at the end of the whole epoch, so that the history in the file holds it
        save_on_train_epoch_end=True,
    )


def read_checkpoint(path: str | Path, *needed: str) -> dict[str, Any]:
    """Reads a Lightning checkpoint of ours; nothing in it is executed.

    Args:
        path: file.
        needed: entries that tell which task it is of.

    Raises:
        CheckpointError: it is missing or damaged, holds code, or is of another task.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path}: not found; give a run's checkpoints/last.ckpt") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path}: damaged, or holds objects other than tensors and numbers, which could be code; it is "
            "not loaded: take the last.ckpt of a run of this project"
        ) from error
    except Exception as error:
        # damage ends in errors of many kinds
        raise CheckpointError(f"checkpoint {path}: damaged ({error}); take an older one or start anew") from error
    if not isinstance(content, dict) or not {"state_dict", "history", *needed} <= content.keys():
        raise CheckpointError(f"checkpoint {path}: not of this task; give the checkpoints/last.ckpt of a run of it")
    return content


def _metrics(trainer: L.Trainer, task: L.LightningModule) -> Iterator[tuple[str, Metric]]:
    """Yields what adds up over an epoch, by name: metrics of the task, and what is logged while training."""
    for name, module in task.named_modules():
        if isinstance(module, Metric):
            yield name, module
    logged: Mapping[str, Any] = trainer.fit_loop.epoch_loop._results
    for name, value in logged.items():
        yield f"logged {name}", value
