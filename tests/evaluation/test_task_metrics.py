import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as reference
from torchmetrics.functional.classification import multiclass_jaccard_index

from vision_lowrank.errors import ConfigError, DataError
from vision_lowrank.evaluation.task_metrics import METRICS, bootstrap, image_confusion, score_task


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def labelled(generator, samples=60, labels=5):
    """Scores in steps of a tenth, so that many are equal, and labels that go with them; the last label is nowhere."""
    targets = (generator.random((samples, labels)) < 0.3).astype(int)
    targets[:, -1] = 0
    scores = np.clip(0.3 * targets + generator.random((samples, labels)), 0, 1).round(1)
    return scores, targets


def maps(generator, images=12, classes=4):
    """Maps and masks with unlabelled pixels; the last class is neither labelled nor predicted."""
    masks = generator.integers(0, classes - 1, (images, 6, 5))
    found = np.where(generator.random(masks.shape) < 0.6, masks, generator.integers(0, classes - 1, masks.shape))
    masks[generator.random(masks.shape) < 0.2] = 255
    return found, masks


def confusions(found, masks, classes=4):
    return np.stack([image_confusion(one, other, classes) for one, other in zip(found, masks, strict=True)])


def test_confusion_is_scikit_learns_without_unlabelled_pixels(generator):
    found, masks = maps(generator)
    found[masks == 255] = 99
    seen = masks != 255
    expected = reference.confusion_matrix(masks[seen], found[seen], labels=range(4))
    np.testing.assert_array_equal(confusions(found, masks).sum(0), expected)
    assert image_confusion(found[0], np.full((6, 5), 255), 4).tolist() == np.zeros((4, 4)).tolist()


def test_accuracy(generator):
    targets, found = generator.integers(0, 5, (2, 200))
    assert score_task("classification", found, targets, 5) == {"accuracy": pytest.approx(np.mean(found == targets))}


def test_average_precision_is_scikit_learns(generator):
    scores, targets = labelled(generator)
    found = score_task("multilabel", scores, targets, 5)
    assert found == {
        "micro_map": pytest.approx(reference.average_precision_score(targets, scores, average="micro"), abs=1e-6),
        # the label that does not occur is left out
        "macro_map": pytest.approx(
            reference.average_precision_score(targets[:, :4], scores[:, :4], average="macro"), abs=1e-6
        ),
        "micro_f1": pytest.approx(reference.f1_score(targets, scores > 0.5, average="micro"), abs=1e-6),
    }
    assert tuple(found) == METRICS["multilabel"]
    # one label that occurs is enough
    targets[:, 1:] = 0
    single = reference.average_precision_score(targets[:, 0], scores[:, 0])
    assert score_task("multilabel", scores, targets, 5)["macro_map"] == pytest.approx(single, abs=1e-6)


def test_the_three_means_of_intersection_over_union(generator):
    found, masks = maps(generator)
    seen = masks != 255
    scores = score_task("segmentation", confusions(found, masks), None, 4)
    single = reference.jaccard_score(masks[seen], found[seen], labels=range(3), average=None)
    assert scores == {
        "macro_miou": pytest.approx(single.mean()),
        "all_class_miou": pytest.approx(single.sum() / 4),
        "micro_jaccard": pytest.approx(reference.jaccard_score(masks[seen], found[seen], average="micro")),
    }
    micro = multiclass_jaccard_index(torch.tensor(found), torch.tensor(masks), 4, "micro", ignore_index=255)
    assert scores["micro_jaccard"] == pytest.approx(float(micro))


def test_a_class_that_is_predicted_but_never_true_lowers_the_others_only():
    # class 0: 2 of 3 found, class 1: 1 of 1 found, 2 is predicted once
    scores = score_task("segmentation", np.array([[[2, 0, 1], [0, 1, 0], [0, 0, 0]]]), None, 3)
    assert scores["macro_miou"] == pytest.approx((2 / 3 + 1) / 2)
    assert scores["all_class_miou"] == pytest.approx((2 / 3 + 1) / 3)
    assert scores["micro_jaccard"] == pytest.approx(3 / 5)


def test_interval_of_accuracy_is_the_binomial_one():
    found, targets = np.zeros(400, int), np.zeros(400, int)
    found[:120] = 1
    low, high = bootstrap("classification", "accuracy", found, targets, 2, draws=20_000)
    assert (low, high) == pytest.approx(stats.binom.ppf([0.025, 0.975], 400, 0.7) / 400, abs=0.0026)
    narrow = bootstrap("classification", "accuracy", found, targets, 2, draws=20_000, confidence=0.5)
    assert narrow == pytest.approx(stats.binom.ppf([0.25, 0.75], 400, 0.7) / 400, abs=0.0026)


def explicit(kind, metric, predictions, targets, groups, draws, seed):
    """Scores the samples of each draw, repeated as often as they were drawn, anew."""
    generator, names, values = np.random.default_rng(seed), np.unique(groups), []
    for _ in range(draws):
        drawn = names[generator.integers(len(names), size=len(names))]
        index = np.concatenate([np.flatnonzero(groups == name) for name in drawn])
        chosen = None if targets is None else targets[index]
        classes = 3 if predictions.ndim == 1 else predictions.shape[1]
        values.append(score_task(kind, predictions[index], chosen, classes)[metric])
    return np.quantile(values, [0.025, 0.975])


