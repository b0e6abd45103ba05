"""Fillings that learn nothing, against values worked out by hand."""

import numpy as np
import pytest

from vision_lowrank.evaluation.reconstruction import (
    fill_over_space,
    fill_over_wavelength,
    fill_with_mean,
    hidden_kinds,
    squared_errors,
)

WAVELENGTHS = np.array([500.0, 900.0, 600.0, 700.0])
HIDDEN_CHANNELS = np.array([False, False, True, True])


@pytest.fixture
def image():
    """Four channels that are planes over space and, in order of wavelength, a line over wavelength."""
    rows, columns = np.mgrid[:6, :5].astype(float)
    return np.stack([(1 + 2 * rows - columns) * (nanometres / 100 - 3) for nanometres in WAVELENGTHS])


@pytest.fixture
def hidden_pixels():
    hidden = np.zeros((6, 5), dtype=bool)
    hidden[2:4, 1:4] = True
    return hidden


@pytest.mark.parametrize("fill", [fill_with_mean, fill_over_space])
def test_where_nothing_is_known_the_training_mean_is_filled_in(fill, image):
    assert not fill(image, HIDDEN_CHANNELS, np.ones((6, 5), dtype=bool)).any()


def test_mean_of_what_is_shown(image, hidden_pixels):
    # else the mean of all pixels of a plane would be that of the shown ones
    image[:, hidden_pixels] += 50
    filled = fill_with_mean(image, HIDDEN_CHANNELS, hidden_pixels)
    for channel in (0, 1):
        shown = [image[channel, i, j] for i in range(6) for j in range(5) if not hidden_pixels[i, j]]
        assert filled[channel][hidden_pixels] == pytest.approx(sum(shown) / len(shown))
        assert np.array_equal(filled[channel][~hidden_pixels], image[channel][~hidden_pixels])
    assert not filled[2:].any()


def test_planes_are_filled_exactly_and_edges_by_the_nearest(image, hidden_pixels):
    filled = fill_over_space(image, HIDDEN_CHANNELS, hidden_pixels)
    np.testing.assert_allclose(filled[:2], image[:2], atol=1e-12)
    assert not filled[2:].any()
    corner = np.zeros((6, 5), dtype=bool)
    corner[0, 0] = True
    filled = fill_over_space(image, HIDDEN_CHANNELS, corner)
    # outside of the hull of the others: one of the two nearest
    assert filled[0, 0, 0] in (image[0, 0, 1], image[0, 1, 0])
    line = np.ones((6, 5), dtype=bool)
    line[2] = False
    filled = fill_over_space(image, HIDDEN_CHANNELS, line)
    np.testing.assert_allclose(filled[:2], np.broadcast_to(image[:2, 2:3], (2, 6, 5)))


def test_lines_over_wavelength_are_filled_exactly(image, hidden_pixels):
    filled = fill_over_wavelength(image, HIDDEN_CHANNELS, hidden_pixels, WAVELENGTHS)
    np.testing.assert_allclose(filled, image, atol=1e-12)
    outside = fill_over_wavelength(image, np.array([True, False, False, False]), hidden_pixels, WAVELENGTHS)
    np.testing.assert_allclose(outside[0], outside[2])


def test_errors_are_counted_by_kind_where_pixels_are_valid(image, hidden_pixels):
    valid = np.ones((6, 5), dtype=bool)
    valid[2] = False
    found = squared_errors(image, {"zero": np.zeros_like(image)}, HIDDEN_CHANNELS, hidden_pixels, valid)
    expected = {"positions": [0.0, 0], "channels": [0.0, 0], "both": [0.0, 0]}
    for c, i, j in np.ndindex(image.shape):
        kind = {(False, True): "positions", (True, False): "channels", (True, True): "both"}.get(
            (bool(HIDDEN_CHANNELS[c]), bool(hidden_pixels[i, j]))
        )
        if kind and valid[i, j]:
            expected[kind][0] += image[c, i, j] ** 2
            expected[kind][1] += 1
    for kind, (total, count) in expected.items():
        assert found[kind]["zero"] == (pytest.approx(total), count)
    kinds = hidden_kinds(HIDDEN_CHANNELS, hidden_pixels)
    assert sum(where.sum() for where in kinds.values()) == image.size - 2 * (~hidden_pixels).sum()
