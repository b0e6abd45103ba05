from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from vision_lowrank.plots import cost
from vision_lowrank.plots.cost import save_cost

POINTS = [
    # panel, encoder, GMACs, value, low, high
    ("eurosat (accuracy)", "statistics", 0.0, 0.81, 0.80, 0.82),
    ("eurosat (accuracy)", "less_vit", 1.5, 0.92, 0.90, 0.93),
    ("eurosat (accuracy)", "resnet", 30.0, 0.95, 0.94, 0.96),
    ("marida (macro_miou)", "less_vit", 3.0, 0.50, 0.51, 0.60),
    ("marida (macro_miou)", "resnet", 60.0, 0.45, 0.40, 0.50),
]


@pytest.fixture
def figures(drawn):
    return drawn(cost)


def draw(path, points):
    save_cost(path, *zip(*points, strict=True))


def redraw(figure):
    """Draws at the figure's own resolution, so that all extents are in the same pixels."""
    FigureCanvasAgg(figure).draw()


def test_points_and_intervals_are_where_they_belong(tmp_path, figures):
    draw(tmp_path / "cost.png", POINTS)
    first, second = figures[0].axes
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["eurosat (accuracy)", "marida (macro_miou)"]
    assert first.get_xscale() == second.get_xscale() == "log"
    points = [[bar.lines[0].get_xydata()[0].tolist() for bar in axes.containers] for axes in (first, second)]
    assert points == [[[1.5, 92], [30, 95]], [[3, 50], [60, 45]]]
    ends = [[bar.lines[2][0].get_segments()[0][:, 1] for bar in axes.containers] for axes in (first, second)]
    # a value below its interval keeps its place
    np.testing.assert_allclose(ends, [[[90, 93], [94, 96]], [[50, 60], [40, 50]]])
    for axes in (first, second):
        left, right = axes.get_xlim()
        costs = [bar.lines[0].get_xdata()[0] for bar in axes.containers]
        assert left < min(costs) <= max(costs) < right
    assert [
        axes.get_ylim()[0] < low and axes.get_ylim()[1] > high
        for axes, low, high in ((first, 80, 96), (second, 40, 60))
    ] == [True, True]


def test_what_costs_nothing_is_a_line_with_a_band(tmp_path, figures, pixels_of):
    draw(tmp_path / "cost.png", POINTS)
    axes = figures[0].axes[0]
    lines = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert [list(line.get_ydata()) for line in lines] == [[81, 81]]
    (band,) = axes.patches
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((80, 82))
    pixels = pixels_of(tmp_path / "cost.png", to_hex("C0"))
    _, counts = np.unique(pixels[:, 0], return_counts=True)
    assert counts.max() > 150


def test_an_encoder_looks_the_same_everywhere(tmp_path, figures):
    draw(tmp_path / "cost.png", POINTS)
    looks = [
        [(bar.lines[0].get_color(), bar.lines[0].get_marker()) for bar in axes.containers] for axes in figures[0].axes
    ]
    assert looks[0] == looks[1]
    assert looks[0][0] != looks[0][1]
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["statistics", "less_vit", "resnet"]
    handles = [(handle.get_color(), handle.get_marker()) for handle in legend.legend_handles]
    assert handles[1:] == looks[0]


@pytest.mark.parametrize(
    "costs", [(2.0, 2.0), (2.0, 2.4), (2.0, 3.9), (2.0, 9.0), (0.5, 40.0), (0.5, 90.0), (0.001, 900.0)]
)
def test_the_axis_of_costs_has_labels_that_do_not_meet(tmp_path, figures, costs):
    draw(tmp_path / "cost.png", [("a", name, value, 0.5, 0.4, 0.6) for name, value in zip("ab", costs, strict=True)])
    redraw(figures[0])
    (axes,) = figures[0].axes
    low, high = axes.get_xlim()
    labels = [
        label for tick, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True) if low <= tick <= high
    ]
    assert len(labels) >= 2
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
    assert all(one.x1 < other.x0 for one, other in pairwise(boxes))


def test_equal_costs_stand_side_by_side(tmp_path, figures):
    draw(tmp_path / "cost.png", [("a", name, 2.0, 0.5, 0.4, 0.6) for name in "abc"])
    (axes,) = figures[0].axes
    shown = [bar.lines[0].get_transform().transform(bar.lines[0].get_xydata())[0] for bar in axes.containers]
    bars = [bar.lines[2][0].get_transform().transform([2.0, 50.0]) for bar in axes.containers]
    np.testing.assert_allclose(shown, bars)
    np.testing.assert_allclose(np.diff(shown, axis=0), [[cost.ASIDE * figures[0].dpi, 0]] * 2, atol=1e-6)


def test_long_titles_are_broken(tmp_path, figures):
    titles = [f"a task with a long name {number}, linear, grouped split (macro_miou)" for number in range(3)]
    draw(tmp_path / "cost.png", [(title, "a", 2.0, 0.5, 0.4, 0.6) for title in titles])
    redraw(figures[0])
    boxes = [axes._left_title.get_window_extent() for axes in figures[0].axes]
    assert all(one.x1 < other.x0 for one, other in pairwise(boxes))


def test_without_costs_there_are_no_ticks(tmp_path, figures):
    draw(tmp_path / "cost.png", POINTS[:1])
    assert list(figures[0].axes[0].get_xticks()) == []
    assert list(figures[0].axes[0].get_xticks(minor=True)) == []


def test_a_table_without_rows_says_so(tmp_path, figures):
    save_cost(tmp_path / "cost.png", [], [], [], [], [], [])
    assert (tmp_path / "cost.png").stat().st_size > 0
    assert [text.get_text() for text in figures[0].texts] == ["no row to show"]
