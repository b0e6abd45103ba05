"""Fine-tuning on a benchmark task: learning rates compared on the validation set, the test set seen once, at last."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, default_collate

from vision_lowrank.adapters import LoRA, count_parameters, inject
from vision_lowrank.checkpoints import LastCheckpoint, Resumption, WholeFiles, best_checkpoint, read_checkpoint
from vision_lowrank.data.image_tasks import TaskData
from vision_lowrank.errors import ConfigError, DataError, TrainingError
from vision_lowrank.evaluation.task_metrics import Kind
from vision_lowrank.models.encoders import Encoder
from vision_lowrank.precision import choose_device, choose_precision
from vision_lowrank.raster_features import weights_digest
from vision_lowrank.runs import write_json
from vision_lowrank.tasks.raster_tasks import Outcome, RasterModel, RasterTask, join
from vision_lowrank.tasks.scene_classification import CHOICE

logger = logging.getLogger(__name__)

MODES = ("finetune", "adapter", "linear")
# the paper's own: AdamW with this decay, and a fifth of training in which the rate rises
WEIGHT_DECAY = 0.01
WARMUP = 0.2
GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Trial:
    """How a learning rate did.

    Attributes:
        learning_rate: highest rate.
        score: the validation metric of its best epoch; None where training diverged.
        epoch: that epoch, counted from 1; the latest of equals. 0 where training diverged.
        seconds: training and validation of all its epochs.
        failure: why there is no score.
    """

    learning_rate: float
    score: float | None
    epoch: int
    seconds: float
    failure: str | None = None


@dataclass(frozen=True, eq=False)
class Fitted:
    """What fine-tuning leads to.

    Attributes:
        tests: by the name of a test set, predictions and targets of its samples in their order, as
            `evaluation.task_metrics.score_task` takes them: classes int64 (n,) and classes; probabilities float32
            (n, K) and labels float32 (n, K); or confusion matrices int64 (n, K, K) and None.
        learning_rate: the one chosen on the validation set.
        epoch: whose weights predicted, counted from 1.
        trainable_parameters: of encoder, adapters and head together.
        seconds: of all trials, those of earlier calls included.
        trials: one a learning rate, in the order given.
    """

    tests: dict[str, Outcome]
    learning_rate: float
    epoch: int
    trainable_parameters: int
    seconds: float
    trials: tuple[Trial, ...]


def fit_raster(
    task_data: TaskData,
    make_encoder: Callable[[], Encoder],
    mode: str,
    learning_rates: Sequence[float],
    epochs: int,
    batch_size: int,
    precision: str,
    device: str,
    folder: Path,
    seed: int,
    targets: Sequence[str],
    rank: int,
    num_workers: int,
    tests: Mapping[str, Any],
    head: str = "linear",
) -> Fitted:
    """Trains once a learning rate, all alike otherwise, chooses by the validation metric, then predicts the test sets.

    Whatever was interrupted goes on from its last whole epoch, and finished trials are not repeated, when called again
    with the same arguments (`device`, `num_workers` and `tests` may differ). A rate at which training diverges is out.

    Args:
        task_data: the task; its test set is used only if it is among `tests`.
        make_encoder: returns the encoder, prepared for the task's channels, the same each time after
            `torch.manual_seed(seed)`; see `models.encoders`.
        mode: finetune: train all of it. adapter: LoRA of scale 2 on the frozen encoder, and the head. linear: the
            head alone.
        learning_rates: to choose from; the earliest of equals is taken.
        epochs: of each trial.
        batch_size: samples a step.
        precision: Lightning's precision string, or auto.
        device: cpu, cuda, cuda:1, …, or auto.
        folder: of checkpoints and finished trials; of this call alone.
        seed: of weights, order and turns.
        targets: layers of the encoder that adapters are put on, see `adapters.inject`; of mode adapter only.
        rank: of the adapters; of mode adapter only.
        num_workers: processes that read samples.
        tests: what to predict at the end, by name; such as the test set, seen by several sensors.
        head: see `RasterModel`.

    Raises:
        ConfigError: an option is out of range, `folder` belongs to a call with other arguments, or the encoder's
            features have another shape than it promises.
        DataError: a set is empty, or an image is not finite.
        TrainingError: training diverged at every rate.
        AdapterError: adapters cannot be put on the targets.
    """
    _check_options(mode, learning_rates, epochs, batch_size)
    for name, samples in {"training": task_data.train, "validation": task_data.validation, **tests}.items():
        if not len(samples):
            raise DataError(f"{task_data.name}: the set {name!r} is empty; give samples to train, choose and test on")
    device = choose_device(device)
    settings = {
        "mode": mode, "learning_rates": list(learning_rates), "epochs": epochs, "batch_size": batch_size,
        "precision": choose_precision(precision, torch.device(device).type), "seed": seed,
        "targets": list(targets) if mode == "adapter" else None, "rank": rank if mode == "adapter" else None,
        "head": head,
    }  # fmt: skip
    fit = _Fit(task_data, make_encoder, settings, device, folder, num_workers)
    trainable, identity = _inspect(fit.task(learning_rates[0]).model.to(device), task_data, device)
    _claim(folder, {**settings, **identity})
    trials = tuple(fit.trial(rate) for rate in learning_rates)
    scored = [(trial.score, trial) for trial in trials if trial.score is not None]
    if not scored:
        raise TrainingError(
            f"{task_data.name}: training diverged at each of the rates {list(learning_rates)}, lastly: "
            f"{trials[-1].failure}"
        )
    _, best = max(scored, key=lambda pair: pair[0])
    return Fitted(
        tests=fit.predict(best.learning_rate, tests),
        learning_rate=best.learning_rate,
        epoch=best.epoch,
        trainable_parameters=trainable,
        seconds=sum(trial.seconds for trial in trials),
        trials=trials,
    )


class _Numbered(Dataset[dict[str, Any]]):
    """Samples with their number under `index`, by which messages name them."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.samples[index], "index": index}


