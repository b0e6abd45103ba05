import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from vision_lowrank.plots import confusion
from vision_lowrank.plots.confusion import save_confusion

NAMES = ["corn", "oats", "soil", "absent"]
COUNTS = np.array([[30, 10, 0, 0], [0, 5, 0, 0], [1, 0, 9999, 0], [0, 0, 0, 0]])


@pytest.fixture
def figure(tmp_path, drawn):
    figures = drawn(confusion)
    save_confusion(tmp_path / "confusion.png", COUNTS, NAMES)
    return figures[0]


def test_cells_are_percent_of_the_row(figure):
    axes = figure.axes[0]
    cells = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axes.texts}
    # zeros stay empty, nearly all is not all, nearly nothing is not nothing
    assert cells == {(0, 0): "75.0", (0, 1): "25.0", (1, 1): "100", (2, 0): "0.1", (2, 2): "99.9"}
    shown = axes.images[0].get_array()
    assert np.allclose(shown[:2], [[75, 25, 0, 0], [0, 100, 0, 0]])
    assert np.allclose(shown[2], [0.01, 0, 99.99, 0])
    assert shown.mask[3].all()
    assert not shown.mask[:3].any()
    assert axes.images[0].get_clim() == (0, 100)


def test_rows_are_the_true_classes_with_their_pixels(figure):
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "corn (40)",
        "oats (5)",
        "soil (10,000)",
        "absent (0)",
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == NAMES
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class (labelled pixels)")
    # the first class is at the top
    assert axes.get_ylim()[0] > axes.get_ylim()[1]


def test_the_picture_has_the_colours_of_the_cells(figure, tmp_path, pixels_of):
    blues = matplotlib.colormaps["Blues"]
    found = {
        percent: pixels_of(tmp_path / "confusion.png", blues(percent / 100)[:3]) for percent in (25.0, 75.0, 100.0)
    }
    grey = pixels_of(tmp_path / "confusion.png", to_rgb("0.9"))
    assert all(len(pixels) > 500 for pixels in found.values())
    # the empty row is four cells wide, and below the others
    assert len(grey) == pytest.approx(4 * len(found[25.0]), rel=0.3)
    assert np.median(grey[:, 0]) > np.percentile(found[100.0][:, 0], 90)
    assert np.median(found[75.0][:, 1]) < np.median(found[25.0][:, 1])
