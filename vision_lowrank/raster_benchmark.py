"""Evaluates encoders on tasks of labelled tiles: neighbours, linear probe, fine-tuning, adapters; by seed, resumable.

Whatever is chosen is chosen on validation samples; the test samples are predicted once, after that.
"""

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

from vision_lowrank.data.download import fetch
from vision_lowrank.data.image_tasks import TaskData, open_task
from vision_lowrank.data.task_cards import load_task_card
from vision_lowrank.data.task_views import crop_middle, enlarge, select_bands
from vision_lowrank.errors import ConfigError
from vision_lowrank.evaluation.benchmark_rows import Key, Row, append_row, done, read_rows
from vision_lowrank.evaluation.probes import choose_logistic, knn, knn_masks
from vision_lowrank.evaluation.task_metrics import bootstrap, image_confusion, score_task
from vision_lowrank.instantiate import instantiate
from vision_lowrank.memory import PeakMemory
from vision_lowrank.precision import choose_device, choose_precision
from vision_lowrank.raster_features import Features, count_gmacs, extract, weights_digest
from vision_lowrank.raster_fitting import fit_raster
from vision_lowrank.results import report
from vision_lowrank.runs import open_run

PROTOCOLS = ("knn", "linear", "finetune", "adapter")
# of protocols that train; the others need none
TRAINED = ("finetune", "adapter")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A task with the sets to test on, by what is added to the name of the split."""

    data: TaskData
    tests: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """Predictions for one test set, as `evaluation.task_metrics` scores them, and what led to them."""

    predictions: np.ndarray
    targets: np.ndarray | None
    trainable_parameters: int
    chosen: str
    protocol: str


def run_raster_benchmark(config: DictConfig) -> Path:
    """Measures every encoder on every task by every protocol and seed, and returns the folder with the table.

    The folder has `results.csv`, to which rows are added as they are measured, `table.md`, `cost.png`, and what an
    interrupted run goes on from: `features/` and `fits/`.

    Raises:
        VisionLowRankError: an option is wrong, data are missing or damaged, or an encoder does not fit; all but what
            lies in single samples is found before work starts.
    """
    options: Any = OmegaConf.to_container(config.benchmark, resolve=True)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, torch.device(device).type)
    _check(options)
    encoders = _encoders(config, options)
    tasks: Any = OmegaConf.to_container(config.tasks, resolve=True)
    fractions = options["fractions"] or [None]
    for name in tasks:
        opened = _open(name, tasks, options, fractions[0], options["seeds"][0])
        for spec in encoders.values():
            _try(spec, opened, options["seeds"][0])
    folder = open_run(config, precision)
    run = _Run(folder, options, device, precision)
    for name in tasks:
        for fraction in fractions:
            for seed in options["seeds"]:
                opened = _open(name, tasks, options, fraction, seed)
                share = _fraction(name, tasks, fraction)
                for spec in encoders.values():
                    run.measure(opened, spec, share, seed)
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
                row = replace(row, gmacs=gmacs, seconds=seconds, peak_megabytes=memory.megabytes)
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
                yield test, Outcome(predictions, targets, fitted.trainable_parameters, chosen, protocol)
            return
        encoder.eval()
        digest = weights_digest(encoder)

        def features(subset: str, samples: Any) -> Features:
            identity = {
                "task": data.fingerprint, "subset": subset, "encoder": f"{type(encoder).__name__} {encoder.name}",
                "weights": digest, "precision": self.precision,
            }  # fmt: skip
            place = self.folder / "features"
            with torch.autocast(self.device, torch.bfloat16, enabled="bf16" in self.precision):
                return extract(encoder, samples, data.kind, identity, place, settings["batch_size"], self.device)

        train = features("train", data.train)
        if protocol == "linear":
            validation = features("validation", data.validation)
            probe = choose_logistic(
                (train.values, train.targets), (validation.values, validation.targets), data.kind, len(data.classes)
            )
            parameters = len(data.classes) * (encoder.dim + 1)
            for test, samples in opened.tests.items():
                found = features(f"test{test}", samples)
                yield test, Outcome(probe.predict(found.values), found.targets, parameters, probe.chosen, protocol)
            return
        for test, samples in opened.tests.items():
            found = features(f"test{test}", samples)
            for k in settings["neighbours"]:
                predictions, targets = _nearest(train, found, k, data, encoder.patch_size)
                yield test, Outcome(predictions, targets, 0, f"k={k}", f"knn-{k}")


def _nearest(
    train: Features, test: Features, k: int, data: TaskData, patch_size: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns predictions and targets by the nearest training images, or patches, whose maps vote pixel by pixel."""
    if data.kind != "segmentation":
        known, labels, query = (torch.from_numpy(part) for part in (train.values, train.targets, test.values))
        return knn(known, labels, query, k).numpy(), test.targets
    known, labels = (torch.from_numpy(part) for part in train.patches(patch_size))
    values, truth = test.patches(patch_size)
    found = knn_masks(known, labels, torch.from_numpy(values), k, len(data.classes)).numpy()
    maps, masks = (part.reshape(len(test.values), -1) for part in (found, truth))
    pairs = zip(maps, masks, strict=True)
    return np.stack([image_confusion(one, mask, len(data.classes)) for one, mask in pairs]), None


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


