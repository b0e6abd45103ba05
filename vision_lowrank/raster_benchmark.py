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

import lightning as L
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
from vision_lowrank.raster_data import Opened, Tasks
from vision_lowrank.raster_features import Features, count_gmacs, extract, weights_digest
from vision_lowrank.raster_fitting import fit_raster
from vision_lowrank.results import report
from vision_lowrank.runs import open_run

PROTOCOLS = ("knn", "linear", "finetune", "adapter")
# of protocols that train; the others need none
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
    options: Any = OmegaConf.to_container(config.benchmark, resolve=True)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, torch.device(device).type)
    _check(options)
    encoders = _encoders(config, options)
    tasks = Tasks(OmegaConf.to_container(config.tasks, resolve=True), options)
    neighbours = max(options["protocols"].get("knn", {}).get("neighbours", []), default=0)
    for name in tasks.tasks:
        opened = tasks.prepare(name, options["seeds"][0], neighbours)
        _try(encoders, opened, options["seeds"][0])
    for name in tasks.tasks:
        tasks.read_through(name)
    folder = open_run(config, precision)
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
        make = _maker(spec, opened, seed, self.device)
        encoder = make()
        weights = _weights(encoder, spec)
        gmacs = count_gmacs(encoder, opened.data.train, opened.data.kind, self.device)
        common: dict[str, Any] = {
            "task": opened.data.name, "encoder": encoder.name, "weights": weights, "fraction": fraction, "seed": seed,
        }  # fmt: skip
        for protocol in self.options["protocols"]:
            if protocol in TRAINED and not any(True for _ in encoder.parameters()):
                # nothing to train but the head, which is the linear protocol
                continue
            names = [f"knn-{k}" for k in self.options["protocols"]["knn"]["neighbours"]] if protocol == "knn" else None
            keys = [
                Key(protocol=name, split=self.options["split"] + test, **common)
                for name in names or [protocol]
                for test in opened.tests
            ]
            rows = read_rows(self.table)
            if all(done(rows, key) for key in keys):
                continue
            started = time.perf_counter()
            with PeakMemory(torch.device(self.device)) as memory:
                found = list(self._outcomes(protocol, opened, make, encoder, seed, weights, fraction))
            seconds = time.perf_counter() - started
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
    ) -> Iterator[tuple[str, Outcome]]:
        """Yields what a protocol predicts of each test set."""
        data, settings = opened.data, self.options["protocols"][protocol]
        segmentation = data.kind == "segmentation"
        if protocol in TRAINED or (protocol == "linear" and segmentation):
            name = f"{data.name}-{encoder.name}-{weights[:8]}-{protocol}-{fraction:g}-seed{seed}"
            place = (
                self.folder / "fits" / "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name)
            )
            fitted = fit_raster(
                data, make, protocol, settings["learning_rates"], settings["epochs"], settings["batch_size"],
                self.precision, self.device, place, seed, settings.get("targets", []), settings.get("rank", 1),
                self.options["num_workers"], opened.tests,
            )  # fmt: skip
            rates = ", ".join(f"{trial.learning_rate:g}" for trial in fitted.trials)
            chosen = f"lr={fitted.learning_rate:g} of {rates}; epoch {fitted.epoch} of {settings['epochs']}"
            for test, (predictions, targets) in fitted.tests.items():
                parameters = fitted.trainable_parameters
                yield test, Outcome(predictions, targets, parameters, chosen, protocol, fitted.seconds)
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
                return extract(encoder, samples, data.kind, identity, place, *reading)

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


def _check(options: Mapping[str, Any]) -> None:
    if strange := set(options["protocols"]) - set(PROTOCOLS):
        raise ConfigError(f"benchmark.protocols has {', '.join(sorted(strange))}; it can have {', '.join(PROTOCOLS)}")
    if not options["protocols"] or not options["seeds"]:
        raise ConfigError("benchmark.protocols and benchmark.seeds need at least one entry each")


def _encoders(config: DictConfig, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the configurations of the encoders by name: `model`, or the several of the benchmark."""
    given: Any = None if config.get("model") is None else OmegaConf.to_container(config.model, resolve=True)
    encoders = dict(options["encoders"]) if given is None else {"model": given}
    if config.weights is not None:
        for name, spec in encoders.items():
            if "weights" not in spec:
                raise ConfigError(f"weights={config.weights}: {spec['_target_']} has none to load; leave it out")
            encoders[name] = {**spec, "weights": config.weights}
    return encoders


def _maker(spec: Mapping[str, Any], opened: Opened, seed: int, device: str) -> Callable[[], Any]:
    """Returns a function that builds the same prepared encoder each time."""

    def make() -> Any:
        L.seed_everything(seed, workers=True, verbose=False)
        encoder = instantiate(spec)
        encoder.prepare(opened.data.wavelengths.tolist())
        return encoder.to(device)

    return make


def _try(encoders: Mapping[str, Mapping[str, Any]], opened: Opened, seed: int) -> None:
    """Runs one sample of each test set through each encoder, so that what does not fit is known before work starts."""
    known: dict[tuple[str, str], str] = {}
    for name, spec in encoders.items():
        encoder = _maker(spec, opened, seed, "cpu")().eval()
        for samples in opened.tests.values():
            count_gmacs(encoder, samples, opened.data.kind, "cpu")
        # rows know an encoder by these
        called = (encoder.name, _weights(encoder, spec))
        if called in known:
            raise ConfigError(
                f"benchmark.encoders: {known[called]} and {name} are both called {encoder.name}; run them apart"
            )
        known[called] = name


def _weights(encoder: Any, spec: Mapping[str, Any]) -> str:
    """Returns what a table calls the weights."""
    if not any(True for _ in encoder.parameters()):
        return "none"
    known = spec.get("weights") is not None or spec.get("pretrained")
    return weights_digest(encoder) if known else "random"
