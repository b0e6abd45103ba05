"""Scenes by windows, against the whole read at once."""

import numpy as np
import pytest
import rasterio

from vision_lowrank.data import streams
from vision_lowrank.data.preprocessing import ScenePreprocessor
from vision_lowrank.data.streams import Window, open_stream, plan_windows, read_scaled

HEIGHT, WIDTH, CHANNELS = 21, 17, 5


@pytest.fixture
def image():
    return np.random.default_rng(5).normal(100, 9, (CHANNELS, HEIGHT, WIDTH)).astype(np.float32)


@pytest.fixture
def write(tmp_path, image):
    """Function that writes the image as a GeoTIFF with further options."""

    def make(**options):
        profile = {"driver": "GTiff", "height": HEIGHT, "width": WIDTH, "count": CHANNELS, "dtype": "float32"}
        with rasterio.open(tmp_path / "scene.tif", "w", **(profile | options)) as file:
            file.write(image)
        return tmp_path / "scene.tif"

    return make


@pytest.mark.parametrize("margin", [0, 3, 16])
def test_windows_with_margins_are_cut_from_the_mirrored_scene(image, write, margin):
    image[1, 4, 6], image[2, 20, 0], image[3, 9, 9] = np.nan, np.inf, -9999
    stream = open_stream(write(nodata=-9999), "data")
    channels = np.array([3, 1, 2])
    taken = image[channels]
    present = np.isfinite(taken).all(0) & (taken != -9999).all(0)
    preprocessor = ScenePreprocessor(2, True).fit(taken[:, present].T)
    scaled = np.einsum("kc,chw->khw", preprocessor.projection, ((taken.T - preprocessor.mean) * preprocessor.gain).T)
    scaled[:, ~present] = 0
    expected = np.pad(scaled, ((0, 0), (margin, margin), (margin, margin)), mode="reflect")
    seen = np.zeros((HEIGHT, WIDTH), int)
    for window in plan_windows(HEIGHT, WIDTH, len(channels), 8, margin):
        found, valid = read_scaled(stream, channels, preprocessor, window, margin)
        rows, columns = slice(window.top, window.top + window.height), slice(window.left, window.left + window.width)
        around = (slice(rows.start, rows.stop + 2 * margin), slice(columns.start, columns.stop + 2 * margin))
        np.testing.assert_allclose(found.numpy(), expected[:, *around], atol=1e-4)
        assert np.array_equal(valid, present[rows, columns])
        seen[rows, columns] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("given", ["scene.hdr", "scene.dat"])
def test_an_envi_scene_is_read_from_two_files(given, image, tmp_path):
    profile = {"driver": "ENVI", "height": HEIGHT, "width": WIDTH, "count": CHANNELS, "dtype": "float32"}
    with rasterio.open(tmp_path / "scene.dat", "w", **profile) as file:
        file.write(image)
    # a changed header is another scene, so a prediction does not go on with it
    assert open_stream(tmp_path / given, "data").files == (tmp_path / "scene.hdr", tmp_path / "scene.dat")


def test_windows_are_as_wide_as_the_budget_allows(monkeypatch):
    monkeypatch.setattr(streams, "WINDOW_BYTES", 4 * 10 * (64 + 12) * (200 + 12))
    windows = plan_windows(130, 500, 10, 64, 6)
    assert [(window.top, window.height) for window in windows[::3]] == [(0, 64), (64, 64), (128, 2)]
    assert [(window.left, window.width) for window in windows[:3]] == [(0, 192), (192, 192), (384, 116)]
    # less than one window would make no progress
    monkeypatch.setattr(streams, "WINDOW_BYTES", 1)
    assert plan_windows(64, 100, 10, 64, 6) == [Window(0, 0, 64, 64), Window(0, 64, 64, 36)]


@pytest.mark.parametrize(("crs", "metres"), [("EPSG:32633", 30), ("EPSG:2263", 30 * 1200 / 3937), ("EPSG:4326", None)])
def test_pixel_size_in_metres_or_not_at_all(write, crs, metres):
    stream = open_stream(write(crs=crs, transform=rasterio.Affine(30, 0, 0, 0, -30, 0)), "data")
    assert stream.gsd == (metres if metres is None else pytest.approx(metres))
    assert stream.bands is None
