import numpy as np
import pytest
from matplotlib.colors import to_rgb

from vision_lowrank.errors import DataError
from vision_lowrank.plots import maps
from vision_lowrank.plots.figures import UNLABELLED_COLOUR
from vision_lowrank.plots.maps import (
    CORRECT,
    WRONG,
    composite,
    error_picture,
    save_composite,
    save_error_map,
    save_label_map,
    save_overview,
)

NAMES = ["corn", "oats", "soil", "absent"]
COLOURS = ["#7b3294", "#00c853", "#3030ff", "#ffaa00"]


def test_stretch_runs_from_the_2nd_to_the_98th_percentile():
    # of the values 0 to 100 the 2nd percentile is 2 and the 98th is 98
    ramp = np.arange(101.0).reshape(1, 101)
    image = np.stack([ramp, 10 * ramp - 500, 100 - ramp, np.full((1, 101), 7.0)])
    picture = composite(image, (2, 1, 0))
    expected = np.clip((np.arange(101) - 2) / 96, 0, 1)
    assert np.allclose(picture[0, :, 0], expected[::-1], atol=1e-6)
    assert np.allclose(picture[0, :, 1], expected, atol=1e-6)
    assert np.allclose(picture[0, :, 2], expected, atol=1e-6)
    assert picture.dtype == np.float32
    assert (composite(image, (3, 3, 3)) == 0).all()


def test_pixels_without_values_are_white_and_do_not_shape_the_stretch():
    ramp = np.arange(101.0).reshape(1, 101)
    image = np.stack([np.concatenate([ramp, [[1e6, np.nan]]], axis=1)] * 3)
    valid = np.ones((1, 103), bool)
    valid[0, 101:] = False
    picture = composite(image, (0, 1, 2), valid)
    assert (picture[0, 101:] == 1).all()
    assert np.array_equal(picture[:, :101], composite(image[..., :101], (0, 1, 2)))
    assert (composite(image, (0, 1, 2), np.zeros((1, 103), bool)) == 1).all()


def test_error_colours():
    picture = np.zeros((1, 4, 3), np.float32)
    picture[0, 1:] = (1.0, 0.5, 0.25)
    grey = 0.35 + 0.6 * (0.299 + 0.587 * 0.5 + 0.114 * 0.25)
    labels = np.array([[255, 255, 1, 1]])
    found = error_picture(picture, labels, np.array([[0, 255, 1, 0]]))
    right = 0.35 * grey + 0.65 * np.array(to_rgb(CORRECT))
    assert np.allclose(found[0], [[0.35] * 3, [grey] * 3, right, to_rgb(WRONG)], atol=1e-6)


