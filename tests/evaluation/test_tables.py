import csv
import json
import math

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from vision_lowrank.errors import DataError
from vision_lowrank.evaluation.metrics import score
from vision_lowrank.evaluation.tables import (
    RunResult,
    console_table,
    markdown_table,
    paired_difference,
    read_result,
    summarise,
    write_metrics,
)


def run(method, seed, right, split=None, leakage=0.25):
    """A run with `right` of 100 pixels correct, two classes of 50."""
    labels = np.repeat([0, 1], 50)
    predictions = labels.copy()
    predictions[right:] = 1 - predictions[right:]
    return RunResult(method, seed, split or f"split{seed}", leakage, {"test": score(predictions, labels, 2)}, {"s": 1})


def test_mean_and_sample_deviation():
    summary = summarise([1.0, 2.0, 4.0])
    assert summary.mean == pytest.approx(7 / 3)
    assert summary.std == pytest.approx(math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2))
    assert summarise([0.5]).std is None
    with pytest.raises(DataError, match="no run"):
        summarise([])


def test_paired_difference_is_scipys():
    ours, theirs = [90, 80, 85, 70], [85, 81, 70, 60]
    results = [run("ours", seed, value) for seed, value in enumerate(ours)]
    results += [run("svm", seed, value) for seed, value in reversed(list(enumerate(theirs)))]
    difference = paired_difference(results, "ours", "svm")
    expected = stats.ttest_rel(np.array(ours) / 100, np.array(theirs) / 100).confidence_interval(0.95)
    assert difference.mean == pytest.approx(0.0725)
    assert difference.interval == pytest.approx((expected.low, expected.high))
    assert difference.count == 4


def test_pairs_are_made_by_split_not_by_order():
    results = [run("a", 0, 90), run("a", 1, 70), run("a", 2, 10), run("b", 1, 60), run("b", 9, 50, split="split1")]
    difference = paired_difference(results, "a", "b")
    assert difference.mean == pytest.approx(0.70 - 0.55)
    assert difference.count == 1
    assert difference.interval is None
    with pytest.raises(DataError, match="'a' and 'c' have no split in common"):
        paired_difference([*results, run("c", 7, 50)], "a", "c")


def test_tables_show_percent_leakage_and_difference():
    results = [run("LoLA", 0, 90), run("LoLA", 1, 92), run("SVM", 0, 80), run("SVM", 1, 81)]
    text = markdown_table(results, reference="SVM")
    lines = text.splitlines()
    assert lines[0] == "| method | runs | OA | AA | kappa | leakage | OA - SVM [95 %] |"
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[:3] == ["LoLA", "2", "91.00 ± 1.41"]
    assert cells[5] == "25.0 ± 0.0"
    low, high = stats.t.interval(0.95, 1, loc=10.5, scale=stats.sem([10, 11]))
    assert cells[6] == f"+10.50 [{low:+.1f}, {high:+.1f}]"
    assert lines[3].endswith("|  |")
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(console_table(results, "Indian Pines", reference="SVM"))
    shown = console.export_text()
    assert "91.00 ± 1.41" in shown
    assert "Indian Pines" in shown
    assert "LoLA" in markdown_table(results[:1])


def test_an_undefined_kappa_is_said():
    result = RunResult("a", 0, "s", 0.0, {"test": score(np.zeros(3, int), np.zeros(3, int), 2)})
    assert "| undefined |" in markdown_table([result])


def test_files_hold_the_result(tmp_path):
    result = run("LoLA", 3, 90)
    write_metrics(tmp_path, result, ["corn", "oats"])
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["scores"]["test"]["oa"] == pytest.approx(0.9)
    assert content["leakage"] == 0.25
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert float(rows["OA"]["value"]) == pytest.approx(0.9)
    assert (rows["oats"]["pixels"], float(rows["oats"]["value"])) == ("50", pytest.approx(0.8))
    again = read_result(tmp_path)
    assert (again.method, again.seed, again.split, again.facts) == ("LoLA", 3, "split3", {"s": 1})
    assert markdown_table([again]) == markdown_table([result])


def test_unfinished_and_damaged_runs_are_named(tmp_path):
    with pytest.raises(DataError, match=r"metrics.json: not found.*did not finish"):
        read_result(tmp_path)
    for text in ("{", "{}", "[]"):
        (tmp_path / "metrics.json").write_text(text)
        with pytest.raises(DataError, match=r"metrics.json: damaged"):
            read_result(tmp_path)
