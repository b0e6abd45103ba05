"""Boxes in cells, who sees whom, and scenes that are refused."""

import json
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from vision_lowrank.composer.layout import Box, Places
from vision_lowrank.errors import ConfigError


@pytest.mark.parametrize("case", ["a", "b"])
def test_inner_cells_are_those_of_the_original(shared_path, case):
    facts = json.loads(shared_path("golden", "composer", f"case_{case}.json").read_text())
    for size, stored in facts["boxes_cells"].items():
        height, width = map(int, size.split("x"))
        found = [Box(*edges).cells(height, width, "inner") for edges in facts["boxes_fraction"]]
        assert found == [tuple(cells) for cells in stored]


@st.composite
def boxes(draw, size=960):
    edges = [sorted(draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True))) for _ in range(2)]
    return [edges[0][0], edges[1][0], edges[0][1], edges[1][1]]


# small boxes over a border of cells, which lie in the cell of their middle
@example([230, 475, 252, 490], 4, 4)
@example([225, 470, 248, 484], 4, 4)
@given(boxes(), st.integers(1, 40), st.integers(1, 40))
def test_nearest_cells_hold_every_cell_whose_middle_is_inside_and_never_none(pixels, height, width):
    found = Box.from_pixels(*pixels, 960, 960).cells(height, width)
    expected = []
    for start, end, cells in ((pixels[0], pixels[2], height), (pixels[1], pixels[3], width)):
        # a middle on the upper edge is outside, one on the lower edge inside
        middles = [Fraction(2 * cell + 1, 2 * cells) * 960 for cell in range(cells)]
        inside = [cell for cell, middle in enumerate(middles) if start < middle <= end]
        half = Fraction(start + end, 2)
        expected.append(inside or [min(int(half * cells / 960), cells - 1)])
    rows, columns = expected
    assert found == (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1)


def test_edges_at_the_middle_of_a_cell_are_there_in_spite_of_rounding():
    # 15 / 22 of 11 cells are 7.5, a little less in float64
    assert 15 / 22 * 11 < 7.5
    assert Box.from_pixels(1, 15, 15, 21, 22, 22).cells(11, 11) == (1, 8, 8, 11)


def test_small_boxes_have_no_inner_cells():
    # the original crashes on the second, whose last cell ends before its first begins
    assert Box.from_pixels(32, 40, 224, 112, 256, 512).cells(4, 8, "inner") is None
    assert Box.from_pixels(72, 72, 120, 120, 256, 512).cells(4, 8, "inner") is None
    assert Box.from_pixels(72, 72, 120, 120, 256, 512).cells(4, 8) == (1, 1, 2, 2)


@pytest.mark.parametrize(
    ("edges", "problem"),
    [
        ((-0.1, 0, 1, 1), "leaves the image"),
        ((0, 0, 1, 1.01), "leaves the image"),
        ((0, float("nan"), 1, 1), "leaves the image"),
        ((0.5, 0, 0.5, 1), "empty or inverted"),
        ((0, 0.6, 1, 0.5), "empty or inverted"),
    ],
)
def test_impossible_boxes_are_refused(edges, problem):
    with pytest.raises(ConfigError, match=problem):
        Box(*edges)


def test_misspelt_policies_are_refused():
    with pytest.raises(ConfigError, match="'outer'; it can be nearest or inner"):
        Box(0, 0, 1, 1).cells(2, 2, "outer")
    with pytest.raises(ConfigError, match="'none'; it can be own or official"):
        Places([], (2, 2), overlaps="none")


# on a map of 4 by 6: two boxes that share a column, one that touches none
LAYOUT = SimpleNamespace(
    boxes=[Box(0, 0, 0.5, 0.5), Box(0, 1 / 3, 0.75, 5 / 6), Box(0.75, 0, 1, 1 / 6)],
    cells=[(0, 0, 2, 3), (0, 2, 3, 5), (3, 0, 4, 1)],
)


def owners(position):
    row, column = divmod(position, 6)
    boxes = enumerate(LAYOUT.cells)
    return {index for index, (top, left, bottom, right) in boxes if top <= row < bottom and left <= column < right}


def own_policy(query, key):
    return not query or not key or bool(query & key)


def official_policy(query, key):
    return not any(one != other for one in query for other in key)


@pytest.mark.parametrize(("overlaps", "rule"), [("own", own_policy), ("official", official_policy)])
def test_who_sees_whom(overlaps, rule):
    places = Places(LAYOUT.boxes, (4, 6), overlaps=overlaps)
    assert places.cells == LAYOUT.cells
    expected = torch.tensor([[rule(owners(query), owners(key)) for key in range(24)] for query in range(24)])
    assert torch.equal(places.visible, expected)
    # the groups say the same
    found = torch.zeros(24, 24, dtype=torch.bool)
    for queries, keys in places.groups:
        found[queries[:, None], keys] = True
    assert torch.equal(found, expected)
    assert torch.equal(torch.cat([queries for queries, _ in places.groups])[places.order], torch.arange(24))


def test_overlapping_boxes_that_cover_the_image_still_see_something():
    # as the original's finite penalties do: an overlap sees what is penalised least, the boxes' other parts
    places = Places([Box(0, 0, 1, 0.5), Box(0, 0.25, 1, 1)], (1, 4), overlaps="official")
    assert places.visible.int().tolist() == [[1, 0, 0, 0], [1, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]
    places = Places([Box(0, 0, 1, 0.5), Box(0, 0.25, 1, 1)], (1, 4), overlaps="own")
    assert places.visible.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]


def test_shares_and_positions():
    places = Places(LAYOUT.boxes, (4, 6))
    for index, positions in enumerate(places.positions):
        assert positions.tolist() == [position for position in range(24) if index in owners(position)]
    assert places.outside.tolist() == [position for position in range(24) if not owners(position)]
    assert places.shares.tolist() == [1 / max(len(owners(position)), 1) for position in range(24)]


@pytest.mark.parametrize("boxes", [[], [Box(0, 0, 1, 1)], [Box(0, 0, 0.5, 0.5)]])
def test_one_region_needs_no_groups(boxes):
    assert Places(boxes, (4, 6)).groups is None
