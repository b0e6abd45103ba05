import numpy as np
import pytest

from vision_lowrank.errors import ConfigError
from vision_lowrank.random_walk import CLAMP, IGNORE, LEAST_EDGE, Walk, random_walk, read_walk


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
    found = random_walk(probabilities, image, seeds, Walk(sharpness, prior, 1))
    np.testing.assert_allclose(found, slow_walk(probabilities, image, seeds, sharpness, prior), atol=1e-10)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-10)


def test_labels_spread_within_a_field_and_stop_at_its_edge():
    image = np.zeros((1, 9, 12))
    image[:, :, 7:] = 10
    image += np.random.default_rng(0).normal(0, 0.1, image.shape)
    seeds = np.full((9, 12), IGNORE)
    seeds[0, 0], seeds[8, 11] = 0, 1
    nothing_known = np.full((108, 2), 0.5)
    walked = random_walk(nothing_known, image, seeds, Walk(sharpness=0.1, prior=1e-6, smoothing=1))
    expected = np.where(np.arange(12) < 7, 0, 1)
    assert np.array_equal(walked.argmax(1).reshape(9, 12), np.tile(expected, (9, 1)))


def test_a_strong_prior_is_the_classifier():
    generator = np.random.default_rng(1)
    probabilities = generator.dirichlet(np.ones(2), 30)
    seeds = np.full((5, 6), IGNORE)
    walked = random_walk(probabilities, generator.normal(size=(2, 5, 6)), seeds, Walk(1.0, 1e9, 3))
    np.testing.assert_allclose(walked, probabilities, atol=1e-6)


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
