"""Tables and curves of accuracy over the number of labels, from the runs that `few_labels` left in a folder."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vision_lowrank.errors import DataError
from vision_lowrank.evaluation.tables import (
    METRICS,
    RunResult,
    paired_difference,
    percent,
    read_result,
    signed_percent,
    summarise,
    t_interval,
)
from vision_lowrank.few_labels_options import WALKED
from vision_lowrank.plots.label_curves import Curve, save_label_curves
from vision_lowrank.runs import atomic_path, write_csv

logger = logging.getLogger(__name__)


def report(root: Path, reference: str, choices: Mapping[str, Sequence[str]]) -> None:
    """Writes `table.csv`, `table.md` and `curve.png` of all finished runs in a folder, and prints the tables.

    Args:
        root: holds KIND-LABELS-seed0/METHOD/metrics.json and so on.
        reference: method that the others are compared with, split by split.
        choices: see `chosen_runs`.

    Raises:
        DataError: there is no finished run, or a file of one is damaged.
    """
    runs = read_runs(root)
    results = _in_order([*runs, *chosen_runs(runs, choices)])
    write_csv(root / "table.csv", summary_rows(results, reference))
    tables = markdown_tables(results, reference)
    with atomic_path(root / "table.md") as temporary:
        temporary.write_text(tables, encoding="utf-8")
    save_label_curves(root / "curve.png", _panels(results))
    print(tables)
    logger.info("written to %s", root)


def read_runs(root: Path) -> list[RunResult]:
    """Returns the results of the finished runs of a folder in the order of the tables, random walks last.

    Raises:
        DataError: there is none, or one is damaged.
    """
    folders = [path.parent for path in sorted(root.glob("*-seed*/*/metrics.json"))]
    if not folders:
        raise DataError(f"{root}: no finished run; give it as runs_root and name to the benchmark few_labels first")
    return _in_order([read_result(folder / part) for folder in folders for part in (".", "random_walk")])


def chosen_runs(results: Sequence[RunResult], choices: Mapping[str, Sequence[str]]) -> list[RunResult]:
    """Returns for each division the result of the method that is best on its validation pixels, of equals the first.

    Args:
        results: runs with scores of "validation"; with a random walk and without are chosen from by themselves.
        choices: the methods to choose from, by the name that the chosen one gets; divisions without all of them have
            none.
    """
    divisions: dict[tuple[Any, ...], dict[str, RunResult]] = {}
    for one in results:
        key = (_kind(one), _labels(one), one.seed, one.facts["random_walk"])
        divisions.setdefault(key, {})[one.method.partition(" + ")[0]] = one
    found = []
    for name, methods in choices.items():
        for runs in divisions.values():
            if not all(method in runs for method in methods):
                continue
            best = max((runs[method] for method in methods), key=lambda one: one.scores["validation"].oa)
            # all of them had to be trained
            facts = {**best.facts, "seconds": sum(runs[method].facts["seconds"] for method in methods)}
            facts["transductive"] = any(runs[method].facts["transductive"] for method in methods)
            walk = WALKED if best.facts["random_walk"] else ""
            found.append(replace(best, method=f"{name}{walk}", facts=facts))
    return found


def summary_rows(results: Sequence[RunResult], reference: str) -> list[dict[str, Any]]:
    """Returns a row for each kind of split, number of labels and method, all numbers as fractions.

    Intervals are Student's over the seeds at 95 %; differences are paired by split.
    """
    rows: list[dict[str, Any]] = []
    for kind, labels, method in dict.fromkeys((_kind(one), _labels(one), one.method) for one in results):
        here = [one for one in results if (_kind(one), _labels(one)) == (kind, labels)]
        runs = [one for one in here if one.method == method]
        row: dict[str, Any] = {"split": kind, "labels": labels, "method": method, "runs": len(runs)}
        for metric in METRICS:
            # kappa of a test set with one class is undefined
            values = [value for one in runs if (value := getattr(one.scores["test"], metric)) is not None]
            if values:
                summary, interval = summarise(values), t_interval(values) or (None, None)
                row |= {metric: summary.mean, f"{metric} std": summary.std}
                row |= {f"{metric} low": interval[0], f"{metric} high": interval[1]}
        if method != reference and _paired(here, method, reference):
            found = paired_difference(here, method, reference)
            low, high = found.interval or (None, None)
            row |= {f"oa - {reference}": found.mean, "difference low": low, "difference high": high}
        row |= {"leakage": float(np.mean([one.leakage for one in runs]))}
        for fact in ("train_pixels", "classes", "seconds"):
            row[fact] = float(np.mean([one.facts[fact] for one in runs]))
        row["transductive"] = any(one.facts["transductive"] for one in runs)
        rows.append(row)
    return rows


def markdown_tables(results: Sequence[RunResult], reference: str) -> str:
    """Returns for each kind of split a table of OA, AA, and of the difference in OA to the reference.

    A row a method, a column a number of labels; percent of the test pixels, mean ± standard deviation over seeds, and
    differences paired by split with their 95 % intervals. Cells of fewer seeds than their column has say of how many.
    """
    parts = []
    for kind in dict.fromkeys(map(_kind, results)):
        here = [one for one in results if _kind(one) == kind]
        names = {one.method: one.facts["random_walk"] for one in here}
        methods = sorted(names, key=lambda name: (names[name], name != reference, name))
        parts.append(f"## {kind} splits\n")
        for metric, title in (("oa", "OA"), ("aa", "AA")):
            parts.append(_table(here, title, methods, lambda runs, name, metric=metric: _cell(runs, name, metric)))
        others = [name for name in methods if name != reference]
        if reference in methods and others:
            title = f"OA - {reference} [95 %]"
            parts.append(_table(here, title, others, lambda runs, name: _difference(runs, name, reference)))
        seen = [name for name in methods if any(one.facts["transductive"] for one in _of(here, name))]
        if seen:
            parts.append(f"Saw the scene without labels (transductive): {', '.join(seen)}.\n")
        absent = [len(one.facts["absent_classes"]) for one in here]
        if any(absent):
            parts.append(
                f"Training lacks {min(absent)} to {max(absent)} of the classes, by division; they are not tested.\n"
            )
    return "\n".join(parts)


def _table(
    results: Sequence[RunResult], title: str, methods: Sequence[str], cell: Callable[..., tuple[str, int]]
) -> str:
    columns = {labels: [one for one in results if _labels(one) == labels] for labels in map(_labels, results)}
    names = [f"{labels} a class" if isinstance(labels, int) else f"{100 * labels:g} %" for labels in columns]
    pixels = [f"{np.mean([one.facts['train_pixels'] for one in runs]):.0f}" for runs in columns.values()]
    lines = [[title, *names], [":---", *("---:" for _ in names)], ["training pixels", *pixels]]
    seeds = [len({one.seed for one in runs}) for runs in columns.values()]
    lines.append(["seeds", *map(str, seeds)])
    for method in methods:
        cells = [cell(runs, method) for runs in columns.values()]
        lines.append([method])
        lines[-1] += [
            text if count in (0, most) else f"{text} (n = {count})"
            for (text, count), most in zip(cells, seeds, strict=True)
        ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(runs: Sequence[RunResult], method: str, metric: str) -> tuple[str, int]:
    """Returns what a method reached, and over how many runs."""
    values = [getattr(one.scores["test"], metric) for one in _of(runs, method)]
    return percent(summarise(values), digits=1) if values else "", len(values)


def _difference(runs: Sequence[RunResult], method: str, reference: str) -> tuple[str, int]:
    """Returns by how much a method leads, and over how many divisions."""
    if not _paired(runs, method, reference):
        return "", 0
    found = paired_difference(runs, method, reference)
    return signed_percent(found), found.count


def _paired(runs: Sequence[RunResult], method: str, reference: str) -> bool:
    return bool({one.split for one in _of(runs, method)} & {one.split for one in _of(runs, reference)})


def _panels(results: Sequence[RunResult]) -> list[list[tuple[str, dict[str, Curve]]]]:
    """Returns a row of panels for each kind of split, and one with random walks: pixels a class beside shares."""
    rows = []
    for kind, walked in dict.fromkeys((_kind(one), one.facts["random_walk"]) for one in results):
        row = []
        for scale, name in ((int, "pixels a class"), (float, "shares")):
            here = [
                one for one in results
                if (_kind(one), one.facts["random_walk"]) == (kind, walked) and isinstance(_labels(one), scale)
            ]  # fmt: skip
            if here:
                methods = sorted({one.method for one in here})
                title = f"{kind}{WALKED if walked else ''}, {name}"
                row.append((title, {method.partition(" + ")[0]: _curve(_of(here, method)) for method in methods}))
        rows.append(row)
    return rows


def _curve(runs: Sequence[RunResult]) -> Curve:
    labels = sorted({_labels(one) for one in runs})
    groups = [[one.scores["test"].oa for one in runs if _labels(one) == value] for value in labels]
    means = [float(np.mean(group)) for group in groups]
    intervals = [t_interval(group) or (mean, mean) for group, mean in zip(groups, means, strict=True)]
    # few runs give intervals wider than what is possible
    lows, highs = [max(0.0, low) for low, _ in intervals], [min(1.0, high) for _, high in intervals]
    return Curve(labels, means, lows, highs)


def _of(runs: Sequence[RunResult], method: str) -> list[RunResult]:
    return [one for one in runs if one.method == method]


def _in_order(results: Sequence[RunResult]) -> list[RunResult]:
    return sorted(
        results,
        key=lambda one: (_kind(one), isinstance(_labels(one), float), _labels(one), one.facts["random_walk"]),
    )


def _kind(result: RunResult) -> str:
    return str(result.facts["kind"])


def _labels(result: RunResult) -> float | int:
    labels: float | int = result.facts["labels"]
    return labels
