"""What `train.py` does: one run a seed, and the table over all runs."""

import logging
import math
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from vision_lowrank.adapter_comparison import run_comparison
from vision_lowrank.data.cards import load_card
from vision_lowrank.errors import ConfigError
from vision_lowrank.evaluation.tables import RunResult, console_table, markdown_table
from vision_lowrank.pretraining_run import report_pretraining, run_pretraining
from vision_lowrank.runs import atomic_path, check_command, checked_seeds, process_rank
from vision_lowrank.scene_run import run_scene
from vision_lowrank.sprite_classifier_run import run_classifier
from vision_lowrank.tasks.masked_pretraining import HyperMAEPretraining
from vision_lowrank.text_to_image_run import run_text_to_image

logger = logging.getLogger(__name__)

KEYS = (
    *("name", "runs_root", "seed", "seeds", "regime", "base", "baselines", "ckpt_path", "patience", "random_walk"),
    *("comparison", "compile", "data", "model", "adapter", "pretraining", "task", "trainer", "samples", "concept"),
)
# `trainer.strategy` of trainer=fsdp
SHARDED = {"_target_": "vision_lowrank.sharding.ShardedStrategy"}
# what learns from sprites, by the task
SPRITE_RUNS: dict[str, Callable[[DictConfig], Path]] = {
    "vision_lowrank.tasks.text_to_image.TextToImage": run_text_to_image,
    "vision_lowrank.tasks.sprite_classification.SpriteClassification": run_classifier,
}


def train(config: DictConfig) -> list[RunResult]:
    """Runs an experiment for its seed, or for each of its `seeds`, and prints the table.

    A scene is classified, or, with the task `HyperMAEPretraining`, a model is pretrained on tiles, or, with a task in
    `SPRITE_RUNS`, something is learned from sprites.

    Args:
        config: as composed from `configs/train.yaml`.

    Returns:
        The results of the model and of the baselines, a run after the other; empty otherwise.

    Raises:
        VisionLowRankError: anything that the user can mend; what can be checked before work starts is.
    """
    if unknown := [str(key) for key in config if key not in KEYS]:
        raise ConfigError(f"unknown key {', '.join(unknown)} in the experiment; keys: {', '.join(KEYS)}")
    check_command(
        config,
        base=str | None,
        ckpt_path=str | None,
        compile=bool,
        baselines=Mapping[str, Mapping[str, Any] | None] | None,
    )
    if config.regime not in ("full", "probe", "adapt"):
        raise ConfigError(f"regime={config.regime!r}: it can be full, probe or adapt")
    _check_lengths(config)
    seeds = checked_seeds([config.seed] if config.seeds is None else config.seeds)
    if len(seeds) > 1 and (config.ckpt_path is not None or config.trainer.devices != 1):
        raise ConfigError("several seeds in one command go with one device and without ckpt_path; run them one by one")
    if config.trainer.accelerator not in ("cpu", "auto") and not torch.accelerator.is_available():
        raise ConfigError(f"trainer.accelerator={config.trainer.accelerator}: PyTorch sees none here; use trainer=cpu")
    pretraining = config.task._target_.endswith(f".{HyperMAEPretraining.__name__}")
    if config.trainer.strategy == SHARDED and not pretraining:
        raise ConfigError("trainer=fsdp shares out the weights of Hyper-MAE only; use trainer=ddp for this task")
    if config.task._target_ in SPRITE_RUNS:
        for seed in seeds:
            folder = SPRITE_RUNS[config.task._target_](
                DictConfig(OmegaConf.merge(config, {"seed": seed, "seeds": None}))
            )
            logger.info("written to %s", folder)
        return []
    results: list[RunResult] = []
    errors: list[dict[str, dict[str, float]]] = []
    for seed in seeds:
        one = DictConfig(OmegaConf.merge(config, {"seed": seed, "seeds": None}))
        if pretraining:
            folder, measured = run_pretraining(one)
            errors.append(measured)
        else:
            folder, found = run_scene(one) if config.comparison is None else run_comparison(one)
            results += found
    if process_rank() > 0:
        return results
    if len(seeds) > 1:
        folder = folder.parent / f"{datetime.now():%Y%m%d-%H%M%S}-table"
    if pretraining:
        title = f"{config.name}, held-out tiles, seed {', '.join(map(str, seeds))}"
        table = f"{title}\n\n{report_pretraining(errors, title)}"
    else:
        table = _report(results, config)
    with atomic_path(folder / "table.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    logger.info("written to %s", folder)
    return results


def _check_lengths(config: DictConfig) -> None:
    """Raises ConfigError for lengths of training that are none."""
    for key in ("trainer.max_epochs", "pretraining.epochs", "patience"):
        value = OmegaConf.select(config, key)
        if type(value) is not int or value < 1:
            raise ConfigError(f"{key}={value}: give a whole number from 1 up")
    limit = config.trainer.limit_train_batches
    if type(limit) not in (int, float) or limit <= 0 or (type(limit) is float and not limit <= 1):
        raise ConfigError(
            f"trainer.limit_train_batches={limit}: give a number of batches, or a share above 0, up to 1.0"
        )
    clip = config.trainer.gradient_clip_val
    if clip is not None and (type(clip) not in (int, float) or not 0 <= clip < math.inf):
        raise ConfigError(f"trainer.gradient_clip_val={clip}: give a number from 0 up, or null")


def _report(results: list[RunResult], config: DictConfig) -> str:
    """Prints the table of a scene and returns it as Markdown under its title."""
    reference = next((result.method for result in results if result.method in (config.baselines or ())), None)
    seeds = sorted({result.seed for result in results})
    scene, kind = load_card(config.data.card).title, config.data.split.kind
    title = f"{scene}, {kind} split, test pixels, seed {', '.join(map(str, seeds))}"
    # wider than a narrow terminal rather than numbers broken into lines
    Console(width=max(Console().width, 110)).print(console_table(results, title, reference))
    return f"{title}\n\n{markdown_table(results, reference)}"
