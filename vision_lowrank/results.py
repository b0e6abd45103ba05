"""Tables of benchmarks as Markdown and as a plot: python -m vision_lowrank.results results.csv [...] [--out FOLDER]."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from vision_lowrank.errors import DataError, VisionLowRankError
from vision_lowrank.evaluation.benchmark_rows import Key, Line, Row, markdown_rows, read_rows, summarise_rows
from vision_lowrank.plots.cost import save_cost
from vision_lowrank.runs import atomic_path

logger = logging.getLogger(__name__)


def report(rows: Sequence[Row], folder: Path) -> None:
    """Writes `table.md` and `cost.png` into a folder and prints the table.

    Raises:
        DataError: there is no row.
    """
    if not rows:
        raise DataError("no rows to report: the table is empty")
    lines = summarise_rows(rows)
    with atomic_path(folder / "table.md") as temporary:
        temporary.write_text(markdown_rows(rows), encoding="utf-8")
    counted = [line for line in lines if line.mean("gmacs") is not None]
    save_cost(
        folder / "cost.png",
        [_title(line.rows[0]) for line in counted],
        [_encoder(line.rows[0]) for line in counted],
        [line.mean("gmacs") or 0.0 for line in counted],
        [line.value.mean for line in counted],
        [line.low for line in counted],
        [line.high for line in counted],
    )
    Console(width=max(Console().width, 130)).print(_table(lines))
    logger.info("written to %s", folder)


def _title(row: Row) -> str:
    return f"{row.task}, {row.protocol}, {row.split}, {100 * row.fraction:g} %, {row.metric}"


def _encoder(row: Row) -> str:
    return row.encoder if row.weights in ("random", "none") else f"{row.encoder} {row.weights[:8]}"


def _table(lines: Sequence[Line]) -> Table:
    table = Table(box=SIMPLE, padding=0, pad_edge=False)
    for name in ("task", "protocol", "encoder", "metric", "split"):
        table.add_column(name)
    for name in ("labels", "seeds", "value", "95 %", "trained", "GMACs", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        row = line.rows[0]
        spread = "" if line.value.std is None else f" ± {100 * line.value.std:.2f}"
        gmacs, trained = line.mean("gmacs"), line.mean("trainable_parameters") or 0
        table.add_row(
            *(row.task, row.protocol, _encoder(row), row.metric, row.split),
            *(f"{100 * row.fraction:g} %", str(line.value.count), f"{100 * line.value.mean:.2f}{spread}"),
            *(f"{100 * line.low:.1f} to {100 * line.high:.1f}", f"{trained:,.0f}"),
            *("" if gmacs is None else f"{gmacs:.3g}", f"{line.mean('seconds'):.1f}"),
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Renders one or several tables; returns the exit status, 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m vision_lowrank.results", description="Tables of benchmarks.")
    parser.add_argument("tables", nargs="+", type=Path, help="results.csv of runs")
    parser.add_argument("--out", type=Path, default=None, help="folder for table.md and cost.png (default: the first)")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    try:
        if missing := [str(path) for path in options.tables if not path.is_file()]:
            raise DataError(f"{missing[0]}: not found; give the results.csv of a run")
        found: dict[tuple[Key, str], tuple[Path, Row]] = {}
        for path in options.tables:
            for row in read_rows(path):
                if known := found.get((row.key, row.metric)):
                    raise DataError(
                        f"{path} and {known[0]} both hold {row.metric} of {', '.join(map(str, row.key))}: one result, "
                        "which may not count twice; leave out one of the two"
                    )
                found[row.key, row.metric] = (path, row)
        rows = [row for _, row in found.values()]
        report(rows, options.out or options.tables[0].parent)
    except (VisionLowRankError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
