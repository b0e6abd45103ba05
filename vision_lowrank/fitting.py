"""Training of a network on a prepared scene: all of it, its head, or adapters; checkpoints and what is kept."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import lightning as L
import numpy as np
import torch
from filelock import FileLock
from lightning.pytorch.callbacks import Callback, RichProgressBar
from omegaconf import DictConfig, OmegaConf
from rich.progress import Progress
from torch import Tensor, nn

from vision_lowrank.adapters import freeze_except
from vision_lowrank.adapters.lora_plus import lora_plus_groups
from vision_lowrank.checkpoints import (
    LastCheckpoint,
    Patience,
    Resumption,
    WholeFiles,
    checkpoints,
    read_checkpoint,
)
from vision_lowrank.compilation import Compilation
from vision_lowrank.data.modules import SceneDataModule
from vision_lowrank.data.splits import Split
from vision_lowrank.errors import CheckpointError, ConfigError
from vision_lowrank.inference import predict_probabilities
from vision_lowrank.instantiate import instantiate
from vision_lowrank.loss_watch import LossWatch
from vision_lowrank.models.heads import LessSegmentation
from vision_lowrank.models.less_vit import FREE_SETTINGS, LessViT
from vision_lowrank.models.lola_specvit import LolaSpecViT
from vision_lowrank.models.saved import load_saved
from vision_lowrank.pixel_predictor import PixelPredictor
from vision_lowrank.reporting import save_training_curves
from vision_lowrank.runs import atomic_folder, process_rank, provenance, write_csv, write_json
from vision_lowrank.tasks.adapter_training import (
    AdapterOptions,
    AdapterTraining,
    Batches,
    PeftAdapter,
    count_trained,
    first_batches,
    put_adapters,
    read_options,
    save_adapters,
)
from vision_lowrank.tasks.frozen_stem import FrozenStemClassification
from vision_lowrank.tasks.masked_pretraining import MaskedPretraining
from vision_lowrank.tasks.scene_classification import CHOICE, SceneClassification

logger = logging.getLogger(__name__)

# what a run goes on with; in regime=adapt the first has a folder of checkpoints with this name
Stage: TypeAlias = Literal["pretraining", "training"]


def resumed_stage(config: DictConfig) -> Stage | None:
    """Returns what `config.ckpt_path` is of, None where there is none.

    Raises:
        CheckpointError: it cannot be read, or is not of such a run.
    """
    if config.ckpt_path is None:
        return None
    path = Path(config.ckpt_path)
    if path.resolve().parent.name != "pretraining":
        read_checkpoint(path, "strength")
        return "training"
    if config.regime != "adapt" or config.base is not None:
        raise CheckpointError(f"checkpoint {path}: of the pretraining in regime=adapt without base; give both as there")
    read_checkpoint(path, "masked_pixels")
    return "pretraining"


def fit_network(
    config: DictConfig, data: SceneDataModule, folder: Path, resumed: Stage | None, precision: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Trains, keeps the weights of the best epoch on the validation pixels and applies them to the whole scene.

    Writes `model/` (weights and settings), `adapter/` with adapters, `history.csv`, `curves.png` and `checkpoints/`.

    Args:
        config: the whole configuration.
        data: after `setup`.
        folder: run folder.
        resumed: what to go on with from `config.ckpt_path`, see `resumed_stage`.
        precision: Lightning's precision string.

    Returns:
        Probabilities, float32 (height * width, classes), by the name in `data.predict_dataloaders`, and facts for
        `metrics.json`; empty on ranks other than 0.

    Raises:
        VisionLowRankError: see `training.train`.
    """
    trained = train_network(config, data, folder, resumed, precision)
    if trained is None:
        return {}, {}
    started = time.perf_counter()
    probabilities = trained.predict(data, precision)
    return probabilities, {**trained.facts, "map_seconds": time.perf_counter() - started}


@dataclass(frozen=True, eq=False)
class Trained:
    """A network with the weights of its best epoch on the validation pixels.

    Attributes:
        task: holds the network.
        facts: for `metrics.json`.
        device: where it was trained.
    """

    task: SceneClassification
    facts: dict[str, Any]
    device: str

    def predict(self, data: SceneDataModule, precision: str) -> dict[str, np.ndarray]:
        """Returns probabilities as `fit_network` does.

        LoLA-SpecViT's are those of its dense form, but where the task remembers what its stem made of patches.
        """
        model = self.task.model
        if isinstance(model, LolaSpecViT) and not isinstance(self.task, FrozenStemClassification):
            predictor = PixelPredictor(model, False, precision, self.device)
            with Progress(transient=True) as progress:
                bar = progress.add_task("classifying pixels", total=data.scene.labels.size)
                found = predictor(data.cube, 0, 0, lambda count: progress.advance(bar, count))
            return {"": found.reshape(len(found), -1).T}
        return {
            name: data.assemble(predict_probabilities(self.task, loader, precision, self.device).numpy())
            for name, loader in data.predict_dataloaders().items()
        }


