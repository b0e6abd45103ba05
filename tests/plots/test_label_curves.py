import numpy as np
import pytest
from matplotlib.colors import to_hex

from vision_lowrank.plots import label_curves
from vision_lowrank.plots.label_curves import Curve, save_label_curves

SVM = Curve([5, 10, 50], [0.3, 0.4, 0.5], [0.2, 0.35, 0.5], [0.4, 0.45, 0.5])
NET = Curve([5, 10, 50], [0.4, 0.6, 0.7], [0.3, 0.5, 0.6], [0.5, 0.7, 0.8])
SHARES = Curve([0.01, 0.05], [0.8, 0.9], [0.7, 0.85], [0.9, 0.95])
PANELS = [
    [("random, pixels a class", {"net": NET, "svm": SVM}), ("random, shares", {"svm": SHARES})],
    [("blocks, shares", {"svm": SHARES})],
]


@pytest.fixture
def axes(tmp_path, drawn):
    figures = drawn(label_curves)
    save_label_curves(tmp_path / "curve.png", PANELS)
    return figures[0].axes


def test_curves_and_intervals_are_where_they_belong(axes):
    assert [panel.get_title(loc="left") for panel in axes] == [title for row in PANELS for title, _ in row]
    first = axes[0]
    for bar, curve in zip(first.containers, (NET, SVM), strict=True):
        x, y = bar.lines[0].get_xydata().T
        np.testing.assert_allclose(y, 100 * np.array(curve.values))
        # side by side at a number of labels, in the order of the methods
        np.testing.assert_allclose(x, curve.labels, rtol=0.05)
        ends = np.array([segment[:, 1] for segment in bar.lines[2][0].get_segments()])
        np.testing.assert_allclose(ends, 100 * np.stack([curve.lows, curve.highs], axis=1))
    net, svm = (bar.lines[0].get_xdata() for bar in first.containers)
    assert (net < svm).all()
    assert first.get_xscale() == "log"


def test_ticks_are_the_numbers_of_labels(axes):
    texts = [[tick.get_text() for tick in panel.get_xticklabels()] for panel in axes]
    assert texts == [["5", "10", "50"], ["1", "5"], ["1", "5"]]
    assert ["percent" in panel.get_xlabel() for panel in axes] == [False, True, True]


def test_a_method_looks_the_same_in_all_panels(axes, tmp_path, pixels_of):
    looks = [{(bar.lines[0].get_color(), bar.lines[0].get_marker()) for bar in panel.containers[-1:]} for panel in axes]
    assert looks == [{("C1", "s")}] * 3
    (legend,) = axes[0].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["net", "svm"]
    assert len(pixels_of(tmp_path / "curve.png", to_hex("C0"))) > 100
