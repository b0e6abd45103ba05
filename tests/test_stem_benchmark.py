"""The benchmark of the shared front-end writes a row for each size and patch."""

import sys

import pytest

from benchmarks import shared_stem


@pytest.mark.parametrize("patch", [3, 11])
def test_both_ways_take_time(patch):
    assert min(shared_stem.measure("tiny", patch, tile=2, repeats=1)) > 0


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