def train_network(
    config: DictConfig, data: SceneDataModule, folder: Path, resumed: Stage | None, precision: str
) -> Trained | None:
    """Does the work of `fit_network` up to the map.

    Args:
        config: as for `fit_network`, like `data`, `folder` and `precision`.
        data: see there.
        folder: see there.
        resumed: see there.
        precision: see there.

    Returns:
        None on ranks other than 0.

    Raises:
        VisionLowRankError: see `training.train`.
    """
    adapted = config.regime == "adapt"
    hooks = [AdapterTraining(**asdict(adapter_options(config).training))] if adapted else []
    model, transductive = _prepare_model(config, data, folder, resumed, precision)
    facts: dict[str, Any] = {"transductive": transductive}
    task = _make_task(config, data, model)
    best, last = checkpoints(folder, CHOICE, "max")
    # while a cycle begins anew validation at full strength says little, for longer than any patience
    patience = config.trainer.max_epochs if adapted else config.patience
    stop = Patience(CHOICE, patience=patience, mode="max")
    trainer = make_trainer(config, precision, [best, last, stop, *hooks], use_distributed_sampler=False)
    started = time.perf_counter()
    ckpt_path = config.ckpt_path if resumed == "training" else None
    fit(trainer, task, data, ckpt_path)
    if process_rank() > 0:
        return None
    facts["training_seconds"] = time.perf_counter() - started
    content = read_checkpoint(best.best_model_path, "strength")
    task.load_state_dict(content["state_dict"])
    # facts of the very weights; the best of the history is another epoch where best.ckpt was lost on the way
    kept = next(row for row in task.history if row["epoch"] == content["epoch"] + 1)
    facts |= {"best_epoch": kept["epoch"], "epochs": task.history[-1]["epoch"], "validation_oa": kept["val/OA"]}
    count = count_trained(model)
    facts["parameters"] = {
        "base": count.base, "adapter": count.adapter, "head": count.head, "trainable": count.trainable,
        "trainable_share": count.trainable / count.total,
    }  # fmt: skip
    write_csv(folder / "history.csv", task.history)
    save_training_curves(folder / "curves.png", task.history, kept["epoch"])
    if adapted:
        save_adapters(model, folder / "adapter")
    else:
        with atomic_folder(folder / "model") as temporary:
            model.save_pretrained(temporary)
    return Trained(task, facts, str(trainer.strategy.root_device))


def restore_network(config: DictConfig, data: SceneDataModule, folder: Path) -> Trained:
    """Returns what `train_network` had trained, from its folder, on the CPU.

    Raises:
        CheckpointError: the folder holds no such training.
    """
    model, _ = _prepare_model(config, data, folder, "training", "")
    task = _make_task(config, data, model)
    task.load_state_dict(read_checkpoint(folder / "checkpoints" / "best.ckpt", "strength")["state_dict"])
    return Trained(task, {}, "cpu")


def _prepare_model(
    config: DictConfig, data: SceneDataModule, folder: Path, resumed: Stage | None, precision: str
) -> tuple[Any, bool]:
    """Returns the model of a regime, ready to be trained, and whether it has seen the scene without labels before."""
    adapted = config.regime == "adapt"
    transductive = _saw_scene(data, Path(config.base)) if config.base is not None else adapted
    pretrained = adapted and resumed == "training"
    if pretrained:
        model = load_base(config, data, folder / "model")
    else:
        if adapted and config.base is None:
            keep = LastCheckpoint(folder / "pretraining", folder)
            model = pretrain(config, data, folder, precision, [keep], config.ckpt_path)
        else:
            model = _begin(config, data)
        model.reset_classifier(data.num_classes)
    if adapted:
        if not pretrained and process_rank() == 0:
            with atomic_folder(folder / "model") as temporary:
                model.save_pretrained(temporary)
        model = adapt(config, data, model)
    elif config.regime == "probe":
        freeze_except(model, list(adapter_options(config).train))
    return model, transductive


def adapt(config: DictConfig, data: SceneDataModule, model: Any) -> Any:
    """Puts the configured adapters on a model and returns what is to be trained.

    Raises:
        VisionLowRankError: the settings contradict each other or do not fit the model.
    """
    options = adapter_options(config)
    method = instantiate(options.method)
    if isinstance(method, PeftAdapter) and options.cycles is not None:
        raise ConfigError(f"adapter.cycles move the strength of our own adapters: set them to null for {method.name}")
    targets, train = list(options.targets), list(options.train)
    return put_adapters(model, method, targets, train, lambda: training_batches(config, data))


