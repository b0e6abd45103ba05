"""One run of text-to-image training on sprites: the base, or a LoRA with its two words on a held-out sprite."""

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn

from vision_lowrank.argument_types import check_least
from vision_lowrank.checkpoints import checkpoints, read_checkpoint
from vision_lowrank.data.sprite_modules import to_tensor
from vision_lowrank.data.sprites import (
    BACKGROUNDS,
    BASE,
    HELD_OUT,
    SHEET,
    concept_tokens,
    concept_words,
    vocabulary,
    with_article,
)
from vision_lowrank.errors import ConfigError
from vision_lowrank.fitting import fit, make_trainer
from vision_lowrank.instantiate import instantiate
from vision_lowrank.models.sprite_classifier import SpriteClassifier
from vision_lowrank.plots.curves import save_curves
from vision_lowrank.precision import choose_precision
from vision_lowrank.records import make_record
from vision_lowrank.runs import (
    atomic_folder,
    atomic_path,
    note_resumption,
    process_rank,
    resumed_run,
    start_run,
    write_csv,
    write_json,
)
from vision_lowrank.shipped import PACKAGE
from vision_lowrank.sprite_classifier_run import load_classifier
from vision_lowrank.tasks.text_to_image import TextToImage

logger = logging.getLogger(__name__)

COLUMNS = 8
# the world of sprites that comes with the project: pipeline, loras/CONCEPT.safetensors, classifier
WORLD = PACKAGE / "assets" / "sprites"


@dataclass(frozen=True)
class SpriteAdapter:
    """The section `adapter`, see configs/adapter/sprite_lora.yaml: what makes the method, and each network's layers."""

    method: dict[str, Any]
    unet: tuple[str, ...]
    text_encoder: tuple[str, ...]


@dataclass(frozen=True)
class SampleOptions:
    """The section `samples`, see configs/experiment/sprites_base.yaml."""

    every: int
    classifier: str | None
    each: int
    prompts: tuple[str, ...]

    def __post_init__(self) -> None:
        check_least(1, **{"samples.every": self.every, "samples.each": self.each})
        if not self.prompts:
            raise ConfigError("samples.prompts is empty; give at least one")


class Samples(Callback):
    """Tells the loss of each epoch and, every few epochs, draws what the prompts give.

    Args:
        folder: run folder; gets `samples/`.
        prompts: one picture each.
        every: epochs from picture to picture.
    """

    def __init__(self, folder: Path, prompts: Sequence[str], every: int) -> None:
        self.folder = folder
        self.prompts = prompts
        self.every = every
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tells the loss, and draws if it is time."""
        task: Any = pl_module
        epoch, step = trainer.current_epoch + 1, trainer.global_step
        seconds = (time.perf_counter() - self.started) / trainer.num_training_batches
        loss = float(trainer.callback_metrics["train/loss"])
        logger.info("epoch %d of %s, step %d, loss %.4f, %.2f s a step", epoch, trainer.max_epochs, step, loss, seconds)
        if epoch % self.every == 0 and process_rank() == 0:
            pictures = sample(task.averaged_pipeline(), self.prompts, trainer.precision)
            save_grid(self.folder / "samples" / f"step{step:06d}.png", pictures)
        self.started = time.perf_counter()


def sample(pipeline: Any, prompts: Sequence[str], precision: str, seed: int = 0) -> np.ndarray:
    """Returns one image a prompt, uint8 (prompts, height, width, 3); torch's global generator is left as it was."""
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    device = pipeline.unet.device.type
    with torch.autocast(device, torch.bfloat16, enabled="bf16" in str(precision)):
        images = pipeline(
            list(prompts), num_inference_steps=20, guidance_scale=4.0, generator=generators, output_type="np"
        ).images
    return np.rint(255 * np.asarray(images)).clip(0, 255).astype(np.uint8)


