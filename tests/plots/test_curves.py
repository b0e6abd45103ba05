import numpy as np
import pytest

from vision_lowrank.plots import curves
from vision_lowrank.plots.curves import save_curves

COURSE = {
    "loss": {"training": ([0.5, 1, 1.5], [3.0, 2.0, 1.5]), "validation": ([1, 2], [2.5, 2.0])},
    "accuracy": {"validation": ([1], [0.5])},
    "empty": {"training": ([], [])},
    "learning rate": {"group 0": ([0, 1], [0.1, 0.01])},
}


@pytest.fixture
def figures(drawn):
    return drawn(curves)


def test_panels_hold_the_given_points(tmp_path, figures):
    save_curves(tmp_path / "curves.png", COURSE)
    panels = {axes.get_ylabel(): axes for axes in figures[0].axes}
    assert list(panels) == ["loss", "accuracy", "learning rate"]
    for title, axes in panels.items():
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert lines.keys() == COURSE[title].keys()
        for name, (epochs, values) in COURSE[title].items():
            assert np.array_equal(lines[name].get_xydata(), np.stack([epochs, values], axis=1))
    # a single point is no line and needs a mark to be seen
    assert panels["accuracy"].get_lines()[0].get_marker() == "o"
    assert panels["loss"].get_lines()[1].get_marker() in (None, "None", "")


def test_the_best_epoch_is_marked_in_every_panel(tmp_path, figures):
    save_curves(tmp_path / "curves.png", COURSE, best_epoch=1.0)
    for axes in figures[0].axes:
        (line,) = [line for line in axes.get_lines() if line.get_label() == "best epoch"]
        assert list(line.get_xdata()) == [1.0, 1.0]


def test_a_line_has_its_colour_in_the_picture(tmp_path, pixels_of):
    save_curves(tmp_path / "curves.png", {"loss": {"training": ([0, 1, 2], [1.0, 1.0, 1.0])}})
    pixels = pixels_of(tmp_path / "curves.png", "C0")
    # the longest run is the level line, the legend's is short
    rows, counts = np.unique(pixels[:, 0], return_counts=True)
    level = pixels[pixels[:, 0] == rows[counts.argmax()], 1]
    assert np.ptp(level) > 300


@pytest.mark.parametrize("panels", [{}, {"loss": {"training": ([], [])}}])
def test_a_training_without_epochs_says_so(tmp_path, figures, panels):
    save_curves(tmp_path / "curves.png", panels)
    assert (tmp_path / "curves.png").stat().st_size > 0
    assert [text.get_text() for text in figures[0].texts] == ["no epoch was finished"]