@dataclass(frozen=True)
class _Fit:
    """What the trials of one call of `fit_raster` share."""

    data: TaskData
    make_encoder: Callable[[], Encoder]
    settings: Mapping[str, Any]
    device: str
    folder: Path
    num_workers: int

    def model(self) -> RasterModel:
        """Returns the model as training finds it, the same each time."""
        L.seed_everything(self.settings["seed"], workers=True, verbose=False)
        encoder: Any = self.make_encoder()
        model = RasterModel(encoder, cast(Kind, self.data.kind), len(self.data.classes), self.settings["head"])
        if self.settings["mode"] == "linear":
            encoder.requires_grad_(False)
        elif self.settings["mode"] == "adapter":
            rank = self.settings["rank"]
            inject(encoder, self.settings["targets"], LoRA(rank, alpha=2 * rank))
        return model

    def task(self, rate: float) -> RasterTask:
        """Returns an untrained task."""
        return RasterTask(self.model(), self.data.metric, rate, WEIGHT_DECAY, WARMUP)

    def trial(self, rate: float) -> Trial:
        """Trains at a rate, or goes on, or reads how it ended."""
        run = self.run(rate)
        finished = run / "finished.json"
        if finished.exists():
            return Trial(**json.loads(finished.read_text(encoding="utf-8")))
        task = self.task(rate)
        failure = None
        try:
            self._fit(task, run)
        except TrainingError as error:
            failure = str(error)
            logger.warning("%s, learning rate %g is out: %s", self.data.name, rate, failure)
        seconds = sum(row["seconds"] for row in task.history)
        if failure is None:
            best = max(task.history, key=lambda row: row[CHOICE])
            trial = Trial(rate, best[f"val/{task.metric}"], int(best["epoch"]), seconds)
            logger.info("%s, learning rate %g: validation %s %.4f", self.data.name, rate, task.metric, trial.score)
        else:
            trial = Trial(rate, None, 0, seconds, failure)
        write_json(finished, trial)
        (run / "last.ckpt").unlink(missing_ok=True)
        return trial

    def _fit(self, task: RasterTask, run: Path) -> None:
        best = best_checkpoint(run, CHOICE, "max", save_weights_only=True)
        trainer = self.trainer([best, LastCheckpoint(run, run), Resumption()])
        last = run / "last.ckpt"
        if last.exists():
            read_checkpoint(last, "raster")
        trainer.fit(
            *(task, self.loader(self.data.train, shuffled=True), self.loader(self.data.validation)),
            ckpt_path=str(last) if last.exists() else None,
            weights_only=True,
        )
        if trainer.interrupted:
            raise KeyboardInterrupt

    def predict(self, rate: float, tests: Mapping[str, Any]) -> dict[str, Outcome]:
        """Applies the best weights of a rate to test sets."""
        task = self.task(rate)
        task.load_state_dict(
            {**task.state_dict(), **read_checkpoint(self.run(rate) / "best.ckpt", "raster")["state_dict"]}
        )
        found = {}
        for name, samples in tests.items():
            trainer = self.trainer([])
            outcomes: Any = trainer.predict(task, self.loader(samples))
            if trainer.interrupted:
                raise KeyboardInterrupt
            found[name] = join(outcomes)
        return found

    def run(self, rate: float) -> Path:
        """Returns the folder of a rate."""
        return self.folder / f"lr_{rate!r}"

    def loader(self, samples: Any, shuffled: bool = False) -> DataLoader[dict[str, Any]]:
        """Returns batches in order, or in one drawn from seed and epoch, which a resumed run draws again."""
        numbered = _Numbered(samples)
        order: Sampler[int] | None = None
        if shuffled:
            order = DistributedSampler(numbered, 1, 0, seed=self.settings["seed"])
        return DataLoader(
            *(numbered, self.settings["batch_size"]),
            sampler=order,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.device != "cpu",
        )

    def trainer(self, callbacks: Sequence[Callback]) -> L.Trainer:
        """Returns a Trainer with a progress bar; without callbacks, without checkpoints."""
        # as in fitting.make_trainer
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        device = torch.device(self.device)
        return L.Trainer(
            accelerator=device.type,
            devices=1 if device.index is None else [device.index],
            precision=self.settings["precision"],
            max_epochs=self.settings["epochs"],
            gradient_clip_val=GRADIENT_NORM,
            # the gradient of resized position embeddings has no repeatable form on a GPU
            deterministic="warn",
            callbacks=[*callbacks, RichProgressBar(leave=False)],
            plugins=[WholeFiles()],
            logger=False,
            enable_model_summary=False,
            enable_checkpointing=bool(callbacks),
            num_sanity_val_steps=0,
        )


