"""Results of several runs: files, means over seeds, paired comparisons, and tables for screen and document."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table
from scipy import stats

from vision_lowrank.errors import DataError
from vision_lowrank.evaluation.metrics import Scores
from vision_lowrank.runs import write_csv, write_json

METRICS = {"oa": "OA", "aa": "AA", "kappa": "kappa"}


@dataclass(frozen=True)
class RunResult:
    """What one run reached.

    Attributes:
        method: name of the method, a row of the table.
        seed: the run's seed.
        split: digest of the split; runs are paired where it is equal.
        leakage: share of test pixels whose patch contains a training pixel.
        scores: by pixel set, "test" at least.
        facts: further numbers worth keeping (seconds, parameters, best epoch).
    """

    method: str
    seed: int
    split: str
    leakage: float
    scores: Mapping[str, Scores]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (n - 1) of `count` values; `std` is None for a single one."""

    mean: float
    std: float | None
    count: int


@dataclass(frozen=True)
class PairedDifference:
    """Mean difference over `count` common splits and its t interval, which is None for a single split."""

    mean: float
    interval: tuple[float, float] | None
    count: int


def summarise(values: Sequence[float]) -> Summary:
    """Returns mean and spread over runs.

    Raises:
        DataError: there is no value.
    """
    if not values:
        raise DataError("no run to summarise")
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(float(np.mean(values)), std, len(values))


def paired_difference(
    results: Sequence[RunResult], method: str, reference: str, confidence: float = 0.95
) -> PairedDifference:
    """Compares the OA of two methods on the splits that both were run on; runs on one split count as their mean.

    Args:
        results: runs of both methods.
        method: the method whose advantage is measured.
        reference: the method it is compared with.
        confidence: probability that Student's t interval covers the true mean difference.

    Returns:
        The mean of `method - reference`, positive where `method` is better.

    Raises:
        DataError: the methods share no split.
    """
    ours, theirs = _by_split(results, method), _by_split(results, reference)
    common = [split for split in ours if split in theirs]
    if not common:
        raise DataError(f"methods {method!r} and {reference!r} have no split in common: run both with the same seeds")
    differences = np.array([ours[split] - theirs[split] for split in common])
    return PairedDifference(float(differences.mean()), t_interval(differences.tolist(), confidence), len(common))


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Returns Student's interval for the mean of values, None for a single one."""
    if len(values) < 2:
        return None
    mean = float(np.mean(values))
    half = float(stats.sem(values) * stats.t.ppf((1 + confidence) / 2, len(values) - 1))
    return mean - half, mean + half


def write_metrics(folder: Path, result: RunResult, class_names: Sequence[str]) -> None:
    """Writes `metrics.csv`, then `metrics.json`, whose presence marks a finished run: call it last.

    The CSV has one row a score and class (columns set, name, pixels, value), fractions throughout.
    """
    described = {name: scores.to_dict(class_names) for name, scores in result.scores.items()}
    rows = []
    for name, content in described.items():
        for metric, title in METRICS.items():
            rows.append({"set": name, "name": title, "pixels": content["pixels"], "value": content[metric]})
        for entry in content["classes"]:
            rows.append({"set": name, "name": entry["name"], "pixels": entry["pixels"], "value": entry["accuracy"]})
    write_csv(folder / "metrics.csv", rows)
    head = {"method": result.method, "seed": result.seed, "split": result.split, "leakage": result.leakage}
    write_json(folder / "metrics.json", head | {"scores": described, "facts": dict(result.facts)})


def read_result(folder: Path) -> RunResult:
    """Returns what `write_metrics` wrote, to put runs made one by one into one table.

    Raises:
        DataError: the folder holds no finished run, or its `metrics.json` is damaged.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        raise DataError(f"{path}: not found, so the run did not finish: repeat or resume it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        scores = {name: Scores.from_dict(entry) for name, entry in content["scores"].items()}
        head = {key: content[key] for key in ("method", "seed", "split", "leakage", "facts")}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error}): repeat the run") from error
    return RunResult(scores=scores, **head)


def console_table(results: Sequence[RunResult], title: str, reference: str | None = None) -> Table:
    """Returns a table for rich's console: a row a method, percentages of the test pixels, mean ± std over runs.

    Args:
        results: all runs.
        title: what stands above the table.
        reference: method that the others are compared with; adds a column with the paired difference in OA.
    """
    header, rows = _cells(results, reference)
    table = Table(title=escape(title), box=SIMPLE, padding=0, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index > 0)
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(results: Sequence[RunResult], reference: str | None = None) -> str:
    """Returns the same table for a Markdown document."""
    header, rows = _cells(results, reference)
    rule = [":---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows]) + "\n"


def _cells(results: Sequence[RunResult], reference: str | None) -> tuple[list[str], list[list[str]]]:
    header = ["method", "runs", *METRICS.values(), "leakage"]
    if reference is not None:
        header.append(f"OA - {reference} [95 %]")
    rows = []
    for method in dict.fromkeys(result.method for result in results):
        runs = [result for result in results if result.method == method]
        row = [method, str(len(runs))]
        for metric in METRICS:
            values = [value for result in runs if (value := getattr(result.scores["test"], metric)) is not None]
            row.append(percent(summarise(values)) if values else "undefined")
        row.append(percent(summarise([result.leakage for result in runs]), digits=1))
        if reference is not None:
            row.append("" if method == reference else signed_percent(paired_difference(results, method, reference)))
        rows.append(row)
    return header, rows


def _by_split(results: Sequence[RunResult], method: str) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for result in results:
        if result.method == method:
            values.setdefault(result.split, []).append(result.scores["test"].oa)
    return {split: float(np.mean(group)) for split, group in values.items()}


def percent(summary: Summary, digits: int = 2) -> str:
    """Returns mean ± deviation of fractions in percent."""
    text = f"{100 * summary.mean:.{digits}f}"
    return text if summary.std is None else f"{text} ± {100 * summary.std:.{digits}f}"


def signed_percent(difference: PairedDifference) -> str:
    """Returns a difference of fractions in percent, with its interval."""
    text = f"{100 * difference.mean:+.2f}"
    if difference.interval is None:
        return text
    low, high = difference.interval
    return f"{text} [{100 * low:+.1f}, {100 * high:+.1f}]"
