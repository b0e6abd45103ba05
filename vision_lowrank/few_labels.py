"""Accuracy over the number of labels: methods on the same divisions of a scene, with few labels and with more.

runs/NAME/METHOD.json                  what a method is, the same in all its runs
runs/NAME/bases/KIND-seed0/model/      what adapters share in a division: a base pretrained without labels
runs/NAME/KIND-LABELS-seed0/METHOD/    one run: `split.npz`, `provenance.json`, `prediction.npy` (the map, uint8 class
                                       indices), `random_walk/` with another map and scores, last `metrics.json`
runs/NAME/table.md table.csv curve.png over all runs that are there, see `few_labels_report`

The same command goes on where it was stopped, and one with other methods, labels or seeds adds to the same table.
"""

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from omegaconf import DictConfig, OmegaConf

from vision_lowrank.baselines import fit_baseline, is_baseline
from vision_lowrank.data.few_labels import keep_labels
from vision_lowrank.data.modules import SceneDataModule
from vision_lowrank.data.splits import Split
from vision_lowrank.errors import ConfigError
from vision_lowrank.evaluation.metrics import score
from vision_lowrank.evaluation.tables import RunResult, read_result, write_metrics
from vision_lowrank.few_labels_options import WALKED, check_options
from vision_lowrank.few_labels_report import report
from vision_lowrank.fitting import shared_base, train_network
from vision_lowrank.instantiate import instantiate
from vision_lowrank.precision import choose_device, choose_precision
from vision_lowrank.runs import atomic_path, provenance, write_json
from vision_lowrank.scene_run import spread

logger = logging.getLogger(__name__)

# by how much the first of several voters outweighs another
FIRST = 1e-3


@dataclass(frozen=True)
class Run:
    """One run: a seed, which draws division, labels and weights, a kind of split, what training keeps, and a method."""

    seed: int
    kind: str
    labels: float | int
    method: str

    def folder(self, root: Path) -> Path:
        """Returns where it leaves its files."""
        return root / f"{self.kind}-{self.labels:g}-seed{self.seed}" / self.method


def run_few_labels(config: DictConfig) -> Path:
    """Does the runs that are not there yet, seed after seed, and writes table and curve after each division.

    Args:
        config: as composed with `configs/benchmark/few_labels.yaml`; `methods`, `kinds`, `labels` and `seeds` choose.

    Returns:
        The folder with the table.

    Raises:
        VisionLowRankError: anything that the user can mend; options are checked before work starts.
    """
    check_options(config)
    root = Path(config.runs_root) / config.name
    _keep_settings(config, root)
    runs = [
        Run(seed, kind, labels, method)
        for seed in config.seeds
        for kind in config.kinds
        for labels in config.labels
        for method in config.methods
    ]
    missing = [run for run in runs if not (run.folder(root) / "metrics.json").exists()]
    logger.info("%d runs, %d of them finished before", len(runs), len(runs) - len(missing))
    began, done = time.perf_counter(), 0
    for (seed, kind), group in groupby(missing, key=lambda run: (run.seed, run.kind)):
        division = Division(config, seed, kind, root)
        for run in group:
            result = division.measure(run)
            done += 1
            left = (time.perf_counter() - began) / done * (len(missing) - done) / 60
            told = (done, len(missing), kind, run.labels, seed, run.method, 100 * result.scores["test"].oa)
            logger.info("%d of %d: %s, %g labels, seed %d, %s: OA %.1f; about %.0f min left", *told, left)
        report(root, config.benchmark.reference, config.benchmark.choices)
    if not missing:
        report(root, config.benchmark.reference, config.benchmark.choices)
    return root


