"""Evaluates encoders on tasks of labelled tiles: neighbours, linear probe, fine-tuning, adapters; by seed, resumable.

Whatever is chosen is chosen on validation samples; the test samples are predicted once, after that.
"""

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vision_lowrank.data.image_tasks import TaskData
from vision_lowrank.errors import ConfigError
from vision_lowrank.evaluation.benchmark_rows import Key, Row, append_row, done, read_rows
from vision_lowrank.evaluation.probes import choose_logistic, knn, knn_masks
from vision_lowrank.evaluation.task_metrics import bootstrap, image_confusion, score_task
from vision_lowrank.instantiate import instantiate
from vision_lowrank.memory import PeakMemory
from vision_lowrank.precision import choose_device, choose_precision
from vision_lowrank.raster_data import Opened, Tasks, present_tasks
from vision_lowrank.raster_encoders import encoder_maker, find_encoders, try_encoders, weights_name
from vision_lowrank.raster_features import Features, count_gmacs, extract, weights_digest
from vision_lowrank.raster_fitting import fit_raster
from vision_lowrank.raster_options import check_options, check_tasks
from vision_lowrank.results import report
from vision_lowrank.runs import open_run, write_json

# protocols that train the encoder
TRAINED = ("finetune", "adapter")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """Predictions for one test set, as `evaluation.task_metrics` scores them, and what led to them.

    `seconds` are those of training, before an interruption too.
    """

    predictions: np.ndarray
    targets: np.ndarray | None
    trainable_parameters: int
    chosen: str
    protocol: str
    seconds: float = 0.0


