"""Table and plot of a comparison of adapters: python -m vision_lowrank.adapter_report RUNS [...] [--reference lora]."""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vision_lowrank.errors import DataError, VisionLowRankError
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
from vision_lowrank.plots.adapter_accuracy import save_accuracy
from vision_lowrank.runs import atomic_path

logger = logging.getLogger(__name__)

# what is no adapter, in the places that it has in the table
FIRST, LAST = "probe", "full"


def read_runs(folder: Path) -> list[RunResult]:
    """Returns the finished runs of a comparison, the probe first, adapters by name, full fine-tuning last.

    Raises:
        DataError: there is none.
    """
    results = [read_result(path.parent) for path in sorted(folder.glob("*-seed*/metrics.json"))]
    if not results:
        raise DataError(f"{folder}: no finished run of a comparison; give the folder that holds METHOD-seed0 and so on")
    unfinished = [path.parent.name for path in folder.glob("*-seed*/config.yaml") if not _finished(path.parent)]
    if unfinished:
        logger.warning("%s: left out, for they are not finished: %s", folder, ", ".join(sorted(unfinished)))
    return sorted(
        results, key=lambda result: (result.method == LAST, result.method != FIRST, result.method, result.seed)
    )


def comparison_table(results: Sequence[RunResult], reference: str) -> str:
    """Returns a Markdown table, a row a method, and below it what the intervals show.

    Scores are percent of the test pixels, mean ± standard deviation over seeds. Differences in OA are paired by split;
    their intervals hold all at once with 95 %, by Bonferroni's rule: among many methods one is best by chance.

    Args:
        results: all runs, in the order wanted.
        reference: method that the others are compared with.

    Raises:
        DataError: there is no run of the reference.
    """
    methods = _by_method(results)
    if reference not in methods:
        raise DataError(
            f"no run of {reference!r}, which the others are to be compared with; there are {', '.join(methods)}"
        )
    confidence = 1 - 0.05 / max(1, len(methods) - 1)
    header = [
        *("method", "runs", "trained parameters", *METRICS.values(), f"OA - {reference} [95 %, all at once]"),
        *("seconds", "MB a step", "intruders a layer", "learning rates"),
    ]
    rows, above, below, edges = [], [], [], []
    for method, runs in methods.items():
        difference = ""
        if method != reference:
            found = paired_difference(results, method, reference, confidence=confidence)
            difference = signed_percent(found)
            if found.interval is not None:
                above += [method] if found.interval[0] > 0 else []
                below += [method] if found.interval[1] < 0 else []
        chosen = Counter(result.facts["learning_rate"] for result in runs)
        edge = sum(_at_edge(result) for result in runs)
        edges += [f"{method} ({edge} of {len(runs)} runs)"] if edge else []
        rows.append(
            [
                *(method, str(len(runs)), f"{_trained(runs):,.0f}"),
                *(_score(runs, metric) for metric in METRICS),
                *(difference, _mean(runs, "training_seconds", ".0f"), _mean(runs, "step_megabytes", ".1f")),
                *(_mean(runs, "intruders", ".2f"), ", ".join(f"{rate:g} ({n})" for rate, n in sorted(chosen.items()))),
            ]
        )
    rule = [":---", *("---:" for _ in header[1:])]
    table = "".join(f"| {' | '.join(row)} |\n" for row in [header, rule, *rows])
    others = [method for method in methods if method not in (reference, *above, *below)]
    says = [
        ("Better than", above),
        ("Worse than", below),
        ("No difference shown from", others),
    ]
    lines = [f"{what} {reference} in OA: {', '.join(some)}." for what, some in says if some]
    if edges:
        lines.append(f"Best learning rate at the edge of those tried: {', '.join(edges)}.")
    return f"{table}\n" + "".join(f"{line}\n" for line in lines)


def report(folders: Sequence[Path], reference: str, out: Path) -> None:
    """Writes `table.md`, a table a folder, and `accuracy.png`, accuracy against trained parameters of all.

    Raises:
        DataError: a folder holds no finished run, or none of the reference.
    """
    comparisons = {folder: read_runs(folder) for folder in folders}
    tables = [f"## {folder.name}\n\n{comparison_table(results, reference)}" for folder, results in comparisons.items()]
    with atomic_path(out / "table.md") as temporary:
        temporary.write_text("\n".join(tables), encoding="utf-8")
    runs = [group for results in comparisons.values() for group in _by_method(results).values()]
    accuracies = [[result.scores["test"].oa for result in group] for group in runs]
    means = [float(np.mean(group)) for group in accuracies]
    intervals = [t_interval(group) or (mean, mean) for group, mean in zip(accuracies, means, strict=True)]
    save_accuracy(
        out / "accuracy.png",
        [group[0].method for group in runs],
        [_trained(group) for group in runs],
        means,
        # few runs give intervals wider than what is possible
        [max(0.0, low) for low, _ in intervals],
        [min(1.0, high) for _, high in intervals],
        reference,
    )
    print("\n".join(tables))
    logger.info("written to %s", out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reports on one or several comparisons; returns the exit status, 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m vision_lowrank.adapter_report", description="Adapters compared.")
    parser.add_argument("runs", nargs="+", type=Path, help="folder of a comparison, such as runs/adapter_comparison")
    parser.add_argument("--reference", default="lora", help="method that the others are compared with (default: lora)")
    parser.add_argument("--out", type=Path, default=None, help="for table.md and accuracy.png (default: the first)")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    try:
        report(options.runs, options.reference, options.out or options.runs[0])
    except (VisionLowRankError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _finished(folder: Path) -> bool:
    return (folder / "metrics.json").exists()


def _by_method(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    groups: dict[str, list[RunResult]] = {}
    for result in results:
        groups.setdefault(result.method, []).append(result)
    return groups


def _trained(runs: Sequence[RunResult]) -> float:
    return float(np.mean([result.facts["parameters"]["trainable"] for result in runs]))


def _at_edge(result: RunResult) -> bool:
    rates: Sequence[float] = result.facts["learning_rates"]
    return len(rates) > 2 and result.facts["learning_rate"] in (rates[0], rates[-1])


def _score(runs: Sequence[RunResult], metric: str) -> str:
    values = [value for result in runs if (value := getattr(result.scores["test"], metric)) is not None]
    return percent(summarise(values)) if values else "undefined"


def _mean(runs: Sequence[RunResult], fact: str, form: str) -> str:
    values: list[Any] = [result.facts[fact] for result in runs]
    return "-" if None in values else format(float(np.mean(values)), form)


if __name__ == "__main__":
    sys.exit(main())
