"""The table of a benchmark: one CSV to which runs append row by row, and its summary over seeds.

A row is a line that ends in a newline, or it is not there: what a writer that was killed left of one is passed over by
readers and cut off by the next writer. Several processes may append at the same time.
"""

import csv
import io
import json
import logging
import math
import os
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from vision_lowrank.errors import DataError
from vision_lowrank.evaluation.tables import Summary, summarise, t_interval

logger = logging.getLogger(__name__)


class Key(NamedTuple):
    """What makes two rows the same measurement; see `Row`."""

    task: str
    protocol: str
    encoder: str
    weights: str
    fraction: float
    seed: int
    split: str


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        task: name of the task.
        protocol: how the encoder was used.
        encoder: name of the encoder.
        weights: sha256 of its weights, "random", or "none" where it has none.
        fraction: share of the training labels that was used, 1 for all.
        seed: of everything drawn at random.
        split: name of the division into training, validation and test.
        metric: name of the metric.
        value: the metric of the test samples, a fraction.
        low: lower end of its interval.
        high: upper end.
        trainable_parameters: numbers that were fitted.
        gmacs: 1e9 multiply-adds a picture, None where not counted.
        seconds: wall time of the measurement.
        peak_megabytes: most memory in use, None where not measured.
        commit: of the code, None outside of a checkout.
        chosen: hyper-parameters chosen on validation samples.
        further: other metrics by name.

    Raises:
        DataError: a number is not finite, or a text has more than one line.
    """

    task: str
    protocol: str
    encoder: str
    weights: str
    fraction: float
    seed: int
    split: str
    metric: str
    value: float
    low: float
    high: float
    trainable_parameters: int
    gmacs: float | None
    seconds: float
    peak_megabytes: float | None
    commit: str | None
    chosen: str = ""
    further: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, float | np.floating)}
        for name, value in (numbers | dict(self.further)).items():
            if not math.isfinite(value):
                raise DataError(f"row of {self.task}, {self.protocol}, {self.encoder}: {name} is {value}")
        for name, value in vars(self).items():
            if isinstance(value, str) and value.splitlines() not in ([], [value]):
                raise DataError(f"row of {self.task}: {name} {value!r} has more than one line: write it in one")

    @property
    def key(self) -> Key:
        """What the row is known by."""
        return Key(*(getattr(self, name) for name in Key._fields))


_COLUMNS = [item.name for item in fields(Row)]
_HINTS = typing.get_type_hints(Row)
_HEADER = (",".join(_COLUMNS) + "\n").encode()


@dataclass(frozen=True)
class Line:
    """Rows that differ in their seeds only, summarised.

    Attributes:
        rows: the rows.
        value: mean and deviation over seeds.
        low: mean lower end of the intervals.
        high: mean upper end.
    """

    rows: Sequence[Row]
    value: Summary
    low: float
    high: float

    def mean(self, name: str) -> float | None:
        """Returns the mean of a numerical column, None where a row lacks it."""
        values = [getattr(row, name) for row in self.rows]
        return None if None in values else float(np.mean(values))


def append_row(path: Path, row: Row) -> None:
    """Adds a row at the end of a table, which is made where there is none; when it returns the row is on the disk.

    A file `PATH.lock` beside the table keeps writers apart.

    Raises:
        DataError: the file is no table of this version.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = _encode([_text(getattr(row, name)) for name in _COLUMNS])
    with FileLock(f"{path}.lock"), path.open("a+b") as file:
        file.seek(0)
        head = file.readline()
        _check_header(path, head)
        if not head.endswith(b"\n"):
            line = _HEADER + line
        file.truncate(_whole(file))
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a table, none where there is no file; of several with one key the last.

    Raises:
        DataError: a line that was written to its end cannot be a row; says which.
    """
    if not path.exists():
        return []
    head, *lines = path.read_bytes().splitlines(keepends=True) or [b""]
    _check_header(path, head)
    if lines and not lines[-1].endswith(b"\n"):
        logger.warning("%s: passed over an unfinished last line; the next row appended takes its place", path)
        lines.pop()
    rows = (_parse(path, number, line) for number, line in enumerate(lines, start=2))
    return list({(row.key, row.metric): row for row in rows}.values())


def done(rows: Iterable[Row], key: Key) -> bool:
    """Tells whether a measurement is in the table, to skip it; which commit made it does not count."""
    return any(row.key == key for row in rows)


def summarise_rows(rows: Iterable[Row]) -> list[Line]:
    """Groups the rows by all of their key but the seed, and by metric, the best of each comparison first."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.key._replace(seed=0), row.metric), []).append(row)
    lines = [
        Line(
            group,
            summarise([row.value for row in group]),
            float(np.mean([row.low for row in group])),
            float(np.mean([row.high for row in group])),
        )
        for group in groups.values()
    ]
    return sorted(lines, key=lambda line: (*_comparison(line), -line.value.mean))


