import csv
import dataclasses
import math
import multiprocessing

import numpy as np
import pytest

from vision_lowrank.errors import DataError
from vision_lowrank.evaluation.benchmark_rows import (
    Key,
    Row,
    append_row,
    done,
    markdown_rows,
    read_rows,
    summarise_rows,
)

ROW = Row(
    task="eurosat", protocol="linear", encoder="less_vit", weights="0123456789abcdef", fraction=0.1, seed=3,
    split="published", metric="accuracy", value=0.912345678901234, low=0.9, high=0.93, trainable_parameters=7690,
    gmacs=1.25, seconds=33.5, peak_megabytes=None, commit=None, chosen='C=0.1 of 0.01, "0.1"; ä', further={"µ": 1 / 3},
)  # fmt: skip


def row(**changes):
    return dataclasses.replace(ROW, **changes)


@pytest.fixture
def table(tmp_path):
    return tmp_path / "made" / "rows.csv"


def test_rows_come_back_as_they_were(table):
    assert read_rows(table) == []
    rows = [ROW, row(seed=4, peak_megabytes=812.5, commit="abc", further={}), row(task="marida", value=np.float64(0.5))]
    for one in rows:
        append_row(table, one)
    assert read_rows(table) == rows
    # any other program reads it too
    with table.open(newline="", encoding="utf-8") as file:
        first = next(csv.DictReader(file))
    assert (first["value"], first["chosen"], first["commit"]) == ("0.912345678901234", ROW.chosen, "")


def test_of_one_measurement_the_last_row_counts(table):
    for one in (ROW, row(seed=4), row(value=0.5)):
        append_row(table, one)
    assert [(one.seed, one.value) for one in read_rows(table)] == [(3, 0.5), (4, ROW.value)]


def test_what_is_done_is_known_by_its_key():
    key = Key("eurosat", "linear", "less_vit", "0123456789abcdef", 0.1, 3, "published")
    assert done([row(seed=4), ROW], key)
    assert not done([], key)
    others = {"task": "x", "protocol": "x", "encoder": "x", "weights": "x", "fraction": 1.0, "seed": 4, "split": "x"}
    for name, other in others.items():
        assert not done([ROW], key._replace(**{name: other}))
    assert done([row(commit="other", value=0.1)], key)


@pytest.mark.parametrize("kept", ["header", "row"])
def test_wherever_a_writer_is_killed_readers_and_the_next_writer_go_on(table, kept):
    append_row(table, ROW)
    whole = table.read_bytes()
    start = whole.index(b"\n") + 1
    cuts = range(start) if kept == "header" else range(start, len(whole))
    for cut in cuts:
        table.write_bytes(whole[:cut])
        assert read_rows(table) == []
        if cut % 7 == 0:
            append_row(table, row(seed=9))
            assert read_rows(table) == [row(seed=9)]
    table.write_bytes(whole + whole[start:-1])
    append_row(table, row(seed=9))
    assert table.read_bytes().startswith(whole)
    assert read_rows(table) == [ROW, row(seed=9)]


def test_an_unfinished_line_is_told_of(table, caplog):
    append_row(table, ROW)
    with table.open("ab") as file:
        file.write(b"eurosat,knn")
    assert read_rows(table) == [ROW]
    assert "rows.csv: passed over an unfinished last line" in caplog.text


def test_a_long_torn_line_is_cut_off(table):
    append_row(table, ROW)
    whole = table.read_bytes()
    table.write_bytes(whole + b"x" * 10_000)
    append_row(table, row(seed=9))
    assert table.read_bytes().startswith(whole)
    assert read_rows(table) == [ROW, row(seed=9)]


def write_many(path, number):
    for seed in range(60):
        append_row(path, row(encoder=f"number {number}", seed=seed, chosen="x" * (97 * seed)))


def test_several_processes_write_one_table(table):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(table, number)) for number in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    rows = read_rows(table)
    assert sorted((one.encoder, one.seed) for one in rows) == [
        (f"number {number}", seed) for number in range(2) for seed in range(60)
    ]
    assert len(table.read_bytes().splitlines()) == 121
    assert all(len(one.chosen) == 97 * one.seed for one in rows)


@pytest.mark.parametrize(
    ("found", "put", "message"),
    [
        (b"0.912345678901234", b"much", r"rows\.csv, line 3: value is 'much': delete the line"),
        (b",published,", b",", r"line 3: 17 cells, not 18"),
        (b"0.912345678901234", b"nan", "line 3: row of eurosat, linear, less_vit: value is nan"),
        (b"7690", b"7690.5", "line 3: trainable_parameters is '7690.5'"),
        (b"linear", b"\xff", "line 3: .*can't decode byte 0xff"),
        (b'"{""\\u00b5"": 0.3333333333333333}"', b"[1]", r"line 3: further is '\[1\]'"),
    ],
)
def test_damaged_lines_are_named(table, found, put, message):
    append_row(table, row(seed=1))
    append_row(table, ROW)
    head, first, second = table.read_bytes().splitlines(keepends=True)
    assert found in second
    table.write_bytes(head + first + second.replace(found, put))
    with pytest.raises(DataError, match=message):
        read_rows(table)