def _open(name: str, tasks: Any, options: Mapping[str, Any], fraction: float | None, seed: int) -> Opened:
    """Opens a task by its card, or as the configuration describes it."""
    if isinstance(tasks, Mapping):
        if fraction is not None:
            raise ConfigError(f"benchmark.fractions={options['fractions']}: task {name} has none; use cards of tasks")
        data: TaskData = instantiate(tasks[name], seed=seed)
    else:
        card = load_task_card(name)
        fetch(card, options["root"])
        data = open_task(card, options["root"], options["split"], _fraction(name, tasks, fraction), seed)
        published = card.protocol
        if card.side is not None and published.crop < card.side:
            data = crop_middle(data, published.crop)
        if published.scale > 1:
            data = enlarge(data, published.scale)
    bands = options["bands"]
    if bands is None:
        return Opened(data, {"": data.test})
    seen = select_bands(data, bands["train"])
    trained = "{:g}-{:g} nm".format(*bands["train"])
    tests = {f", {trained} only": seen.test}
    for limits in bands["test"]:
        tests[", {} to {:g}-{:g} nm".format(trained, *limits)] = select_bands(data, limits).test
    return Opened(seen, tests)


def _fraction(name: str, tasks: Any, fraction: float | None) -> float:
    """Returns the share of training samples: the published one where none is asked for."""
    if fraction is not None or isinstance(tasks, Mapping):
        return 1.0 if fraction is None else fraction
    return load_task_card(name).protocol.train_fraction


def _maker(spec: Mapping[str, Any], opened: Opened, seed: int, device: str) -> Callable[[], Any]:
    """Returns a function that builds the same prepared encoder each time."""

    def make() -> Any:
        L.seed_everything(seed, workers=True, verbose=False)
        encoder = instantiate(spec)
        encoder.prepare(opened.data.wavelengths.tolist())
        return encoder.to(device)

    return make


def _try(spec: Mapping[str, Any], opened: Opened, seed: int) -> None:
    """Runs one sample of each test set through an encoder, so that what does not fit is known before work starts."""
    encoder = _maker(spec, opened, seed, "cpu")().eval()
    for samples in opened.tests.values():
        count_gmacs(encoder, samples, opened.data.kind, "cpu")


def _weights(encoder: Any, spec: Mapping[str, Any]) -> str:
    """Returns what a table calls the weights."""
    if not any(True for _ in encoder.parameters()):
        return "none"
    known = spec.get("weights") is not None or spec.get("pretrained")
    return weights_digest(encoder) if known else "random"