def run_raster_benchmark(config: DictConfig) -> Path:
    """Measures every encoder on every task by every protocol and seed, and returns the folder with the table.

    The folder has `results.csv`, to which rows are added as they are measured, `table.md`, `cost.png`, and what an
    interrupted run goes on from: `features/` and `fits/`.

    Raises:
        VisionLowRankError: an option is wrong, data are missing or damaged, or an encoder does not fit; found before
            anything is trained or written but what was fetched.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True)
    options, asked = plain["benchmark"], plain.get("tasks")
    device = choose_device(config.device)
    precision = choose_precision(config.precision, torch.device(device).type)
    check_options(options)
    options["protocols"] = {name: settings for name, settings in options["protocols"].items() if settings is not None}
    if config.devices != 1:
        raise ConfigError(
            f"devices={config.devices}: this benchmark computes on one; run tasks or seeds by commands of their own, "
            "each with its device=cuda:N, and give their tables to python -m vision_lowrank.results"
        )
    encoders = find_encoders(config, options)
    for spec in encoders.values():
        # what cannot be made is told before hundreds of gigabytes are fetched
        instantiate(spec)
    check_tasks(asked)
    tasks = Tasks(present_tasks(asked), options)
    neighbours = max(options["protocols"].get("knn", {}).get("neighbours", []), default=0)
    files: dict[str, Any] = {}
    for name in tasks.tasks:
        opened = tasks.prepare(name, options["seeds"][0], neighbours)
        if opened.data.name in files:
            raise ConfigError(f"tasks: {name} is the second called {opened.data.name}; rename it, or run it apart")
        heads = {_head(options, protocol, opened) for protocol in options["protocols"]}
        try_encoders(encoders, opened, heads, options["seeds"][0])
        files[opened.data.name] = dict(opened.data.files)
    for name in tasks.tasks:
        tasks.read_through(name)
    folder = open_run(config, precision)
    _note_files(folder, files)
    run = _Run(folder, options, device, precision)
    for name, fraction, seed in itertools.product(tasks.tasks, tasks.fractions, options["seeds"]):
        opened = tasks.open(name, fraction, seed)
        for spec in encoders.values():
            run.measure(opened, spec, tasks.share(name, fraction), seed)
    report(read_rows(run.table), folder)
    return folder


@dataclass(frozen=True)
class _Run:
    """What all measurements share."""

    folder: Path
    options: Mapping[str, Any]
    device: str
    precision: str

    @property
    def table(self) -> Path:
        """File of the rows."""
        return self.folder / "results.csv"

    def measure(self, opened: Opened, spec: Mapping[str, Any], fraction: float, seed: int) -> None:
        """Adds the rows of one encoder on one task with one seed that are not there yet."""
        make = encoder_maker(spec, opened, seed, self.device)
        encoder = make()
        weights = weights_name(encoder, spec)
        gmacs = count_gmacs(encoder, opened.data.train, opened.data.kind, self.device)
        common: dict[str, Any] = {
            "task": opened.data.name, "encoder": encoder.name, "weights": weights, "fraction": fraction, "seed": seed,
        }  # fmt: skip
        for protocol in self.options["protocols"]:
            if protocol in TRAINED and not any(True for _ in encoder.parameters()):
                # nothing to train but the head, which is the linear protocol
                continue
            if protocol == "knn":
                names = [f"knn-{k}" for k in self.options["protocols"]["knn"]["neighbours"]]
            else:
                names = [_called(protocol, _head(self.options, protocol, opened))]
            keys = [
                Key(protocol=name, split=self.options["split"] + test, **common)
                for name in names
                for test in opened.tests
            ]
            rows = read_rows(self.table)
            if all(done(rows, key) for key in keys):
                continue
            earlier: list[float] = []
            started = time.perf_counter()
            with PeakMemory(torch.device(self.device)) as memory:
                found = list(self._outcomes(protocol, opened, make, encoder, seed, weights, fraction, earlier))
            seconds = time.perf_counter() - started + sum(earlier)
            for test, outcome in found:
                row = self._row(opened, test, outcome, common)
                taken = max(seconds, outcome.seconds)
                row = replace(row, gmacs=gmacs, seconds=taken, peak_megabytes=memory.megabytes)
                if not done(rows, row.key):
                    append_row(self.table, row)
                told = (row.task, row.protocol, row.encoder, row.split, seed, row.metric, 100 * row.value)
                logger.info("%s, %s, %s, %s, seed %d: %s %.2f [%.1f, %.1f]", *told, 100 * row.low, 100 * row.high)

    def _row(self, opened: Opened, test: str, outcome: Outcome, common: Mapping[str, Any]) -> Row:
        data = opened.data
        given = (data.kind, outcome.predictions, outcome.targets, len(data.classes))
        scores = score_task(*given)
        metric = data.metric
        low, high = bootstrap(
            data.kind, metric, outcome.predictions, outcome.targets, len(data.classes), opened.tests[test].groups
        )
        return Row(
            **common,
            protocol=outcome.protocol,
            split=self.options["split"] + test,
            metric=metric,
            value=scores.pop(metric),
            low=low,
            high=high,
            trainable_parameters=outcome.trainable_parameters,
            gmacs=None,
            seconds=0.0,
            peak_megabytes=None,
            commit=self.commit,
            chosen=outcome.chosen,
            further=scores,
        )

    @property
    def commit(self) -> str | None:
        """Commit of the code."""
        code = json.loads((self.folder / "provenance.json").read_text())["code"]
        return None if code is None else code["commit"] + ("+" if code["dirty"] else "")

    def _outcomes(
        self,
        protocol: str,
        opened: Opened,
        make: Callable[[], Any],
        encoder: Any,
        seed: int,
        weights: str,
        fraction: float,
        earlier: list[float],
    ) -> Iterator[tuple[str, Outcome]]:
        """Yields what a protocol predicts of each test set; adds to `earlier` the seconds that kept features took."""
        data, settings = opened.data, self.options["protocols"][protocol]
        segmentation = data.kind == "segmentation"
        if protocol in TRAINED or (protocol == "linear" and segmentation):
            head = _head(self.options, protocol, opened)
            called = _called(protocol, head)
            name = f"{data.name}-{encoder.name}-{weights[:8]}-{called}-{fraction:g}-seed{seed}"
            place = (
                self.folder / "fits" / "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name)
            )
            fitted = fit_raster(
                data, make, protocol, settings["learning_rates"], settings["epochs"], settings["batch_size"],
                self.precision, self.device, place, seed, settings.get("targets", []), settings.get("rank", 1),
                self.options["num_workers"], opened.tests, head,
            )  # fmt: skip
            rates = ", ".join(f"{trial.learning_rate:g}" for trial in fitted.trials)
            chosen = f"lr={fitted.learning_rate:g} of {rates}; epoch {fitted.epoch} of {settings['epochs']}"
            for test, (predictions, targets) in fitted.tests.items():
                parameters = fitted.trainable_parameters
                yield test, Outcome(predictions, targets, parameters, chosen, called, fitted.seconds)
            return
        encoder.eval()
        digest = weights_digest(encoder)

        def features(samples: Any) -> Features:
            identity = {
                "encoder": f"{type(encoder).__name__} {encoder.name}", "weights": digest, "precision": self.precision,
            }  # fmt: skip
            place = self.folder / "features"
            reading = (settings["batch_size"], self.options["num_workers"], self.device)
            with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled="bf16" in self.precision):
                found = extract(encoder, samples, data.kind, identity, place, *reading)
            earlier.append(found.earlier_seconds)
            return found

        train = features(data.train)
        if protocol == "linear":
            validation = features(data.validation)
            probe = choose_logistic(
                (train.values, train.targets), (validation.values, validation.targets), data.kind, len(data.classes)
            )
            parameters = len(data.classes) * (encoder.dim + 1)
            for test, samples in opened.tests.items():
                found = features(samples)
                yield test, Outcome(probe.predict(found.values), found.targets, parameters, probe.chosen, protocol)
            return
        for test, samples in opened.tests.items():
            found = features(samples)
            for k in settings["neighbours"]:
                predictions, targets = _nearest(train, found, k, data, encoder.patch_size, self.device)
                yield test, Outcome(predictions, targets, 0, f"k={k}", f"knn-{k}")


def _nearest(
    train: Features, test: Features, k: int, data: TaskData, patch_size: int, device: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns predictions and targets by the nearest training images, or patches, whose maps vote pixel by pixel."""
    if data.kind != "segmentation":
        known, labels, query = (_to(part, device) for part in (train.values, train.targets, test.values))
        return knn(known, labels, query, k).cpu().numpy(), test.targets
    known, labels = (_to(part, device) for part in train.patches(patch_size))
    values, truth = test.patches(patch_size)
    found = knn_masks(known, labels, _to(values, device), k, len(data.classes)).cpu().numpy()
    maps, masks = (part.reshape(len(test.values), -1) for part in (found, truth))
    pairs = zip(maps, masks, strict=True)
    return np.stack([image_confusion(one, mask, len(data.classes)) for one, mask in pairs]), None


def _to(values: np.ndarray, device: str) -> Tensor:
    return torch.from_numpy(values).to(device)


def _note_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Adds to the provenance of a run what its data lie in.

    Raises:
        ConfigError: rows that are there already are of other data.
    """
    path = folder / "provenance.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    if changed := [name for name, known in content["data"].items() if known != files.get(name)]:
        raise ConfigError(f"resume={folder}: its rows are of other files of {', '.join(changed)}; begin a new run")
    write_json(path, {**content, "data": files})


def _head(options: Mapping[str, Any], protocol: str, opened: Opened) -> str:
    """Returns the head that a protocol trains on the task: what the options say, else that of the task's authors."""
    if protocol not in TRAINED or opened.data.kind != "segmentation":
        return "linear"
    return options["protocols"][protocol].get("head") or opened.head


def _called(protocol: str, head: str) -> str:
    """Returns what rows call a protocol that trains this head."""
    return protocol if head == "linear" else f"{protocol}-{head}"