@pytest.mark.parametrize("content", [b"task,protocol\n1,2\n", b"a letter", b"\n"])
def test_another_file_is_left_alone(table, content):
    table.parent.mkdir()
    table.write_bytes(content)
    for action in (lambda: read_rows(table), lambda: append_row(table, ROW)):
        with pytest.raises(DataError, match=r"rows\.csv, line 1: .* is not the header of such a table"):
            action()
    assert table.read_bytes() == content


def test_newlines_of_a_spreadsheet_are_read(table):
    append_row(table, ROW)
    table.write_bytes(table.read_bytes().replace(b"\n", b"\r\n"))
    append_row(table, row(seed=4))
    assert read_rows(table) == [ROW, row(seed=4)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": math.nan}, "value is nan"),
        ({"high": math.inf}, "high is inf"),
        ({"low": np.float32(np.nan)}, "low is nan"),
        ({"further": {"micro_map": math.nan}}, "micro_map is nan"),
        ({"chosen": "a\nb"}, "has more than one line"),
        ({"chosen": "a\n"}, "has more than one line"),
    ],
)
def test_rows_that_cannot_be_read_back_are_not_made(changes, message):
    with pytest.raises(DataError, match=message):
        row(**changes)


def seeds(values, width, **changes):
    return [
        row(seed=seed, value=value, low=value - width, high=value + width, **changes)
        for seed, value in enumerate(values)
    ]


def test_lines_are_means_over_seeds():
    rows = [*seeds([0.8, 0.84], 0.01), *seeds([0.5], 0.02, fraction=1.0)]
    rows[1] = dataclasses.replace(rows[1], high=0.89, gmacs=1.75)
    whole, tenth = summarise_rows(rows)
    assert (whole.rows, tenth.rows) == (rows[2:], rows[:2])
    assert tenth.value.mean == pytest.approx(0.82)
    assert tenth.value.std == pytest.approx(math.sqrt(2) * 0.02)
    assert (tenth.low, tenth.high) == pytest.approx((0.81, 0.85))
    assert tenth.mean("gmacs") == pytest.approx(1.5)
    assert tenth.mean("peak_megabytes") is None


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()]


def test_table_shows_mean_deviation_interval_and_cost():
    text = markdown_rows([*seeds([0.8, 0.84], 0.01), row(task="a", encoder="x|y", weights="none", fraction=1.0)])
    header, rule, first, second = cells(text)
    assert len(header) == len(rule) == len(second)
    assert dict(zip(header, second, strict=True)) == {
        "task": "eurosat", "protocol": "linear", "encoder": "less_vit", "weights": "01234567", "labels": "10 %",
        "split": "published", "seeds": "2", "metric": "accuracy", "value": "82.00 ± 2.83",
        "95 % over samples": "[81.0, 83.0]", "trained parameters": "7,690", "GMACs": "1.25", "seconds": "33.5",
        "peak MB": "",
    }  # fmt: skip
    assert first[2:5] == ["x\\|y", "none", "100 %"]
    assert first[8] == "91.23"


def values(rows):
    return [line[8] for line in cells(markdown_rows(rows))[2:]]


def test_only_a_clear_best_is_bold():
    ours, near = seeds([0.8, 0.8], 0.01), seeds([0.79, 0.79], 0.01, encoder="near")
    far = seeds([0.7, 0.7], 0.01, encoder="far")
    assert values(ours) == ["80.00 ± 0.00"]
    assert values(far + near + ours) == ["80.00 ± 0.00", "79.00 ± 0.00", "70.00 ± 0.00"]
    assert values(far + ours) == ["**80.00 ± 0.00**", "70.00 ± 0.00"]
    # a rival far behind, but so uncertain that it may be ahead
    assert values(ours + seeds([0.6, 0.6], 0.3, encoder="odd"))[0] == "80.00 ± 0.00"
    # ahead by 4 and by 16 points: with other seeds it may be behind (t = 1.67, for which two seeds need 12.7)
    assert values(seeds([0.8, 0.9], 0.01) + seeds([0.76, 0.74], 0.01, encoder="near"))[0] == "85.00 ± 7.07"
    # other weights are rivals and no further seeds; other protocols, fractions and splits are neither
    assert values(ours + seeds([0.7], 0.01, weights="random")) == ["**80.00 ± 0.00**", "70.00"]
    for changes in ({"protocol": "knn"}, {"fraction": 1.0}, {"split": "grouped"}, {"metric": "macro_map"}):
        assert not any("*" in value for value in values(ours + seeds([0.7], 0.01, **changes)))