class Division:
    """One division of the scene into training, validation and test, from which training takes so many labels.

    Args:
        config: see `run_few_labels`.
        seed: of the division.
        kind: of the split, a name in `benchmark.splits`.
        root: folder of all runs.
    """

    def __init__(self, config: DictConfig, seed: int, kind: str, root: Path) -> None:
        seeded: Any = OmegaConf.to_container(OmegaConf.merge(config, {"seed": seed}), resolve=True)
        self.options: dict[str, Any] = seeded["benchmark"]
        self.seed, self.kind, self.root = seed, kind, root
        self.accelerator = choose_device(config.device).replace("cuda", "gpu")
        self.precision = choose_precision(config.precision, self.accelerator)
        self._modules: dict[str, tuple[SceneDataModule, Split]] = {}

    def data(self, name: str) -> SceneDataModule:
        """Returns samples of a kind in `benchmark.data`, with all training pixels of the division.

        Scaling is fitted on these, without their labels; what `keep_labels` keeps of them may be fewer than channels.
        """
        if name not in self._modules:
            module: SceneDataModule = instantiate(
                {**self.options["data"][name], "split": self.options["splits"][self.kind], "seed": self.seed}
            )
            module.prepare_data()
            module.setup()
            self._modules[name] = module, module.split
        module, whole = self._modules[name]
        module.split = whole
        return module

    def measure(self, run: Run) -> RunResult:
        """Trains and scores one method; `metrics.json` is written last."""
        method, folder = self.options["methods"][run.method], run.folder(self.root)
        data = self.data(method["data"])
        config = DictConfig({**method, "ckpt_path": None, "compile": False})
        network = "members" not in method and not is_baseline(config.model)
        if network:
            config.trainer.accelerator = self.accelerator
            config.patience = config.trainer.max_epochs
            if config.regime == "adapt" and config.base is None:
                place = self.root / "bases" / f"{self.kind}-seed{self.seed}"
                config.base = str(shared_base(config, data, place, self.seed, self.precision))
        data.split = keep_labels(data.split, data.scene.labels, data.num_classes, run.labels)
        shutil.rmtree(folder, ignore_errors=True)
        data.split.save(folder / "split.npz")
        write_json(folder / "provenance.json", provenance(self.precision, data.scene.hashes))
        L.seed_everything(self.seed, workers=True, verbose=False)
        started = time.perf_counter()
        if "members" in method:
            probabilities, facts = self._votes(run, method["members"], data)
        elif network:
            probabilities, facts = self._train(config, data, folder / "training")
        else:
            probabilities, facts = fit_baseline(config.model, data)
        facts["seconds"] = facts.get("seconds", 0.0) + time.perf_counter() - started
        facts |= _about(run, data, facts, method)
        walked = spread(probabilities, data, self.options["random_walk"])
        # the run's own folder last: its scores mark it as finished
        self._write(folder / "random_walk", run, data, walked, {**facts, "random_walk": True, "transductive": True})
        return self._write(folder, run, data, probabilities, {**facts, "random_walk": False})

    def _write(
        self, folder: Path, run: Run, data: SceneDataModule, probabilities: np.ndarray, facts: Mapping[str, Any]
    ) -> RunResult:
        """Scores probabilities, (height * width, classes), and writes the scores."""
        predicted, labels = probabilities.argmax(axis=1), data.scene.labels
        scores = {
            subset: score(predicted[pixels], labels.flat[pixels], data.num_classes)
            for subset, pixels in data.split.subsets().items()
        }
        with atomic_path(folder / "prediction.npy") as temporary:
            np.save(temporary, predicted.astype(np.uint8).reshape(data.split.shape))
        leakage = data.split.leakage(data.patch_size)
        name = f"{run.method}{WALKED}" if facts["random_walk"] else run.method
        result = RunResult(name, run.seed, data.split.digest(), leakage, scores, facts)
        write_metrics(folder, result, [item.name for item in data.scene.classes])
        return result

    def _votes(self, run: Run, members: Sequence[str], data: SceneDataModule) -> tuple[np.ndarray, dict[str, Any]]:
        """Returns the shares of the members' votes, (height * width, classes), and facts.

        Of equal shares that of the first member is raised a little.

        Raises:
            ConfigError: a member has no finished run with a map.
        """
        votes = np.zeros((data.scene.labels.size, data.num_classes), np.float32)
        facts: list[Mapping[str, Any]] = []
        for place, member in enumerate(members):
            folder = replace(run, method=member).folder(self.root)
            path = folder / "prediction.npy"
            if not (path.is_file() and (folder / "metrics.json").is_file()):
                raise ConfigError(f"{path}: not found; {run.method} needs a run of {member} before it, made anew")
            predicted = np.load(path, allow_pickle=False).ravel()
            votes[np.arange(votes.shape[0]), predicted] += 1 if place else 1 + FIRST
            facts.append(read_result(folder).facts)
        seconds, seen = sum(one["seconds"] for one in facts), any(one["transductive"] for one in facts)
        return votes / votes.sum(axis=1, keepdims=True), {"seconds": seconds, "transductive": seen}

    def _train(self, config: DictConfig, data: SceneDataModule, folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
        """Returns probabilities all over the scene, (height * width, classes), and facts; keeps no weights."""
        trained = train_network(config, data, folder, None, self.precision)
        assert trained is not None  # one device has no other ranks
        probabilities = trained.predict(data, self.precision)[""]
        # hundreds of runs leave numbers, not gigabytes of weights
        shutil.rmtree(folder)
        return probabilities, dict(trained.facts)


def _about(run: Run, data: SceneDataModule, facts: Mapping[str, Any], method: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a table has to say of a run beside its scores."""
    parameters, names = data.split.parameters, [item.name for item in data.scene.classes]
    return {
        "kind": run.kind,
        "labels": run.labels,
        "train_pixels": int(data.split.train.size),
        "classes": int(np.count_nonzero(parameters["kept_pixels"])),
        "absent_classes": [names[index] for index in parameters.get("absent_classes", [])],
        "short_classes": [names[index] for index in parameters["short_classes"]],
        # weights from elsewhere cannot tell what they were pretrained on
        "transductive": bool(facts.get("transductive") or method.get("transductive")),
    }


def _keep_settings(config: DictConfig, root: Path) -> None:
    """Writes what each chosen method is, or compares it with what its earlier runs were.

    Raises:
        ConfigError: another one, whose runs would stand in the same row.
    """
    plain: Any = OmegaConf.to_container(OmegaConf.merge(config, {"seed": None}), resolve=True)
    options = plain["benchmark"]
    for name in config.methods:
        method = options["methods"][name]
        data = {key: value for key, value in options["data"][method["data"]].items() if key != "root"}
        shared = {key: options[key] for key in ("splits", "random_walk")}
        now = {"method": method, "data": data, **shared}
        path = root / f"{name}.json"
        if not path.exists():
            write_json(path, now)
        elif json.loads(path.read_text(encoding="utf-8")) != now:
            raise ConfigError(f"{path}: {name} was begun with other settings; give the same, or another name=")
