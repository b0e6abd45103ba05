"""The benchmark of the shared front-end writes a row for each size and patch."""

import sys

import pytest

from benchmarks import shared_stem
from vision_lowrank.models.dense_lola import DenseLola


@pytest.mark.parametrize("patch", [3, 11])
def test_the_best_repetition_of_each_way_counts(patch, monkeypatch):
    # starts and ends, the ways in turn: 3 and 2 seconds, 1 and 5
    clock = iter([0, 3, 10, 11, 20, 22, 30, 35])
    monkeypatch.setattr(shared_stem.time, "perf_counter", lambda: next(clock))
    done = []
    for name in ("_tokens", "_tokens_by_patch"):
        way = getattr(DenseLola, name)
        monkeypatch.setattr(DenseLola, name, lambda *given, name=name, way=way: done.append(name) or way(*given))
    assert shared_stem.measure("tiny", patch, tile=2, repeats=2) == (2, 1)
    assert done == ["_tokens", "_tokens_by_patch"] * 2


def test_table_has_all_rows(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "--sizes", "tiny", "small", "--patches", "3", "11"])
    monkeypatch.setattr(shared_stem.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(shared_stem, "measure", lambda name, patch, tile, repeats: (patch / 10, len(name)))
    shared_stem.main()
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| tiny | 3 | 0.300 | 4.000 | 0.07 |",
        "| tiny | 11 | 1.100 | 4.000 | 0.28 |",
        "| small | 3 | 0.300 | 5.000 | 0.06 |",
        "| small | 11 | 1.100 | 5.000 | 0.22 |",
    ]
