"""Scaling and components against scikit-learn's StandardScaler and PCA."""

import logging

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vision_lowrank.data import preprocessing
from vision_lowrank.data.preprocessing import ScenePreprocessor
from vision_lowrank.data.spectral_shape import spectral_shape
from vision_lowrank.errors import ConfigError, DataError

CHANNELS = 12


@pytest.fixture
def image():
    """Correlated bands of very different level and spread, (channels, height, width)."""
    generator = np.random.default_rng(8)
    sources = generator.normal(size=(CHANNELS, 9 * 7)) * 0.7 ** np.arange(CHANNELS)[:, None]
    values = generator.normal(size=(CHANNELS, CHANNELS)) @ sources
    level, spread = generator.uniform(100, 5000, (2, CHANNELS, 1))
    return (level + spread * values).reshape(CHANNELS, 9, 7).astype(np.float32)


@pytest.fixture
def spectra(image):
    """Some of the pixels, (pixels, channels)."""
    return image.reshape(CHANNELS, -1).T[::2]


def apply_sklearn(model, image):
    return model.transform(image.reshape(CHANNELS, -1).T).T.reshape(-1, *image.shape[1:])


def test_standardisation_is_scikit_learns(image, spectra):
    preprocessor = ScenePreprocessor(None, whiten=False).fit(spectra)
    expected = apply_sklearn(StandardScaler().fit(spectra.astype(np.float64)), image)
    assert np.allclose(preprocessor.transform(image), expected, atol=1e-4)
    assert preprocessor.num_channels == CHANNELS


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("components", [1, 5, CHANNELS])
def test_components_are_scikit_learns_up_to_sign(image, spectra, components, whiten):
    preprocessor = ScenePreprocessor(components, whiten).fit(spectra)
    found = preprocessor.transform(image)
    reference = make_pipeline(StandardScaler(), PCA(components, whiten=whiten, svd_solver="full"))
    expected = apply_sklearn(reference.fit(spectra.astype(np.float64)), image)
    signs = np.sign((found * expected).sum(axis=(1, 2)))
    assert np.allclose(found, signs[:, None, None] * expected, atol=2e-3)
    assert preprocessor.num_channels == components
    if whiten:
        training = found.reshape(components, -1)[:, ::2]
        assert np.allclose(training.std(axis=1, ddof=1), 1, atol=1e-3)


@pytest.fixture
def positive(image):
    """The image with all values above 50, and some of its pixels."""
    image = np.abs(image) + 50
    return image, image.reshape(CHANNELS, -1).T[::2]


def test_brightness_does_not_change_the_shape_of_a_spectrum():
    spectra = np.random.default_rng(2).uniform(50, 200, (30, CHANNELS))
    found = spectral_shape(spectra, axis=1)
    np.testing.assert_allclose(found, spectral_shape(spectra * 3, axis=1), atol=1e-5)
    # ratios of bands stay
    np.testing.assert_allclose(np.exp(found[:, 2] - found[:, 5]), spectra[:, 2] / spectra[:, 5], rtol=1e-4)
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-5)


@pytest.mark.parametrize("components", [None, 5])
def test_without_brightness_shapes_are_scaled_and_projected(positive, components, monkeypatch):
    image, spectra = positive
    preprocessor = ScenePreprocessor(components, whiten=False, brightness=False).fit(spectra)
    # rows come some at a time
    monkeypatch.setattr(preprocessing, "CHUNK_BYTES", 4 * CHANNELS * 7 * 2)
    found = preprocessor.transform(image)
    parts = [StandardScaler(), *([] if components is None else [PCA(components, svd_solver="full")])]
    reference = make_pipeline(*parts).fit(spectral_shape(spectra, axis=1).astype(np.float64))
    expected = apply_sklearn(reference, spectral_shape(image, axis=0))
    signs = np.sign((found * expected).sum(axis=(1, 2)))
    assert np.allclose(found, signs[:, None, None] * expected, atol=1e-3)
    # a factor on a pixel falls out
    image[:, 3] *= 2
    assert np.allclose(preprocessor.transform(image), found, atol=1e-3)
    again = ScenePreprocessor.from_state(preprocessor.state())
    assert np.array_equal(again.transform(image), preprocessor.transform(image))


def test_reflectances_below_one_have_no_logarithms(positive):
    with pytest.raises(DataError, match="most values of the spectra are 1 or less; give digital numbers"):
        ScenePreprocessor(None, whiten=False, brightness=False).fit(positive[1] / 1e5)


