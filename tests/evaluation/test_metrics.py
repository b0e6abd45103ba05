import json

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from vision_lowrank.errors import DataError
from vision_lowrank.evaluation.metrics import Scores, score


def test_hand_made_example():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    predictions = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 0, 1])
    scores = score(predictions, labels, num_classes=3)
    assert scores.oa == pytest.approx(7 / 10)
    assert scores.per_class == pytest.approx((3 / 4, 1.0, 1 / 2))
    assert scores.aa == pytest.approx((3 / 4 + 1 + 1 / 2) / 3)
    chance = (4 * 4 + 2 * 4 + 4 * 2) / 100
    assert scores.kappa == pytest.approx((0.7 - chance) / (1 - chance))
    assert scores.confusion.tolist() == [[3, 1, 0], [0, 2, 0], [1, 1, 2]]


@pytest.mark.parametrize("container", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("num_classes", [2, 7, 22])
def test_agrees_with_scikit_learn(container, num_classes):
    generator = np.random.default_rng(num_classes)
    labels = generator.integers(0, num_classes, (40, 30))
    predictions = np.where(
        generator.random(labels.shape) < 0.6, labels, generator.integers(0, num_classes, labels.shape)
    )
    scores = score(container(predictions), container(labels), num_classes)
    flat = labels.ravel(), predictions.ravel()
    assert scores.oa == pytest.approx(reference.accuracy_score(*flat), abs=1e-6)
    assert scores.aa == pytest.approx(reference.balanced_accuracy_score(*flat), abs=1e-6)
    assert scores.kappa == pytest.approx(reference.cohen_kappa_score(*flat), abs=1e-6)
    assert scores.per_class == pytest.approx(tuple(reference.recall_score(*flat, average=None)), abs=1e-6)
    np.testing.assert_array_equal(scores.confusion, reference.confusion_matrix(*flat))


def test_absent_classes_are_left_out_of_the_average_and_named():
    labels = np.array([0, 0, 2, 2])
    predictions = np.array([0, 3, 2, 2])  # class 3 is predicted but never true
    scores = score(predictions, labels, num_classes=5)
    assert scores.aa == pytest.approx((1 / 2 + 1) / 2)
    assert scores.per_class == (0.5, None, 1.0, None, None)
    assert scores.absent == (1, 3, 4)
    described = scores.to_dict(["a", "b", "c", "d", "e"])
    assert described["absent_classes"] == ["b", "d", "e"]
    assert described["classes"][2] == {"name": "c", "pixels": 2, "accuracy": 1.0}


def test_unlabelled_pixels_do_not_count():
    labels = np.array([[0, 255], [1, 255]])
    assert score(np.array([[0, 9], [0, 1]]), labels, num_classes=2).oa == 0.5


def test_kappa_of_a_single_class_is_undefined():
    assert score(np.zeros(4, int), np.zeros(4, int), num_classes=3).kappa is None


def test_description_survives_json():
    generator = np.random.default_rng(0)
    scores = score(generator.integers(0, 4, 50), generator.integers(0, 3, 50), num_classes=4)
    text = json.dumps(scores.to_dict(list("abcd")), allow_nan=False)
    again = Scores.from_dict(json.loads(text))
    assert (again.oa, again.aa, again.kappa, again.per_class) == (scores.oa, scores.aa, scores.kappa, scores.per_class)
    np.testing.assert_array_equal(again.confusion, scores.confusion)
    with pytest.raises(DataError, match="2 class names for scores of 4"):
        scores.to_dict(["a", "b"])


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([0, 1], [0, 1, 1], r"shape \(2,\).*\(3,\)"),
        ([0, 3], [0, 1], "prediction 3 is outside 0 to 2"),
        ([0, 1], [0, -1], "label -1 is outside"),
        ([0, 1], [255, 255], "no labelled pixel"),
    ],
)
def test_bad_input(predictions, labels, message):
    with pytest.raises(DataError, match=message):
        score(np.array(predictions), np.array(labels), num_classes=3)