def markdown_rows(rows: Iterable[Row]) -> str:
    """Returns a Markdown table: a line for each task, protocol, encoder, weights, fraction, split and metric.

    Values are percent, mean ± standard deviation over seeds; the interval over samples is the mean of the seeds' ones
    and says nothing of other seeds. The best of those that differ in encoder or weights only is bold where its interval
    lies above all the others' and, by Student's t over the seeds in common, where there are two, so does its value.
    """
    lines = summarise_rows(rows)
    header = [
        "task", "protocol", "encoder", "weights", "labels", "split", "seeds", "metric", "value",
        "95 % over samples", "trained parameters", "GMACs", "seconds", "peak MB",
    ]  # fmt: skip
    text = {"task", "protocol", "encoder", "weights", "split", "metric"}
    table = [header, [":---" if name in text else "---:" for name in header]]
    for line in lines:
        row = line.rows[0]
        value = f"{100 * line.value.mean:.2f}" + ("" if line.value.std is None else f" ± {100 * line.value.std:.2f}")
        rivals = [other for other in lines if _comparison(other) == _comparison(line) and other is not line]
        if rivals and all(_leads(line, other) for other in rivals):
            value = f"**{value}**"
        table.append(
            [
                row.task, row.protocol, row.encoder, row.weights[:8], f"{100 * row.fraction:g} %", row.split,
                str(line.value.count), row.metric, value, f"[{100 * line.low:.1f}, {100 * line.high:.1f}]",
                f"{line.mean('trainable_parameters'):,.0f}", _number(line.mean("gmacs"), ".3g"),
                _number(line.mean("seconds"), ",.1f"), _number(line.mean("peak_megabytes"), ",.0f"),
            ]
        )  # fmt: skip
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n" for cells in table)


def _comparison(line: Line) -> tuple[Any, ...]:
    """Returns what two lines must have in common to be compared."""
    row = line.rows[0]
    return row.task, row.protocol, row.split, row.metric, -row.fraction


def _leads(line: Line, other: Line) -> bool:
    """Tells whether a line is above another, whatever samples and seeds were drawn; see `markdown_rows`."""
    theirs = {row.seed: row.value for row in other.rows}
    interval = t_interval([row.value - theirs[row.seed] for row in line.rows if row.seed in theirs])
    return line.low > other.high and (interval is None or interval[0] > 0)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _encode(cells: Sequence[str]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue().encode("utf-8")


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return json.dumps({name: float(number) for name, number in value.items()})
    return "" if value is None else str(value)


def _whole(file: typing.BinaryIO) -> int:
    """Returns up to which byte an open file consists of finished lines."""
    position = file.seek(0, os.SEEK_END)
    tail = b""
    while position and b"\n" not in tail:
        step = min(position, 4096)
        position = file.seek(position - step)
        tail = file.read(step)
    return position + tail.rfind(b"\n") + 1


def _check_header(path: Path, head: bytes) -> None:
    # a spreadsheet may have changed the newlines, a killed writer may have begun the header
    if head.rstrip(b"\r\n") != _HEADER.rstrip() and not _HEADER.startswith(head):
        found = ascii(head[:200].decode("utf-8", "replace").strip())
        raise DataError(f"{path}, line 1: {found} is not the header of such a table: name another file")


def _parse(path: Path, number: int, line: bytes) -> Row:
    where = f"{path}, line {number}"
    remedy = "delete the line, its row is measured again"
    try:
        cells = next(csv.reader([line.decode("utf-8")]), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{where}: {error}: {remedy}") from error
    if len(cells) != len(_COLUMNS):
        raise DataError(f"{where}: {len(cells)} cells, not {len(_COLUMNS)}: {remedy}")
    values = {}
    for name, cell in zip(_COLUMNS, cells, strict=True):
        try:
            values[name] = _parser(_HINTS[name])(cell)
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: {name} is {cell!r}: {remedy}") from error
    try:
        return Row(**values)
    except DataError as error:
        raise DataError(f"{where}: {error}: {remedy}") from error


def _parser(hint: Any) -> Callable[[str], Any]:
    """Returns the function that reads a column with this annotation."""
    if hint in (str, int, float):
        return typing.cast(Callable[[str], Any], hint)
    options = typing.get_args(hint)
    if type(None) in options:
        return lambda cell: options[0](cell) if cell else None
    return lambda cell: {str(name): float(value) for name, value in json.loads(cell).items()}
