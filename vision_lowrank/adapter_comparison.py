"""One adapter method, full fine-tuning or a linear probe on one seed of the comparison: base, size, rates, scores.

runs/NAME/base-DIGEST/         the pretrained base that all methods and seeds share
runs/NAME/METHOD-seed0/        a run as of any scene, its `metrics.json` written last
runs/NAME/METHOD-seed0/trials/ a folder a learning rate; `trial.json` marks it as finished

The same command goes on where it was stopped: what is finished is not done again. `adapter_report` makes the table.
"""

import copy
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from vision_lowrank.adapter_budget import size_for_budget
from vision_lowrank.adapters.diagnostics import layer_intruders
from vision_lowrank.data.modules import SceneDataModule
from vision_lowrank.errors import AdapterError, ConfigError, TrainingError
from vision_lowrank.evaluation.tables import RunResult, read_result
from vision_lowrank.fitting import (
    build,
    load_base,
    rehearse,
    restore_network,
    shared_base,
    train_network,
    training_batches,
)
from vision_lowrank.instantiate import instantiate
from vision_lowrank.memory import step_bytes
from vision_lowrank.precision import choose_precision
from vision_lowrank.runs import atomic_path, provenance, write_json
from vision_lowrank.scene_run import evaluate_map

logger = logging.getLogger(__name__)


def run_comparison(config: DictConfig) -> tuple[Path, list[RunResult]]:
    """Trains once a learning rate, keeps the best on the validation pixels, and only then looks at the test pixels.

    Args:
        config: with `comparison`: `budget` (parameters of an adapter, the head not counted), `tolerance` (see
            `adapter_budget.size_for_budget`), `learning_rates`, and `pretraining_seed`. Full fine-tuning and probe have
            no budget.

    Returns:
        The run folder, and its result.

    Raises:
        VisionLowRankError: anything that the user can mend; what can be checked before work starts is.
    """
    rates = _check(config)
    label = config.adapter.name if config.regime == "adapt" else config.regime
    root = Path(config.runs_root) / config.name
    folder = root / f"{label}-seed{config.seed}"
    precision = choose_precision(config.trainer.precision, config.trainer.accelerator)
    data: SceneDataModule = instantiate(config.data)
    data.prepare_data()
    data.setup()
    _check_folder(folder, config)
    if (folder / "metrics.json").exists():
        logger.info("%s is finished", folder)
        return folder, [read_result(folder)]
    sized, facts = _sized(config, data) if config.regime == "adapt" else (config, {})
    with atomic_path(folder / "config.yaml") as temporary:
        OmegaConf.save(config, temporary, resolve=True)
    write_json(folder / "provenance.json", provenance(precision, data.scene.hashes))
    data.split.save(folder / "split.npz")
    base = _base(config, data, root, precision)
    config = DictConfig(OmegaConf.merge(sized, {"base": str(base)}))
    trials = {rate: _trial(_at(config, rate), rate, data, _place(folder, rate), precision) for rate in rates}
    scores = {rate: trial["validation_oa"] for rate, trial in trials.items() if trial["validation_oa"] is not None}
    if not scores:
        raise TrainingError(f"{label}: training diverged at each of the rates {rates}; lower comparison.learning_rates")
    best = max(scores, key=lambda rate: scores[rate])
    logger.info("%s, seed %d: learning rate %g, by the validation pixels", label, config.seed, best)
    facts |= {"learning_rate": best, "learning_rates": rates, "seconds": sum(one["seconds"] for one in trials.values())}
    facts |= trials[best]["facts"]
    facts["transductive"] = bool(np.isin(data.split.test, data.pretraining_pixels()).any())
    chosen = _at(config, best)
    trained = restore_network(chosen, data, _place(folder, best))
    probabilities = trained.predict(data, precision)[""]
    facts["intruders"] = mean_intruders(load_base(chosen, data, base), trained.task.model, config.adapter.targets)
    facts["step_megabytes"] = step_bytes(trained.task, next(iter(data.train_dataloader())), precision) / 1e6
    for rate in rates:
        if rate != best:
            for part in ("checkpoints", "model", "adapter"):
                shutil.rmtree(_place(folder, rate) / part, ignore_errors=True)
    return folder, evaluate_map(config, data, folder, str(label), probabilities, facts)


def mean_intruders(before: Any, after: Any, targets: Any) -> float | None:
    """Returns the intruder dimensions among the ten first singular vectors of a layer, the mean over the layers.

    Args:
        before: the base, without adapters.
        after: what training made of it, with our adapters, peft's, or none.
        targets: layers, see `adapters.inject`.

    Returns:
        None where an adapter depends on the input, so that it has no weight.
    """
    if hasattr(after, "merge_and_unload"):
        after = copy.deepcopy(after).merge_and_unload()
    try:
        found = layer_intruders(before, after, list(targets))
    except AdapterError:
        return None
    return sum(layer.count for layer in found.values()) / len(found)