def test_a_constant_band_comes_out_as_zero_and_is_named(image, spectra, caplog):
    image[4] = 0.1
    # the mean of 31 times 0.1 is not exactly 0.1, so the computed deviation is not exactly 0
    spectra = spectra[:31].astype(np.float64)
    spectra[:, 4] = 0.1
    with caplog.at_level(logging.WARNING):
        scaled = ScenePreprocessor(None, whiten=False).fit(spectra).transform(image + np.float32(3))
    assert (scaled[4] == 0).all()
    assert np.ptp(scaled[5]) > 1
    assert "1 bands constant over the training pixels, masked; indices [4]" in caplog.text
    components = ScenePreprocessor(11, whiten=True).fit(spectra)
    assert np.allclose(components.projection[:, 4], 0, atol=1e-6)


def test_whitening_blows_up_no_noise_where_bands_repeat_each_other(image, spectra):
    image[8:] = 2 * image[:4] + 3
    found = ScenePreprocessor(CHANNELS, whiten=True).fit(spectra).transform(image)
    assert np.abs(found[8:]).max() < 0.2
    assert found[:8].reshape(8, -1)[:, ::2].std(axis=1, ddof=1) == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_missing_values_are_refused(spectra, value):
    damaged = spectra.copy()
    damaged[3, 2] = value
    with pytest.raises(DataError, match="training spectra hold NaN or infinite values"):
        ScenePreprocessor(None, whiten=False).fit(damaged)


def test_fit_leaves_the_spectra_alone(spectra):
    spectra = spectra.astype(np.float64)
    before = spectra.copy()
    ScenePreprocessor(3, whiten=True).fit(spectra)
    assert np.array_equal(before, spectra)


@pytest.mark.parametrize(
    ("pixels", "components", "constant", "most"),
    [(8, 8, 0, 7), (32, 13, 0, 12), (32, 11, 2, 10)],
)
def test_more_components_than_the_data_have_are_refused(spectra, pixels, components, constant, most):
    chosen = spectra[:pixels].copy()
    chosen[:, :constant] = 7
    message = f"components is {components}, but {pixels} training pixels with {12 - constant} .* have {most} at most"
    with pytest.raises(ConfigError, match=message):
        ScenePreprocessor(components, whiten=False).fit(chosen)
    assert ScenePreprocessor(most, whiten=False).fit(chosen).num_channels == most


@pytest.mark.parametrize(("components", "whiten"), [(0, False), (-2, True), (None, True)])
def test_impossible_options_are_refused(components, whiten):
    with pytest.raises(ConfigError, match=r"components"):
        ScenePreprocessor(components, whiten)


@pytest.mark.parametrize("components", [None, 4])
def test_rows_in_pieces_equal_rows_at_once(image, spectra, components, monkeypatch):
    preprocessor = ScenePreprocessor(components, whiten=False).fit(spectra)
    whole = preprocessor.transform(image)
    # one row, then four rows a piece, which leaves a rest of one
    for rows in (1, 4):
        monkeypatch.setattr(preprocessing, "CHUNK_BYTES", rows * 4 * CHANNELS * 7)
        pieces = preprocessor.transform(image, out=np.full_like(whole, np.nan))
        assert np.allclose(pieces, whole, atol=1e-5)
    flat = (image.reshape(CHANNELS, -1) - preprocessor.mean[:, None]) * preprocessor.gain[:, None]
    expected = flat if components is None else preprocessor.projection @ flat
    assert np.allclose(whole, expected.reshape(whole.shape), atol=1e-5)


def test_the_result_can_go_into_a_larger_array(image, spectra):
    preprocessor = ScenePreprocessor(4, whiten=False).fit(spectra)
    cube = np.zeros((4, 11, 9), dtype=np.float32)
    preprocessor.transform(image, out=cube[:, 1:-1, 1:-1])
    assert np.array_equal(cube[:, 1:-1, 1:-1], preprocessor.transform(image))
    assert (cube[:, 0] == 0).all()


@pytest.mark.parametrize(("components", "whiten"), [(None, False), (4, False), (4, True)])
def test_state_carries_everything(image, spectra, components, whiten):
    preprocessor = ScenePreprocessor(components, whiten).fit(spectra)
    again = ScenePreprocessor.from_state(preprocessor.state())
    assert np.array_equal(again.transform(image), preprocessor.transform(image))
    assert again.num_channels == preprocessor.num_channels
    assert set(preprocessor.state()) == {"mean", "gain"} | ({"projection"} if components else set())


def test_a_state_that_does_not_fit_is_refused(image, spectra):
    state = ScenePreprocessor(4, whiten=False).fit(spectra).state()
    with pytest.raises(DataError, match="'gain' is missing; it holds mean, projection"):
        ScenePreprocessor.from_state({"mean": state["mean"], "projection": state["projection"]})
    for name in ("gain", "projection"):
        with pytest.raises(DataError, match="differ in channels"):
            ScenePreprocessor.from_state({**state, name: state[name][..., 1:]})
    with pytest.raises(DataError, match="image has 11 channels, the preprocessing was fitted on 12"):
        ScenePreprocessor.from_state(state).transform(image[1:])