def save_grid(path: Path, images: np.ndarray, scale: int = 2) -> None:
    """Writes images (count, height, width, 3) side by side, enlarged."""
    count, height, width, _ = images.shape
    rows = -(-count // COLUMNS)
    grid = np.zeros((rows * COLUMNS, height, width, 3), np.uint8)
    grid[:count] = images
    grid = grid.reshape(rows, COLUMNS, height, width, 3).transpose(0, 2, 1, 3, 4).reshape(rows * height, -1, 3)
    with atomic_path(path) as temporary:
        Image.fromarray(grid).resize((scale * grid.shape[1], scale * grid.shape[0]), Image.Resampling.NEAREST).save(
            temporary
        )


def run_text_to_image(config: DictConfig) -> Path:
    """Trains a pipeline on sprites, or with `concept` a LoRA on the pipeline `base`, and leaves a run folder.

    The folder holds `pipeline/` or `lora.safetensors` in half precision, `samples/`, `history.csv`, `curves.png`,
    `checkpoints/` and, written last, `metrics.json`.

    Raises:
        VisionLowRankError: anything that the user can mend; what can be checked before work starts is.
    """
    L.seed_everything(config.seed, workers=True, verbose=False)
    section: Any = OmegaConf.to_container(config, resolve=True)
    samples = make_record(SampleOptions, section["samples"], "samples", ConfigError)
    precision = choose_precision(config.trainer.precision, config.trainer.accelerator)
    if config.ckpt_path is not None:
        read_checkpoint(config.ckpt_path, "min_snr")
    classifier = None if samples.classifier is None else load_classifier(samples.classifier)
    data: L.LightningDataModule = instantiate(config.data)
    concept = config.get("concept")
    pipeline = _build(config) if concept is None else _prepare(config, concept)
    if not torch.cuda.is_available():
        arrange_for_cpu(pipeline.unet)
    task: TextToImage = instantiate(config.task, pipeline=pipeline)
    if config.ckpt_path is None:
        folder = start_run(config, precision, {SHEET.name: hashlib.sha256(SHEET.read_bytes()).hexdigest()})
    else:
        folder = resumed_run(config)
    seconds = _fit(config, samples, task, data, folder, precision)
    if process_rank() > 0:
        return folder
    note_resumption(config, folder)
    result = task.averaged_pipeline()
    asked = {name: with_article(name) for name in BASE}
    if concept is not None:
        from vision_lowrank.composer.concept import taught
        from vision_lowrank.composer.lora_files import write_lora

        write_lora(taught(pipeline, concept_tokens(concept)), folder / "lora.safetensors")
        asked = {concept: concept_words(concept)}
    recognised = None
    if classifier is not None:
        recognised = recognise(result, classifier, asked, samples.each, precision)
        logger.info("recognised: %s", ", ".join(f"{name} {share:.2f}" for name, share in recognised.items()))
    if concept is None:
        # last, since it changes the networks' precision
        result.unet.to(memory_format=torch.contiguous_format)  # safetensors writes no other
        with atomic_folder(folder / "pipeline") as temporary:
            result.to(torch.float16).save_pretrained(temporary)
    _finish(folder, task, seconds, {"seed": config.seed, "concept": concept, "recognised": recognised})
    return folder


def arrange_for_cpu(unet: Any) -> None:
    """Has a UNet of diffusers compute the same in the forms that are fast on CPUs, forwards and backwards.

    Convolutions run channels last whatever they are given, and else copy to it and back; group normalisation is up to
    ten times slower so, and is given a copy. Fused attention takes longer backwards than the plain one.
    """
    from diffusers.models.attention_processor import AttnProcessor

    unet.set_attn_processor(AttnProcessor())
    unet.to(memory_format=torch.channels_last)
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(_channels_first)
            module.register_forward_hook(_channels_last)


def _channels_first(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0].contiguous(),)


def _channels_last(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    # the norm inside attention gets (batch, channels, positions)
    return output.contiguous(memory_format=torch.channels_last) if output.ndim == 4 else output


def recognise(
    pipeline: Any,
    classifier: SpriteClassifier,
    asked: Mapping[str, str],
    each: int,
    precision: str,
) -> dict[str, float]:
    """Returns in what share of samples the surest sprite that the classifier finds is the one that was asked for.

    Args:
        pipeline: to judge.
        classifier: finds sprites in samples.
        asked: beginnings of prompts, such as "a dog", by the sprite meant; a background follows, each in its turn.
        each: samples of each.
        precision: Lightning's precision string.
    """
    backgrounds = list(BACKGROUNDS.values())
    shares = {}
    for number, (name, words) in enumerate(asked.items()):
        prompts = [f"{words} {backgrounds[index % len(backgrounds)]}" for index in range(each)]
        images = sample(pipeline, prompts, precision, seed=1000 * number)
        found = [classifier.locate(to_tensor(image)) for image in images]
        shares[name] = sum(bool(sprites) and sprites[0].name == name for sprites in found) / each
    return shares


def _build(config: DictConfig) -> Any:
    """Returns a pipeline to train as a whole: a new one, or `base`."""
    if config.base is None:
        pipeline = instantiate(config.model, words=vocabulary())
    else:
        from vision_lowrank.composer.render import load_base

        pipeline = load_base(str(config.base))
    pipeline.unet.train()
    pipeline.text_encoder.train()
    return pipeline


def _prepare(config: DictConfig, concept: str) -> Any:
    """Returns the base with what is to learn the concept."""
    from vision_lowrank.composer.concept import teach
    from vision_lowrank.composer.render import load_base

    section: Any = OmegaConf.to_container(config.adapter, resolve=True)
    adapter = make_record(SpriteAdapter, section, "adapter", ConfigError)
    pipeline = load_base(str(config.base or WORLD / "pipeline"))
    targets = {"unet": adapter.unet, "text_encoder": adapter.text_encoder}
    teach(pipeline, concept_tokens(concept), HELD_OUT[concept], instantiate(adapter.method), **targets)
    return pipeline


def _fit(
    config: DictConfig,
    samples: SampleOptions,
    task: TextToImage,
    data: L.LightningDataModule,
    folder: Path,
    precision: str,
) -> float:
    """Trains, or goes on with training, and returns the seconds it took."""
    # the best too: weights that training spoils can be had back
    kept = checkpoints(folder, "train/loss", "min")
    trainer = make_trainer(
        config, precision, [Samples(folder, samples.prompts, samples.every), *kept],
        reload_dataloaders_every_n_epochs=1,
    )  # fmt: skip
    started = time.perf_counter()
    fit(trainer, task, data, config.ckpt_path)
    return time.perf_counter() - started


def _finish(folder: Path, task: TextToImage, seconds: float, facts: Mapping[str, Any]) -> None:
    """Writes curves and `metrics.json`."""
    epochs = [row["epoch"] for row in task.history]
    curves = {
        name: {"training": (epochs, [row[name] for row in task.history])} for name in ("train/loss", "learning rate")
    }
    save_curves(folder / "curves.png", curves)
    write_csv(folder / "history.csv", task.history)
    parameters = {
        name: sum(parameter.numel() for parameter in network.parameters()) for name, network in task.networks.items()
    }
    trained = sum(parameter.numel() for parameter in task.networks.parameters() if parameter.requires_grad)
    reached = {"loss": task.history[-1]["train/loss"], "steps": task.history[-1]["step"], "seconds": seconds}
    write_json(folder / "metrics.json", {**facts, **reached, "parameters": parameters, "trained": trained})