def _check_options(mode: str, rates: Sequence[float], epochs: int, batch_size: int) -> None:
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r}: choose one of {', '.join(MODES)}")
    if not rates or len(set(rates)) < len(rates) or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise ConfigError(f"learning_rates={list(rates)}: give at least one, positive, none twice")
    if epochs < 1 or batch_size < 1:
        raise ConfigError(f"epochs={epochs}, batch_size={batch_size}: give at least 1 of each")


@torch.no_grad()
def try_model(model: RasterModel, task_data: TaskData, device: str) -> None:
    """Runs a sample through a model, which checks the shape of the encoder's features.

    Raises:
        ConfigError: they have another one than the encoder promises.
    """
    sample = default_collate([task_data.train[0]])
    model.eval()(*(sample[name].to(device) for name in ("image", "wavelengths", "gsd")))


def _inspect(model: RasterModel, task_data: TaskData, device: str) -> tuple[int, dict[str, Any]]:
    """Tries an untrained model.

    Returns:
        The number of trainable parameters, and what tells task and encoder from others.
    """
    try_model(model, task_data, device)
    return count_parameters(model).trainable, {
        "task": task_data.name, "data": task_data.fingerprint, "kind": task_data.kind, "metric": task_data.metric,
        "encoder": model.encoder.name, "weights": weights_digest(model),
    }  # fmt: skip


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Notes in a new folder whose it is.

    Raises:
        ConfigError: it is another's.
    """
    path = folder / "settings.json"
    if not path.exists():
        write_json(path, settings)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if changed := sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key)):
        told = ", ".join(f"{key} {before.get(key)!r}, not {settings.get(key)!r}" for key in changed)
        raise ConfigError(f"{folder}: training there was begun with {told}; give the same, or another folder")
