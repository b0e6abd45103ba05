"""What `train.py` does: one run a seed, and the table over all runs."""

import logging
from datetime import datetime
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from vision_lowrank.data.cards import load_card
from vision_lowrank.errors import ConfigError
from vision_lowrank.evaluation.tables import RunResult, console_table, markdown_table
from vision_lowrank.runs import atomic_path, process_rank
from vision_lowrank.scene_run import run_scene

logger = logging.getLogger(__name__)

KEYS = (
    *("name", "runs_root", "seed", "seeds", "regime", "base", "baselines", "ckpt_path", "patience", "random_walk"),
    *("data", "model", "adapter", "pretraining", "task", "trainer"),
)


def train(config: DictConfig) -> list[RunResult]:
    """Runs an experiment for its seed, or for each of its `seeds`, and prints the table.

    Args:
        config: as composed from `configs/train.yaml`.

    Returns:
        The results of the model and of the baselines, a run after the other.

    Raises:
        VisionLowRankError: anything that the user can mend; what can be checked before work starts is.
    """
    if unknown := [str(key) for key in config if key not in KEYS]:
        raise ConfigError(f"unknown key {', '.join(unknown)} in the experiment; keys: {', '.join(KEYS)}")
    if config.regime not in ("full", "adapt"):
        raise ConfigError(f"regime={config.regime!r}: it can be full or adapt")
    seeds = [config.seed] if config.seeds is None else list(config.seeds)
    if len(seeds) > 1 and (config.ckpt_path is not None or config.trainer.devices != 1):
        raise ConfigError("several seeds in one command go with one device and without ckpt_path; run them one by one")
    if config.trainer.accelerator not in ("cpu", "auto") and not torch.accelerator.is_available():
        raise ConfigError(f"trainer.accelerator={config.trainer.accelerator}: PyTorch sees none here; use trainer=cpu")
    results: list[RunResult] = []
    for seed in seeds:
        one = DictConfig(OmegaConf.merge(config, {"seed": seed, "seeds": None}))
        folder, found = run_scene(one)
        results += found
    if process_rank() == 0:
        _report(results, config, folder if len(seeds) == 1 else folder.parent / f"{datetime.now():%Y%m%d-%H%M%S}-table")
    return results


def _report(results: list[RunResult], config: DictConfig, folder: Path) -> None:
    """Prints the table and writes it as `table.md` into `folder`."""
    reference = next((result.method for result in results if result.method in (config.baselines or ())), None)
    seeds = sorted({result.seed for result in results})
    scene, kind = load_card(config.data.card).title, config.data.split.kind
    title = f"{scene}, {kind} split, test pixels, seed {', '.join(map(str, seeds))}"
    # wider than a narrow terminal rather than numbers broken into lines
    Console(width=max(Console().width, 110)).print(console_table(results, title, reference))
    with atomic_path(folder / "table.md") as temporary:
        temporary.write_text(f"{title}\n\n{markdown_table(results, reference)}", encoding="utf-8")
    logger.info("written to %s", folder)
