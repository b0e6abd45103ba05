import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from vision_lowrank.errors import DataError
from vision_lowrank.plots.figures import (
    UNLABELLED_COLOUR,
    class_handles,
    colour_labels,
    figure_file,
    legend_columns,
    legend_size,
    map_size,
)

COLOURS = ["#ff0000", "#00ff80", "#102030"]


@pytest.mark.parametrize("kind", [np.uint8, np.int64])
def test_colours_follow_the_classes(kind):
    picture = colour_labels(np.array([[0, 2, 1], [255, 1, 0]], dtype=kind), COLOURS)
    expected = [
        [(1, 0, 0), (16 / 255, 32 / 255, 48 / 255), (0, 1, 128 / 255)],
        [to_rgb(UNLABELLED_COLOUR), (0, 1, 128 / 255), (1, 0, 0)],
    ]
    assert np.allclose(picture, expected, atol=1e-6)
    assert picture.dtype == np.float32


@pytest.mark.parametrize("value", [3, 254, 256, -1])
def test_a_class_without_colour_is_named(value):
    with pytest.raises(DataError, match=f"map holds class {value}, but there are colours for 0 to 2 only"):
        colour_labels(np.array([[0, value]]), COLOURS)


def test_legend_lists_unlabelled_pixels_only_where_there_are_some():
    names = ["corn", "oats", "soil"]
    entries = [(handle.get_label(), handle.get_facecolor()[:3]) for handle in class_handles(names, COLOURS, True)]
    assert entries == [
        *((name, to_rgb(colour)) for name, colour in zip(names, COLOURS, strict=True)),
        ("unlabelled", to_rgb(UNLABELLED_COLOUR)),
    ]
    assert [handle.get_label() for handle in class_handles(names, COLOURS, False)] == names


def test_a_legend_takes_the_columns_that_fit(tmp_path):
    names = [f"class number {index}" for index in range(9)]
    handles = class_handles(names, ["#123456"] * 9, False)
    for width in (3.0, 5.0, 8.0):
        columns = legend_columns(handles, width)
        with figure_file(tmp_path / "legend.png", width, 3) as figure:
            legend = figure.legend(handles=handles, ncols=columns, columnspacing=1.2)
        box = legend.get_window_extent()
        assert box.width <= width * figure.dpi
        assert box.height <= legend_size(handles, columns)[1] * figure.dpi * 1.1
        # one more would not have fitted
        assert columns == 9 or (columns + 1) * box.width / columns > 0.8 * width * figure.dpi
    assert legend_columns(handles, 0.1) == 1


def test_maps_keep_their_proportions():
    assert map_size((100, 50), longest=5) == (2.5, 5)
    assert map_size((30, 120, 3), longest=4) == (4, 1)


def test_the_common_style_stays_inside(tmp_path):
    with matplotlib.rc_context({"font.size": 13}):
        with figure_file(tmp_path / "a.png", 2, 1) as figure:
            axes = figure.add_subplot()
            axes.set_facecolor("#00ff80")
            assert not axes.spines["top"].get_visible()
            assert axes.xaxis.label.get_size() == 8
        assert matplotlib.rcParams["font.size"] == 13
    picture = imread(tmp_path / "a.png")[..., :3]
    assert (np.abs(picture - to_rgb("#00ff80")).max(-1) < 0.01).mean() > 0.3


def draw_half(path):
    with figure_file(path, 2, 1) as figure:
        figure.add_subplot()
        raise RuntimeError("half-way")


def test_an_error_while_drawing_leaves_the_older_picture(tmp_path):
    path = tmp_path / "map.png"
    path.write_bytes(b"older")
    with pytest.raises(RuntimeError, match="half-way"):
        draw_half(path)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_while_writing_leaves_the_older_picture(tmp_path, monkeypatch):
    def write_half(figure, target, **options):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", write_half)
    path = tmp_path / "map.png"
    path.write_bytes(b"older")
    with pytest.raises(OSError, match="No space left"), figure_file(path, 2, 1):
        pass
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_names_are_drawn_as_they_are_written(tmp_path):
    names = ["a $ of corn", "$alpha$", "$broken^", "_soil"]
    handles = class_handles(names, ["#112233"] * 4, False)
    with figure_file(tmp_path / "legend.png", 3, 2) as figure:
        legend = figure.legend(handles=handles)
    assert [text.get_text() for text in legend.get_texts()] == names
    assert not any(text.get_parse_math() for text in legend.get_texts())
