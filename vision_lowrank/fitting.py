"""Training of a network on a prepared scene: all of it, its head, or adapters; checkpoints and what is kept."""

import json
import logging
import pickle
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, RichProgressBar
from omegaconf import DictConfig
from torch import nn

from vision_lowrank.adapters import count_parameters, freeze_except, inject, save_adapter
from vision_lowrank.data.modules import SceneDataModule
from vision_lowrank.data.splits import Split
from vision_lowrank.errors import CheckpointError, ConfigError
from vision_lowrank.inference import predict_probabilities
from vision_lowrank.instantiate import instantiate
from vision_lowrank.models.heads import LessSegmentation
from vision_lowrank.models.less_vit import LessViT
from vision_lowrank.reporting import save_training_curves
from vision_lowrank.runs import process_rank, write_csv
from vision_lowrank.tasks.masked_pretraining import MaskedPretraining
from vision_lowrank.tasks.scene_classification import CHOICE, SceneClassification

logger = logging.getLogger(__name__)


def fit_network(
    config: DictConfig, data: SceneDataModule, folder: Path, checkpoint: Mapping[str, Any] | None, precision: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Trains, keeps the weights of the best epoch on the validation pixels and applies them to the whole scene.

    Writes `model/` (weights and settings), `adapter/` with adapters, `history.csv`, `curves.png` and `checkpoints/`.

    Args:
        config: the whole configuration.
        data: after `setup`.
        folder: run folder.
        checkpoint: content of the checkpoint to resume from, None for a new run.
        precision: Lightning's precision string.

    Returns:
        Probabilities, float32 (height * width, classes), by the name in `data.predict_dataloaders`, and facts for
        `metrics.json`; empty on ranks other than 0.

    Raises:
        VisionLowRankError: see `training.train`.
    """
    model, transductive = _prepare_model(config, data, folder, checkpoint is not None, precision)
    facts: dict[str, Any] = {"transductive": transductive}
    task = _make_task(config, data, model)
    best, last = checkpoints(folder, CHOICE, "max")
    # while a cycle begins anew validation at full strength says little, for longer than any patience
    patience = config.trainer.max_epochs if config.regime == "adapt" else config.patience
    trainer = make_trainer(config, precision, [best, last, EarlyStopping(CHOICE, patience=patience, mode="max")])
    started = time.perf_counter()
    trainer.fit(task, data, ckpt_path=config.ckpt_path, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if process_rank() > 0:
        return {}, {}
    facts["training_seconds"] = time.perf_counter() - started
    task.load_state_dict(read_checkpoint(best.best_model_path, "strength")["state_dict"])
    kept = max(task.history, key=lambda row: row[CHOICE])
    facts |= {"best_epoch": kept["epoch"], "epochs": task.history[-1]["epoch"]}
    count = count_parameters(model)
    facts["parameters"] = {
        "base": count.base, "adapter": count.adapter, "head": count.head, "trainable": count.trainable,
        "trainable_share": count.trainable / count.total,
    }  # fmt: skip
    write_csv(folder / "history.csv", task.history)
    save_training_curves(folder / "curves.png", task.history, kept["epoch"])
    if config.regime == "adapt":
        save_adapter(model, folder / "adapter")
    else:
        model.save_pretrained(folder / "model")
    started = time.perf_counter()
    device = str(trainer.strategy.root_device)
    probabilities = {
        name: data.assemble(predict_probabilities(task, loader, precision, device).numpy())
        for name, loader in data.predict_dataloaders().items()
    }
    facts["map_seconds"] = time.perf_counter() - started
    return probabilities, facts


def checkpoints(folder: Path, monitor: str, mode: str) -> tuple[ModelCheckpoint, ModelCheckpoint]:
    """Returns what writes `checkpoints/best.ckpt`, by a metric that is to be "min" or "max", and `last.ckpt`."""
    # Lightning's own `save_last` leaves out epochs that are not among the best
    chosen: tuple[tuple[str, str | None], ...] = (("best", monitor), ("last", None))
    best, last = (
        # at the end of the whole epoch, so that the history in the file holds it
        ModelCheckpoint(
            *(folder / "checkpoints", name, metric),
            mode=mode,
            enable_version_counter=False,
            save_on_train_epoch_end=True,
        )
        for name, metric in chosen
    )
    return best, last


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
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"checkpoint {path}: damaged ({error}); take an older one or start anew") from error
    if not isinstance(content, dict) or not {"state_dict", "history", *needed} <= content.keys():
        raise CheckpointError(f"checkpoint {path}: not of this task; give the checkpoints/last.ckpt of a run of it")
    return content


def _prepare_model(
    config: DictConfig, data: SceneDataModule, folder: Path, resumed: bool, precision: str
) -> tuple[Any, bool]:
    """Returns the model of a regime, ready to be trained, and whether it has seen the scene without labels before."""
    adapted = config.regime == "adapt"
    transductive = _saw_scene(data, Path(config.base)) if config.base is not None else adapted
    if adapted and resumed:
        model = _load_base(config, data, folder / "model")
    else:
        if config.base is not None:
            _check_base(data, Path(config.base))
            model = _load_base(config, data, Path(config.base))
        else:
            model = _pretrain(config, data, folder, precision) if adapted else _build(config, data)
        model.reset_classifier(data.num_classes)
    if adapted:
        if not resumed:
            model.save_pretrained(folder / "model")
        inject(
            model, list(config.adapter.targets), instantiate(config.adapter.method), train=list(config.adapter.train)
        )
    elif config.regime == "probe":
        freeze_except(model, list(config.adapter.train))
    return model, transductive


def _build(config: DictConfig, data: SceneDataModule) -> Any:
    model: Any = instantiate(config.model, **data.model_arguments())
    return model


def _check_base(data: SceneDataModule, folder: Path) -> None:
    """Refuses a base that learned the labels of present test pixels, as far as its run folder tells."""
    split_file = folder.parent / "split.npz"
    if not split_file.exists() or (folder.parent / "pretraining.csv").exists():
        return
    trained = Split.load(split_file)
    shared = np.intersect1d(trained.train, data.split.test) if trained.shape == data.split.shape else np.empty(0)
    if shared.size:
        raise ConfigError(
            f"base {folder}: trained on the labels of {shared.size} pixels that are test pixels here; take a base of "
            "another scene, of the same split, or one pretrained without labels"
        )


def _saw_scene(data: SceneDataModule, folder: Path) -> bool:
    """Tells whether a base was trained without labels on the files of this scene, as far as its run folder tells."""
    run = folder.parent
    if (run / "split.npz").exists():
        return (run / "pretraining.csv").exists()
    try:
        seen = json.loads((run / "provenance.json").read_text(encoding="utf-8"))["data"].values()
    except (OSError, ValueError, KeyError):
        return False
    return not set(seen).isdisjoint(data.scene.hashes.values())


def _load_base(config: DictConfig, data: SceneDataModule, folder: Path) -> Any:
    """Returns the base in `folder` after comparing it with the configuration."""
    model = _build(config, data)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"base {folder}: no config.json there; give the `model` folder of a run, or the `encoder` of a pretraining"
        )
    try:
        parts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        # a segmentation model's settings hold those of its encoder
        kind = LessViT if isinstance(model, LessSegmentation) and "encoder" not in parts else type(model)
        base: Any = kind.from_pretrained(folder, local_files_only=True, strict=True)
    except Exception as error:
        raise CheckpointError(f"base {folder}: cannot be loaded as {type(model).__name__} ({error})") from error
    if isinstance(model, LessSegmentation):
        encoder = base.encoder if isinstance(base, LessSegmentation) else base
        for setting, needed in model.encoder.settings.items():
            if encoder.settings[setting] != needed:
                raise ConfigError(
                    f"base {folder}: {setting} is {encoder.settings[setting]}, model.encoder has {needed}; set "
                    f"model.encoder.{setting} to match"
                )
        if base is not encoder:
            return base
        model.encoder = encoder
        return model
    for setting in ("in_chans", "img_size"):
        found, needed = getattr(base, setting), getattr(model, setting)
        if found != needed:
            raise ConfigError(f"base {folder}: {setting} is {found}, the data has {needed}; set data to match")
    return base


def _pretrain(config: DictConfig, data: SceneDataModule, folder: Path, precision: str) -> Any:
    """Returns a base that learned to reconstruct the scene, its test pixels included, without labels."""
    logger.info("pretraining on all %d pixels of the scene, without labels: transductive", data.scene.valid.sum())
    model = _build(config, data)
    task: MaskedPretraining = instantiate(config.pretraining.task, model=model, channels=data.num_channels)
    trainer = make_trainer(config, precision, [], max_epochs=config.pretraining.epochs)
    trainer.fit(task, data.pretrain_dataloader(trainer.world_size))
    if trainer.interrupted:
        raise KeyboardInterrupt
    write_csv(folder / "pretraining.csv", task.history)
    return model


def _make_task(config: DictConfig, data: SceneDataModule, model: nn.Module) -> SceneClassification:
    counts = data.training_counts()
    options: dict[str, Any] = {"model": model, "class_counts": counts.tolist()}
    if config.regime == "adapt":
        options |= {"cycles": dict(config.adapter.cycles), "learning_rate": config.adapter.learning_rate}
    task: SceneClassification = instantiate(config.task, **options)
    return task


def make_trainer(config: DictConfig, precision: str, callbacks: Sequence[Callback], **changes: Any) -> L.Trainer:
    """Returns the configured Trainer, with a progress bar; without callbacks, without checkpoints."""
    trainer: L.Trainer = instantiate(
        config.trainer,
        precision=precision,
        callbacks=[*callbacks, RichProgressBar(leave=False)],
        logger=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        num_sanity_val_steps=0,
        **changes,
    )
    return trainer