@pytest.mark.parametrize(("kind", "metric"), [(kind, metric) for kind, names in METRICS.items() for metric in names])
def test_weights_are_repeated_samples(generator, kind, metric):
    if kind == "classification":
        predictions, targets = generator.integers(0, 3, (2, 60))
    elif kind == "multilabel":
        predictions, targets = labelled(generator)
    else:
        predictions, targets = confusions(*maps(generator, 60)), None
    classes = 3 if kind == "classification" else predictions.shape[1]
    # sizes differ, order is mixed
    groups = np.array([f"crop{number}" for number in generator.integers(0, 9, 60)])
    found = bootstrap(kind, metric, predictions, targets, classes, groups, draws=40, seed=5)
    assert found == pytest.approx(explicit(kind, metric, predictions, targets, groups, 40, 5), abs=1e-6)
    single = bootstrap(kind, metric, predictions, targets, classes, draws=40, seed=5)
    assert single == pytest.approx(explicit(kind, metric, predictions, targets, np.arange(60), 40, 5), abs=1e-6)
    assert single != pytest.approx(found, abs=1e-6)


def test_groups_that_agree_widen_the_interval_by_the_root_of_their_size(generator):
    right = generator.random(100) < 0.6
    found = np.repeat(right, 16).astype(int)
    low, high = bootstrap("classification", "accuracy", found, np.ones(1600, int), 2)
    wide = bootstrap("classification", "accuracy", found, np.ones(1600, int), 2, np.repeat(np.arange(100), 16))
    assert (wide[1] - wide[0]) / (high - low) == pytest.approx(4, rel=0.15)


def test_blocks_of_draws_do_not_change_them(generator, monkeypatch):
    found, targets = generator.integers(0, 3, (2, 50))
    whole = bootstrap("classification", "accuracy", found, targets, 3, draws=70, seed=1)
    monkeypatch.setattr("vision_lowrank.evaluation.task_metrics.BLOCK", 300)
    assert bootstrap("classification", "accuracy", found, targets, 3, draws=70, seed=1) == whole
    assert bootstrap("classification", "accuracy", found, targets, 3, draws=70, seed=2) != whole


@pytest.mark.parametrize("right", [0, 1])
def test_all_right_or_all_wrong_is_not_certain(right):
    found, targets = np.full(40, right), np.ones(40, int)
    expected = stats.binomtest(10 * right, 10).proportion_ci(0.95, "wilson")
    groups = np.repeat(np.arange(10), 4)
    assert bootstrap("classification", "accuracy", found, targets, 2, groups) == pytest.approx(tuple(expected))


CLASSES, SCORES, MATRICES = np.array([0, 1]), np.array([[0.1, 0.9]]), np.ones((1, 2, 2), int)


@pytest.mark.parametrize(
    ("kind", "predictions", "targets", "message"),
    [
        ("classification", SCORES, CLASSES, r"predictions of shape \(1, 2\), not \(n\)"),
        ("classification", CLASSES[:0], CLASSES[:0], r"predictions of shape \(0,\)"),
        ("classification", CLASSES, np.array([0, 2]), "target 2 is outside 0 to 1"),
        ("classification", np.array([-1, 0]), CLASSES, "predicted class -1 is outside"),
        ("classification", CLASSES, CLASSES[:1], r"shape \(2,\) for targets of shape \(1,\)"),
        ("multilabel", CLASSES, CLASSES, r"not \(n, 2\)"),
        ("multilabel", 3 * SCORES, np.ones((1, 2)), "give probabilities"),
        ("multilabel", SCORES * np.nan, np.ones((1, 2)), "give probabilities"),
        ("multilabel", SCORES, np.full((1, 2), 255), "neither 0 nor 1"),
        ("multilabel", SCORES, np.zeros((1, 2)), "no sample has any label"),
        ("segmentation", CLASSES, None, r"not \(n, 2, 2\)"),
        ("segmentation", 0 * MATRICES, None, "no pixel of any image is labelled"),
    ],
)
def test_bad_input(kind, predictions, targets, message):
    with pytest.raises(DataError, match=message):
        score_task(kind, predictions, targets, 2)
    with pytest.raises(DataError, match=message):
        bootstrap(kind, METRICS[kind][0], predictions, targets, 2)


def test_bad_maps_and_questions():
    with pytest.raises(DataError, match=r"map of shape \(2, 3\) for a mask of shape \(2, 2\)"):
        image_confusion(np.zeros((2, 3), int), np.zeros((2, 2), int), 2)
    with pytest.raises(DataError, match="mask value 7 is outside 0 to 1"):
        image_confusion(np.zeros((2, 2), int), np.full((2, 2), 7), 2)
    with pytest.raises(ConfigError, match="'miou' is not one of segmentation: choose from macro_miou"):
        bootstrap("segmentation", "miou", MATRICES, None, 2)
    with pytest.raises(DataError, match="all samples are of one group"):
        bootstrap("classification", "accuracy", CLASSES, CLASSES, 2, groups=np.zeros(2))
    with pytest.raises(DataError, match="3 groups for 2 samples"):
        bootstrap("classification", "accuracy", CLASSES, CLASSES, 2, groups=np.zeros(3))