@pytest.fixture(params=[(40, 40), (60, 20), (15, 90)], ids=["square", "tall", "wide"])
def labels(request):
    """Upper half class 0; below class 1 on the left, on the right class 2 above unlabelled pixels; class 3 nowhere."""
    height, width = request.param
    labels = np.zeros(request.param, np.int64)
    labels[height // 2 :, : width // 2] = 1
    labels[height // 2 :, width // 2 :] = 2
    labels[3 * height // 4 :, width // 2 :] = 255
    return labels


def check_map(pixels_of, path, labels):
    """Compares the areas and places of the colours with the label map; legend patches are small."""
    found = {value: pixels_of(path, colour) for value, colour in enumerate([*COLOURS, UNLABELLED_COLOUR])}
    total = sum(map(len, found.values()))
    for value, pixels in found.items():
        share = (labels == (255 if value == 4 else value)).mean()
        assert len(pixels) / total == pytest.approx(share, abs=0.03)
        assert len(pixels) > 0
    middle = {value: np.median(pixels, axis=0) for value, pixels in found.items()}
    assert middle[0][0] < middle[1][0]
    assert middle[2][0] < middle[4][0]
    assert middle[1][1] < middle[2][1]


def test_a_label_map_shows_its_classes_in_place(tmp_path, pixels_of, labels):
    save_label_map(tmp_path / "map.png", labels, NAMES, COLOURS)
    check_map(pixels_of, tmp_path / "map.png", labels)


def test_label_map_without_unlabelled_pixels_has_no_grey(tmp_path, pixels_of):
    save_label_map(tmp_path / "map.png", np.zeros((30, 30), int), NAMES, COLOURS)
    # soft edges of letters have a few
    assert len(pixels_of(tmp_path / "map.png", UNLABELLED_COLOUR)) < 200
    assert len(pixels_of(tmp_path / "map.png", COLOURS[3])) > 0


def test_a_composite_shows_its_pixels(tmp_path, pixels_of):
    picture = np.zeros((20, 30, 3), np.float32)
    picture[:, :10] = to_rgb("#aa3311")
    picture[:, 10:] = to_rgb("#1133aa")
    save_composite(tmp_path / "a.png", picture)
    left, right = pixels_of(tmp_path / "a.png", "#aa3311"), pixels_of(tmp_path / "a.png", "#1133aa")
    assert len(right) == pytest.approx(2 * len(left), rel=0.02)
    assert left[:, 1].max() < right[:, 1].min()


def test_an_error_map_shows_what_is_wrong_and_how_much(tmp_path, pixels_of, drawn):
    figures = drawn(maps)
    labels = np.zeros((20, 40), int)
    labels[:, 30:] = 255
    predicted = np.zeros((20, 40), int)
    predicted[:5, :10] = 2
    save_error_map(tmp_path / "a.png", np.ones((20, 40, 3), np.float32), labels, predicted, 0.75)
    wrong = pixels_of(tmp_path / "a.png", WRONG)
    right = pixels_of(tmp_path / "a.png", 0.35 * 0.95 + 0.65 * np.array(to_rgb(CORRECT)))
    assert len(right) / len(wrong) == pytest.approx(550 / 50, rel=0.1)
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == ["correct (75.00 % of test pixels)", "wrong (25.00 %)", "unlabelled"]


@pytest.mark.parametrize("shape", [(40, 30), (20, 60)])
def test_an_overview_has_four_panels_with_their_own_content(tmp_path, pixels_of, drawn, shape):
    figures = drawn(maps)
    labels = np.full(shape, 255)
    labels[: shape[0] // 2] = 0
    predicted = np.ones(shape, int)
    predicted[:, : shape[1] // 2] = 0
    picture = np.full((*shape, 3), 0.5, np.float32)
    save_overview(tmp_path / "a.png", picture, labels, predicted, NAMES, COLOURS, 0.75)
    panels = figures[0].axes
    assert [panel.get_title() for panel in panels] == [
        "colour composite",
        "ground truth",
        "predicted classes",
        "errors (25.00 % of test)",
    ]
    contents = [panel.images[0].get_array() for panel in panels]
    assert np.array_equal(contents[0], picture)
    assert np.allclose(contents[1][0, 0], to_rgb(COLOURS[0]))
    assert np.allclose(contents[1][-1, 0], to_rgb(UNLABELLED_COLOUR))
    assert np.allclose(contents[2][0, -1], to_rgb(COLOURS[1]))
    assert np.allclose(contents[3], error_picture(picture, labels, predicted))
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == [*NAMES, "unlabelled", "correct", "wrong"]
    # as many pixels of class 0 in the truth as in the prediction, half a panel each
    zeros, ones = pixels_of(tmp_path / "a.png", COLOURS[0]), pixels_of(tmp_path / "a.png", COLOURS[1])
    assert len(zeros) == pytest.approx(2 * len(ones), rel=0.06)


def test_a_wrong_class_leaves_the_older_map(tmp_path):
    path = tmp_path / "map.png"
    path.write_bytes(b"older")
    with pytest.raises(DataError, match="map holds class 9"):
        save_label_map(path, np.full((20, 20), 9), NAMES, COLOURS)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]