def adapter_options(config: DictConfig) -> AdapterOptions:
    """Returns the section `adapter` of a configuration; raises ConfigError where it is wrong."""
    section: Any = OmegaConf.to_container(config.adapter, resolve=True)
    return read_options(section)


def training_batches(config: DictConfig, data: SceneDataModule) -> Batches:
    """Returns the training samples that some adapters look at before training, see `put_adapters`."""
    return first_batches(data.train_dataloader(), config.task.get("inputs", ["image"]), adapter_options(config).samples)


def rehearse(config: DictConfig, data: SceneDataModule) -> None:
    """Readies a model that is thrown away, so that what does not fit is told before hours of other work.

    Raises:
        VisionLowRankError: as `load_base` and `adapt`, or the settings of training do not fit the model.
    """
    with torch.random.fork_rng():
        model = _begin(config, data)
        if config.regime == "adapt":
            model = adapt(config, data, model)
            options = adapter_options(config)
            AdapterTraining(**asdict(options.training)).check(model)
            if options.rate_ratio is not None:
                lora_plus_groups(model, options.learning_rate, options.rate_ratio)
        elif config.regime == "probe":
            freeze_except(model, list(adapter_options(config).train))
        _make_task(config, data, model)


def _begin(config: DictConfig, data: SceneDataModule) -> Any:
    """Returns the configured base, or a model with random weights."""
    if config.base is None:
        return build(config, data)
    _check_base(data, Path(config.base))
    return load_base(config, data, Path(config.base))


def build(config: DictConfig, data: SceneDataModule) -> Any:
    """Returns the configured model for the data, with random weights."""
    model: Any = instantiate(config.model, **data.model_arguments())
    return model


def _check_base(data: SceneDataModule, folder: Path) -> None:
    """Refuses a base that learned the labels of present test pixels, as far as its run folder tells."""
    split_file = folder.parent / "split.npz"
    if not split_file.exists() or (folder.parent / "pretraining.csv").exists():
        return
    trained = Split.load(split_file)
    if trained.shape != data.split.shape or _shares_files(data, folder.parent / "provenance.json") is False:
        return
    shared = np.intersect1d(trained.train, data.split.test)
    if shared.size:
        raise ConfigError(
            f"base {folder}: trained on the labels of {shared.size} pixels that are test pixels here; take a base of "
            "another scene, of the same split, or one pretrained without labels"
        )


def _saw_scene(data: SceneDataModule, folder: Path) -> bool:
    """Tells whether a base was trained without labels on the files of this scene, as far as its folder or run tells."""
    run = folder.parent
    if (run / "split.npz").exists():
        return (run / "pretraining.csv").exists() or _was_transductive(run)
    own = folder / "provenance.json"
    return _shares_files(data, own if own.exists() else run / "provenance.json") is True


def _shares_files(data: SceneDataModule, record: Path) -> bool | None:
    """Tells whether the files of a provenance are partly those of this scene; None where it does not tell."""
    try:
        seen = json.loads(record.read_text(encoding="utf-8"))["data"].values()
    except (OSError, ValueError, KeyError):
        return None
    return not set(seen).isdisjoint(data.scene.hashes.values())


def _was_transductive(run: Path) -> bool:
    """Tells whether a run's own base had seen the scene, as its facts say."""
    try:
        facts = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["facts"]
    except (OSError, ValueError, KeyError):
        return False
    return bool(facts.get("transductive", False))


def load_base(config: DictConfig, data: SceneDataModule, folder: Path) -> Any:
    """Returns the base in `folder` after comparing it with the configuration.

    An encoder by itself gets the configuration's dropout rates, and loses its head.

    Raises:
        CheckpointError: it cannot be loaded.
        ConfigError: it is of another size.
    """
    model = build(config, data)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"base {folder}: no config.json there; give the `model` folder of a run, or the `encoder` of a pretraining"
        )
    try:
        parts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        # a segmentation model's settings hold those of its encoder
        kind = LessViT if isinstance(model, LessSegmentation) and "encoder" not in parts else type(model)
        base: Any = load_saved(kind, folder)
    except Exception as error:
        raise CheckpointError(f"base {folder}: cannot be loaded as {type(model).__name__} ({error})") from error
    if isinstance(model, LessSegmentation):
        encoder = base.encoder if isinstance(base, LessSegmentation) else base
        found = encoder.settings
        # an encoder by itself can have others here than where it was pretrained
        free = FREE_SETTINGS if base is encoder else ()
        needed = model.encoder.settings.items()
        others = {name: need for name, need in needed if name not in free and found[name] != need}
        if others:
            told = ", ".join(f"{name} is {found[name]}, model.encoder has {need}" for name, need in others.items())
            remedy = " ".join(f"++model.encoder.{name}={json.dumps(found[name])}" for name in others)
            raise ConfigError(f"base {folder}: {told}; add {remedy}")
        if base is not encoder:
            return base
        for part in (encoder, model.encoder):
            part.reset_classifier(0)
        model.encoder.load_state_dict(encoder.state_dict())
        return model
    for setting in ("in_chans", "img_size"):
        found, needed = getattr(base, setting), getattr(model, setting)
        if found != needed:
            raise ConfigError(f"base {folder}: {setting} is {found}, the data has {needed}; set data to match")
    return base


