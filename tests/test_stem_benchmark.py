"""The benchmark of the shared front-end writes a row for each size and patch."""

import sys

import pytest

from benchmarks import shared_stem


def test_table_has_all_rows(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "_ --sizes tiny small --patches 3 11 --tile 2 --repeats 1".split())
    monkeypatch.setattr(shared_stem.torch, "set_num_threads", lambda count: None)
    shared_stem.main()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["tiny", "3"], ["tiny", "11"], ["small", "3"], ["small", "11"]]
    for row in rows:
        shared, apart, ratio = (float(cell) for cell in row[2:])
        assert min(shared, apart) > 0
        # of rounded seconds
        assert ratio == pytest.approx(shared / apart, rel=0.5)
