"""One run on a scene: split, model and baselines, scores, and everything that stays in the run folder."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from omegaconf import DictConfig
from safetensors.numpy import save_file

from vision_lowrank.baselines import fit_baseline, is_baseline
from vision_lowrank.data.modules import SceneDataModule
from vision_lowrank.data.scene import IGNORE
from vision_lowrank.data.splits import Split
from vision_lowrank.errors import CheckpointError
from vision_lowrank.evaluation.metrics import score
from vision_lowrank.evaluation.tables import RunResult, write_metrics
from vision_lowrank.fitting import fit_network, make_trainer, rehearse, resumed_stage
from vision_lowrank.instantiate import instantiate
from vision_lowrank.precision import choose_precision
from vision_lowrank.random_walk import random_walk, read_walk
from vision_lowrank.reporting import save_scene_pictures
from vision_lowrank.runs import atomic_path, note_resumption, process_rank, resumed_run, start_run

logger = logging.getLogger(__name__)


def run_scene(config: DictConfig) -> tuple[Path, list[RunResult]]:
    """Fits baselines and model to one split of a scene, scores them and leaves a run folder.

    The folder's `metrics.json` is written last: without it the run is unfinished.

    Returns:
        The folder, and the results in the order of the table.

    Raises:
        VisionLowRankError: see `training.train`.
    """
    begun = time.perf_counter()
    L.seed_everything(config.seed, workers=True, verbose=False)
    precision = choose_precision(config.trainer.precision, config.trainer.accelerator)
    if config.get("random_walk") is not None:
        # what is wrong with it is told now, not after the training
        read_walk(config.random_walk)
    resumed = resumed_stage(config)
    data: SceneDataModule = instantiate(config.data)
    data.prepare_data()
    data.setup()
    if not is_baseline(config.model) and resumed != "training":
        # what does not fit is told before baselines and pretraining
        rehearse(config, data)
        make_trainer(config, precision, ())
    folder = _open_folder(config, data, precision)
    results: list[RunResult] = []
    if process_rank() == 0:
        for name, node in (config.baselines or {}).items():
            if node is not None and node != config.model:
                started = time.perf_counter()
                probabilities, facts = fit_baseline(node, data)
                facts |= {"seconds": time.perf_counter() - started}
                results += evaluate_map(config, data, folder / "baselines" / name, str(name), probabilities, facts)
    if is_baseline(config.model):
        name = config.model._target_.rpartition(".")[2]
        probabilities, facts = fit_baseline(config.model, data)
        predictions = {"": probabilities}
    else:
        name = f"{config.model._target_.rpartition('.')[2]} {config.regime}"
        predictions, facts = fit_network(config, data, folder, resumed, precision)
        if process_rank() == 0:
            note_resumption(config, folder)
    facts |= {"seconds": time.perf_counter() - begun}
    rows: list[RunResult] = []
    # the run's own folder last: its scores mark it as finished
    for part, probabilities in sorted(predictions.items(), reverse=True):
        place, title = (folder / "other_bands" / part, f"{name}, {part}") if part else (folder, name)
        rows = evaluate_map(config, data, place, title, probabilities, facts) + rows
    return folder, results + rows


def _open_folder(config: DictConfig, data: SceneDataModule, precision: str) -> Path:
    """Returns the folder of a new or a resumed run after writing what is known before the work."""
    if config.ckpt_path is not None:
        folder = Path(config.ckpt_path).resolve().parents[1]
        if Split.load(folder / "split.npz").digest() != data.split.digest():
            raise CheckpointError(f"{config.ckpt_path}: trained on another split; resume with that run's configuration")
        return resumed_run(config)
    folder = start_run(config, precision, data.scene.hashes)
    if process_rank() > 0:
        return folder
    data.split.save(folder / "split.npz")
    with atomic_path(folder / "preprocessing.safetensors") as temporary:
        save_file(data.preprocessor.state(), temporary)
    return folder


def spread(probabilities: np.ndarray, data: SceneDataModule, settings: Mapping[str, Any]) -> np.ndarray:
    """Lets a walk go over the scene from the labels of its training pixels, see `random_walk.random_walk`.

    Args:
        probabilities: (height * width, classes).
        data: after `setup`.
        settings: as for `read_walk`.
    """
    seeds = np.full(data.split.shape, IGNORE)
    seeds.flat[data.split.train] = data.scene.labels.flat[data.split.train]
    return random_walk(probabilities, data.scaled_image(), seeds, read_walk(settings), data.scene.valid)


def evaluate_map(
    config: DictConfig,
    data: SceneDataModule,
    folder: Path,
    name: str,
    probabilities: np.ndarray,
    facts: Mapping[str, Any],
) -> list[RunResult]:
    """Writes map, pictures and scores of a method, and of its random walk where that is asked for.

    Args:
        config: the whole configuration.
        data: after `setup`.
        folder: of the method.
        name: of the method.
        probabilities: (height * width, classes).
        facts: for `metrics.json`.
    """
    maps = {(folder, name): (probabilities, facts)}
    if config.get("random_walk") is not None:
        walked = spread(probabilities, data, config.random_walk)
        # the run's own folder last: its scores mark it as finished
        extra = {(folder / "random_walk", f"{name} + random walk"): (walked, {**facts, "transductive": True})}
        maps = extra | maps
    results = []
    for (place, title), (values, known) in maps.items():
        predicted = values.argmax(axis=1).astype(np.uint8).reshape(data.split.shape)
        predicted[~data.scene.valid] = IGNORE
        scores = {
            subset: score(predicted.flat[pixels], data.scene.labels.flat[pixels], data.num_classes)
            for subset, pixels in data.split.subsets().items()
        }
        leakage = data.split.leakage(data.patch_size)
        result = RunResult(title, config.seed, data.split.digest(), leakage, scores, known)
        save_scene_pictures(place, data.scene, predicted, scores["test"].confusion)
        write_metrics(place, result, [item.name for item in data.scene.classes])
        results.append(result)
    return results[::-1]
