import numpy as np
import pytest

from vision_lowrank.data.scene import IGNORE
from vision_lowrank.errors import ConfigError
from vision_lowrank.random_walk import CLAMP, LEAST_EDGE, Walk, random_walk, read_walk


def slow_walk(probabilities, image, seeds, sharpness, prior):
    """Sets up the normal equations of the objective pixel by pixel and solves them densely."""
    _, height, width = image.shape
    pixels = [(i, j) for i in range(height) for j in range(width)]
    edges = [
        (a, b)
        for a, (i, j) in enumerate(pixels)
        for b, (k, m) in enumerate(pixels)
        if a < b and max(abs(i - k), abs(j - m)) == 1
    ]
    distance = {
        (a, b): sum((image[(slice(None), *pixels[a])] - image[(slice(None), *pixels[b])]) ** 2) for a, b in edges
    }
    median = np.median(list(distance.values()))
    matrix = prior * np.eye(len(pixels))
    target = prior * probabilities.copy()
    for (a, b), d in distance.items():
        weight = np.exp(-sharpness * d / median) + LEAST_EDGE
        matrix[[a, b], [a, b]] += weight
        matrix[[a, b], [b, a]] -= weight
    for a, (i, j) in enumerate(pixels):
        if seeds[i, j] != IGNORE:
            matrix[a, a] += CLAMP
            target[a, seeds[i, j]] += CLAMP
    return np.linalg.solve(matrix, target)


@pytest.mark.parametrize(("sharpness", "prior"), [(0.0, 0.0), (2.0, 0.1), (5.0, 1e-3)])
def test_against_dense_normal_equations(sharpness, prior):
    generator = np.random.default_rng(0)
    image = generator.normal(size=(3, 5, 4))
    probabilities = generator.dirichlet(np.ones(3), 20)
    seeds = np.full((5, 4), IGNORE)
    seeds[0, 1], seeds[4, 3], seeds[2, 0] = 0, 1, 2
    found = random_walk(probabilities, image, seeds, Walk(sharpness, prior, 1), np.ones((5, 4), bool))
    np.testing.assert_allclose(found, slow_walk(probabilities, image, seeds, sharpness, prior), atol=1e-10)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-10)


def test_labels_spread_within_a_field_and_stop_at_its_edge():
    image = np.zeros((1, 9, 12))
    image[:, :, 7:] = 10
    image += np.random.default_rng(0).normal(0, 0.1, image.shape)
    seeds = np.full((9, 12), IGNORE)
    seeds[0, 0], seeds[8, 11] = 0, 1
    nothing_known = np.full((108, 2), 0.5)
    walk = Walk(sharpness=0.1, prior=1e-6, smoothing=1)
    walked = random_walk(nothing_known, image, seeds, walk, np.ones((9, 12), bool))
    expected = np.where(np.arange(12) < 7, 0, 1)
    assert np.array_equal(walked.argmax(1).reshape(9, 12), np.tile(expected, (9, 1)))


def test_a_strong_prior_is_the_classifier():
    generator = np.random.default_rng(1)
    probabilities = generator.dirichlet(np.ones(2), 30)
    seeds = np.full((5, 6), IGNORE)
    walked = random_walk(
        probabilities, generator.normal(size=(2, 5, 6)), seeds, Walk(1.0, 1e9, 3), np.ones((5, 6), bool)
    )
    np.testing.assert_allclose(walked, probabilities, atol=1e-6)


def test_pixels_without_values_change_nothing_beside_them():
    generator = np.random.default_rng(2)
    image, probabilities = generator.normal(size=(3, 8, 6)), generator.dirichlet(np.ones(3), 48)
    seeds = np.full((8, 6), IGNORE)
    seeds[1, 1], seeds[6, 4], seeds[3, 0] = 0, 1, 2
    walk = Walk(sharpness=2.0, prior=0.1, smoothing=3)
    # four times as many columns, of which the scene has no values, and zeros instead
    wide = np.pad(image, ((0, 0), (0, 0), (0, 18)))
    padded = np.pad(probabilities.reshape(8, 6, 3), ((0, 0), (0, 18), (0, 0)), constant_values=1 / 3).reshape(-1, 3)
    valid = np.pad(np.ones((8, 6), bool), ((0, 0), (0, 18)))
    marked = np.pad(seeds, ((0, 0), (0, 18)), constant_values=IGNORE)
    found = random_walk(padded, wide, marked, walk, valid).reshape(8, 24, 3)[:, :6]
    # the features that the window averages at the border between are those that are there
    means = np.zeros_like(image)
    for row in range(8):
        for column in range(6):
            # beyond the border of the scene it mirrors
            rows = [1 if i < 0 else 6 if i > 7 else i for i in range(row - 1, row + 2)]
            columns = [1 if j < 0 else j for j in range(column - 1, column + 2) if j < 6]
            means[:, row, column] = np.mean([image[:, i, j] for i in rows for j in columns], axis=0)
    alone = slow_walk(probabilities, means, seeds, 2.0, 0.1).reshape(8, 6, 3)
    # but for edges of the least weight
    np.testing.assert_allclose(found, alone, atol=2e-5)


@pytest.mark.parametrize("settings", [(-1, 0, 1), (1, -1, 1), (1, 0, 0)])
def test_wrong_settings(settings):
    with pytest.raises(ConfigError, match="random_walk"):
        Walk(*settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prior": "strong"}, "random_walk: prior is 'strong', which is not a number"),
        ({"smoothing": 2.5}, "random_walk: smoothing is 2.5, which is not a whole number"),
        ({"sharp": 1}, "random_walk: unknown key sharp, did you mean sharpness"),
        ({"sharpness": float("nan")}, "random_walk: sharpness=nan"),
    ],
)
def test_wrong_settings_in_a_configuration(change, message):
    settings = {"sharpness": 4, "prior": 0.001, "smoothing": 5}
    assert read_walk(settings) == Walk(4.0, 0.001, 5)
    with pytest.raises(ConfigError, match=message):
        read_walk(settings | change)