def pretrain(
    config: DictConfig,
    data: SceneDataModule,
    folder: Path,
    precision: str,
    callbacks: Sequence[Callback] = (),
    ckpt_path: str | None = None,
) -> Any:
    """Returns a base that learned to reconstruct `data.pretraining_pixels()` without labels.

    Args:
        config: the whole configuration.
        data: after `setup`.
        folder: gets `pretraining.csv`.
        precision: Lightning's precision string.
        callbacks: keep checkpoints.
        ckpt_path: one to go on from.
    """
    pixels = data.pretraining_pixels()
    seen = "transductive" if np.isin(data.split.test, pixels).any() else "no test pixel among them"
    logger.info("pretraining on %d pixels of the scene, without labels: %s", pixels.size, seen)
    model = build(config, data)
    task: MaskedPretraining = instantiate(config.pretraining.task, model=model, channels=data.num_channels)
    epochs = config.pretraining.epochs
    trainer = make_trainer(config, precision, callbacks, max_epochs=epochs, use_distributed_sampler=False)
    together = trainer.world_size > 1
    if together:
        _settle_decoder(task, next(iter(data.pretrain_dataloader()))["image"])
        # several processes wait for the gradient of each weight, and the loss has none for the head
        model.get_classifier().requires_grad_(False)
    fit(trainer, task, data.pretrain_dataloader(), ckpt_path)
    if together:
        model.get_classifier().requires_grad_(True)
    if process_rank() == 0:
        write_csv(folder / "pretraining.csv", task.history)
    return model


def shared_base(
    config: DictConfig, data: SceneDataModule, folder: Path, seed: int, precision: str, **facts: Any
) -> Path:
    """Returns where the weights are of a base that several runs share: the first that asks pretrains it, others wait.

    Args:
        config: as for `pretrain`, like `data` and `precision`.
        data: see there.
        folder: of the base alone; `provenance.json` in it is written last.
        seed: of the pretraining.
        precision: see there.
        facts: for `provenance.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "provenance.json").exists():
            L.seed_everything(seed, workers=True, verbose=False)
            started = time.perf_counter()
            model = pretrain(config, data, folder, precision)
            with atomic_folder(folder / "model") as temporary:
                model.save_pretrained(temporary)
            facts["seconds"] = time.perf_counter() - started
            write_json(folder / "provenance.json", provenance(precision, data.scene.hashes) | facts)
    return folder / "model"


@torch.no_grad()
def _settle_decoder(task: MaskedPretraining, image: Tensor) -> None:
    """Gives the decoder its weights, whose number its first input tells, before processes share them."""
    task.decoder(task.model.eval().forward_features(image))
    task.model.train()


def _make_task(config: DictConfig, data: SceneDataModule, model: nn.Module) -> SceneClassification:
    counts = data.training_counts()
    options: dict[str, Any] = {"model": model, "class_counts": counts.tolist()}
    if config.regime == "adapt":
        adapter = adapter_options(config)
        options |= {"cycles": None if adapter.cycles is None else asdict(adapter.cycles)}
        options |= {"rate_ratio": adapter.rate_ratio, "learning_rate": adapter.learning_rate}
    task: SceneClassification = instantiate(config.task, **options)
    return task


def make_trainer(config: DictConfig, precision: str, callbacks: Sequence[Callback], **changes: Any) -> L.Trainer:
    """Returns the configured Trainer, with a progress bar; without callbacks, without checkpoints."""
    # `deterministic` would also write NaN into all new memory: for who reads what was never written, 5 to 9 % of a step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    compilation = [Compilation()] if config.compile else []
    trainer: L.Trainer = instantiate(
        config.trainer,
        precision=precision,
        callbacks=[*callbacks, *compilation, Resumption(), LossWatch(), RichProgressBar(leave=False)],
        plugins=[WholeFiles()],
        logger=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        num_sanity_val_steps=0,
        **changes,
    )
    return trainer


def fit(trainer: L.Trainer, task: L.LightningModule, data: Any, ckpt_path: str | None) -> None:
    """Trains, or goes on from a checkpoint; raises the KeyboardInterrupt that Lightning would end quietly at."""
    trainer.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
