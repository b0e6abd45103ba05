import numpy as np
import pytest
from omegaconf import OmegaConf
from sklearn.ensemble import RandomForestClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from vision_lowrank.baselines import SpectralSVM, fit_baseline, is_baseline
from vision_lowrank.data.modules import SceneDataModule
from vision_lowrank.shape_svm import ShapeSVM

FOREST = OmegaConf.create({"_target_": "vision_lowrank.baselines.PatchForest", "trees": 7, "seed": 3})


@pytest.fixture(scope="module")
def data():
    split = {"kind": "random", "train": 10, "validation": 4}
    module = SceneDataModule("indian_pines", "nowhere", 3, 5, False, split, 8, 8, seed=0)
    # classes of 20 pixels and more have enough for this split
    module.setup()
    return module


def test_forest_votes_on_flattened_patches(data):
    probabilities, facts = fit_baseline(FOREST, data)
    image = np.pad(data.scaled_image(), ((0, 0), (1, 1), (1, 1)), mode="reflect")
    labels = data.scene.labels.reshape(-1)

    def patches(pixels):
        return np.stack([image[:, i : i + 3, j : j + 3].ravel() for i, j in zip(*divmod(pixels, 145), strict=True)])

    forest = RandomForestClassifier(7, random_state=3).fit(patches(data.split.train), labels[data.split.train])
    some = np.arange(0, labels.size, 211)
    np.testing.assert_allclose(probabilities[some], forest.predict_proba(patches(some)), atol=1e-6)
    assert facts == {"chosen": {"trees": 7}}


def test_svm_takes_the_settings_that_validate_best(data):
    svm = SpectralSVM([0.01, 100], [1e-6, 1e-3])
    labels = data.scene.labels.reshape(-1)
    train, held = data.split.train, data.split.validation
    svm.fit(svm.features(data, train), labels[train], svm.features(data, held), labels[held])
    spectra = data.scene.image.reshape(200, -1).T
    scaler = StandardScaler().fit(spectra[train])
    scores = {
        (cost, gamma): SVC(C=cost, gamma=gamma)
        .fit(scaler.transform(spectra[train]), labels[train])
        .score(scaler.transform(spectra[held]), labels[held])
        for cost in (0.01, 100)
        for gamma in (1e-6, 1e-3)
    }
    assert scores[svm.chosen["C"], svm.chosen["gamma"]] == max(scores.values())
    assert max(scores.values()) > min(scores.values())
    best = SVC(**svm.chosen).fit(scaler.transform(spectra[train]), labels[train])
    found = svm.probabilities(svm.features(data, data.split.test))
    assert np.array_equal(found.argmax(1), best.predict(scaler.transform(spectra[data.split.test])))
    assert set(np.unique(found)) == {0, 1}


def test_settings_are_validated_on_validation_pixels_after_training_on_the_others():
    # noisy sets, chosen such that the two directions disagree
    generator = np.random.default_rng(16)

    def noisy():
        values = generator.normal(size=(12, 1)).round(1)
        return values, ((values[:, 0] > 0) ^ (generator.random(12) < 0.25)).astype(int)

    (train, labels), (validation, held) = noisy(), noisy()
    svm = SpectralSVM([100], [0.01, 30])
    svm.fit(train, labels, validation, held)
    assert svm.chosen == {"C": 100, "gamma": 0.01}
    svm.fit(validation, held, train, labels)
    assert svm.chosen == {"C": 100, "gamma": 30}


def test_shapes_are_logarithms_of_spectra_less_their_mean(data):
    pixels = np.array([0, 77, 145 * 145 - 1])
    logarithm = np.log(data.scene.image.reshape(200, -1)[:, pixels].T.astype(np.float64))
    found = ShapeSVM([1], [1]).features(data, pixels)
    np.testing.assert_allclose(found, logarithm - logarithm.mean(1, keepdims=True), atol=1e-5)


def test_chance_decides_between_the_classes_of_training_alone(data):
    config = OmegaConf.create({"_target_": "vision_lowrank.baselines.Chance", "seed": 2})
    probabilities, facts = fit_baseline(config, data)
    known = np.unique(data.scene.labels.flat[data.split.train])
    assert len(known) > 1
    np.testing.assert_allclose(probabilities[:, known], 1 / len(known), rtol=1.1e-3)
    assert probabilities.sum(1) == pytest.approx(1, rel=1.1e-3)
    counts = np.bincount(probabilities.argmax(1), minlength=data.num_classes)
    # each as often as the others, by five deviations
    expected = 145 * 145 / len(known)
    assert np.abs(counts[known] - expected).max() < 5 * np.sqrt(expected)
    assert facts == {"chosen": {}}


def test_what_is_a_baseline():
    assert is_baseline(FOREST)
    assert not is_baseline(OmegaConf.create({"_target_": "vision_lowrank.models.lola_specvit_tiny"}))