def _check(config: DictConfig) -> list[float]:
    """Returns the learning rates, smallest first, after a look at what would fail later."""
    rates = sorted(config.comparison.learning_rates)
    if not rates or len(set(rates)) < len(rates) or not all(0 < rate < math.inf for rate in rates):
        raise ConfigError(f"comparison.learning_rates={rates}: give at least one, positive, none twice")
    if config.trainer.devices != 1 or config.ckpt_path is not None:
        raise ConfigError(
            "a comparison runs on one device, and goes on by itself: leave out trainer.devices and ckpt_path"
        )
    if config.compile:
        raise ConfigError("the stem of a comparison looks patches up, which cannot be compiled: leave out compile")
    if config.base is not None:
        raise ConfigError("a comparison pretrains its own base, with the scaling that belongs to it: leave out base")
    return rates


def _check_folder(folder: Path, config: DictConfig) -> None:
    """Refuses a folder of a run with another configuration."""
    if not (folder / "config.yaml").exists():
        return
    before: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    now: Any = OmegaConf.to_container(config, resolve=True)
    if changed := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
        raise ConfigError(f"{folder}: begun with another {', '.join(changed)}; give the same, or another name=")


def _base(config: DictConfig, data: SceneDataModule, root: Path, precision: str) -> Path:
    """Returns the folder of the base's weights, pretrained by the first run that asks."""
    recipe: Any = OmegaConf.to_container(config, resolve=True)
    for key in ("root", "batch_size", "evaluation_batch_size", "num_workers", "seed", "split"):
        del recipe["data"][key]
    needed = {key: recipe[key] for key in ("data", "model", "pretraining")}
    needed |= {"seed": config.comparison.pretraining_seed, "batch_size": config.data.batch_size, "precision": precision}
    needed |= {"limit": config.trainer.limit_train_batches}
    digest = hashlib.sha256(json.dumps(needed, sort_keys=True).encode()).hexdigest()[:8]
    return shared_base(config, data, root / f"base-{digest}", needed["seed"], precision, recipe=needed)


def _sized(config: DictConfig, data: SceneDataModule) -> tuple[DictConfig, dict[str, Any]]:
    """Returns the configuration with the adapter's size for the budget, tried out, and facts about it."""
    wanted, adapter = config.comparison, config.adapter
    settings: Any = OmegaConf.to_container(adapter.method, resolve=True)
    with torch.random.fork_rng():
        changed, count = size_for_budget(
            *(build(config, data), settings, adapter.size, list(adapter.targets), wanted.budget, wanted.tolerance),
            lambda: training_batches(config, data),
        )
    # only what is new, since the rest may depend on the learning rate
    changed = {key: value for key, value in changed.items() if value != settings[key]}
    sized = DictConfig(OmegaConf.merge(config, {"adapter": {"method": changed}}))
    rehearse(sized, data)
    size = sized.adapter.method[adapter.size]
    logger.info("%s: %d parameters with %s %d", adapter.name, count, adapter.size, size)
    return sized, {"budget": wanted.budget, "adapter_parameters": count, "size": size}


def _at(config: DictConfig, rate: float) -> DictConfig:
    """Returns the configuration of a learning rate, whatever the regime."""
    return DictConfig(OmegaConf.merge(config, {"task": {"learning_rate": rate}, "adapter": {"learning_rate": rate}}))


def _place(folder: Path, rate: float) -> Path:
    return folder / "trials" / f"{rate!r}"


def _trial(config: DictConfig, rate: float, data: SceneDataModule, folder: Path, precision: str) -> Mapping[str, Any]:
    """Trains at a rate, or reads how that ended: validation accuracy (None where it diverged), seconds, facts."""
    finished = folder / "trial.json"
    if finished.exists():
        content: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
        return content
    L.seed_everything(config.seed, workers=True, verbose=False)
    started = time.perf_counter()
    try:
        trained = train_network(config, data, folder, None, precision)
    except TrainingError as error:
        logger.warning("learning rate %g is out: %s", rate, error)
        content = {"validation_oa": None, "facts": {}}
    else:
        assert trained is not None  # one device has no other ranks
        content = {"validation_oa": trained.facts["validation_oa"], "facts": trained.facts}
        logger.info("learning rate %g: validation accuracy %.4f", rate, content["validation_oa"])
    content["seconds"] = time.perf_counter() - started
    (folder / "checkpoints" / "last.ckpt").unlink(missing_ok=True)
    write_json(finished, content)
    return content
