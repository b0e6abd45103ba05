import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, jaccard_score
from sklearn.neighbors import KNeighborsClassifier

from vision_lowrank.errors import ConfigError, DataError
from vision_lowrank.evaluation import probes
from vision_lowrank.evaluation.probes import choose_logistic, knn, knn_masks


def clouds(seed, samples, spread=1.0):
    """Three classes in six dimensions, of which one has a scale of its own."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, samples)
    features = np.eye(3, 6)[labels] + spread * generator.normal(size=(samples, 6))
    features[:, 5] = 1000 + 50 * features[:, 5]
    return features.astype(np.float32), labels


def marks(seed, samples, labels=3):
    """Labels that depend on one feature each, and the features."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(samples, 6))
    return features, (features[:, :labels] + generator.normal(size=(samples, labels)) > 0.5).astype(int)


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("block", [1 << 25, 700])
def test_neighbours_are_scikit_learns(k, block, monkeypatch):
    monkeypatch.setattr(probes, "BLOCK", block)
    # the sixth feature would make all directions equal
    (train, labels), (query, _) = ((features[:, :5], labels) for features, labels in (clouds(0, 200), clouds(1, 50)))
    found = knn(torch.tensor(train), torch.tensor(labels), torch.tensor(query), k).numpy()
    nearest = KNeighborsClassifier(k, metric="cosine").fit(train, labels).kneighbors(query, return_distance=False)
    for one, votes in zip(found, labels[nearest], strict=True):
        counts = np.bincount(votes)
        assert one == next(vote for vote in votes if counts[vote] == counts.max())


def test_of_equal_votes_the_nearest_decides():
    angles = torch.tensor([0.1, 0.2, 0.3, 0.4, 3.0])
    train = 7 * torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([9, 4, 4, 9, 1])
    query = torch.tensor([[1.0, 0.0]])
    assert [int(knn(train, labels, query, k)) for k in (1, 2, 3, 4, 5)] == [9, 9, 4, 9, 9]


def test_neighbours_labels_are_averaged():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]])
    labels = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1]])
    assert knn(train, labels, torch.tensor([[2.0, 0.0]]), 2).tolist() == [[1.0, 0.5, 0.5]]


def test_patches_vote_pixel_by_pixel():
    generator = torch.Generator().manual_seed(0)
    train, query = torch.randn(40, 4, generator=generator), torch.randn(7, 4, generator=generator)
    masks = torch.randint(0, 3, (40, 9), generator=generator)
    masks[torch.rand(40, 9, generator=generator) < 0.4] = 255
    masks[3] = 255
    found = knn_masks(train, masks, query, 5, 3)
    usable = [row for row in range(40) if row != 3]
    frequency = np.bincount(masks[masks != 255].numpy(), minlength=3)
    for row, one in zip(query, found, strict=True):
        distance = [float(torch.cosine_similarity(row, train[index], dim=0)) for index in usable]
        nearest = [usable[index] for index in np.argsort(distance)[::-1][:5]]
        for pixel, voted in enumerate(one.tolist()):
            votes = [int(masks[index, pixel]) for index in nearest]
            # most votes first, then the more frequent class
            assert voted == max(range(3), key=lambda index: (votes.count(index), frequency[index]))


def test_votes_on_pixels_take_no_more_memory_for_more_patches(monkeypatch):
    monkeypatch.setattr(probes, "BLOCK", 2000)
    held = []
    scatter = torch.Tensor.scatter_add_
    monkeypatch.setattr(
        torch.Tensor,
        "scatter_add_",
        lambda votes, axis, near, one: held.append(votes.numel() + near.numel()) or scatter(votes, axis, near, one),
    )
    generator = torch.Generator().manual_seed(4)
    train, query = (torch.randn(size, 4, generator=generator) for size in (30, 90))
    # classes of equal frequency, so that some votes are equal in all and the first class wins
    masks = torch.stack([torch.randperm(30, generator=generator) % 5 for _ in range(16)], 1)
    masks = torch.where(masks == 4, 255, masks)
    found = knn_masks(train, masks, query, 6, 4)
    assert len(held) == 9
    assert max(held) <= 2000
    assert sum(held) == 90 * (6 + 5) * 16
    similar = torch.nn.functional.cosine_similarity(query[:, None], train[None], dim=2)
    near = masks[similar.argsort(1, descending=True)[:, :6]].numpy()
    counts = (near[..., None] == np.arange(4)).sum(1)
    assert ((counts == counts.max(2, keepdims=True)).sum(2) > 1).mean() > 0.2
    np.testing.assert_array_equal(found.numpy(), counts.argmax(2))


def test_patches_without_labels_have_no_vote():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    masks = torch.tensor([[255, 255], [1, 255], [1, 0]])
    assert knn_masks(train, masks, torch.tensor([[1.0, 0.0]]), 1, 2).tolist() == [[1, 1]]
    with pytest.raises(ConfigError, match="3 neighbours of 2 training rows"):
        knn_masks(train, masks, torch.tensor([[1.0, 0.0]]), 3, 2)


def test_strength_is_chosen_on_validation_rows_as_an_explicit_search_does():
    train, validation, test = clouds(0, 60), clouds(1, 300), clouds(2, 200)
    probe = choose_logistic(train, validation, "classification", 3)
    mean, deviation = train[0].astype(float).mean(0), train[0].astype(float).std(0)
    fits = {
        strength: LogisticRegression(C=strength, max_iter=5000).fit((train[0] - mean) / deviation, train[1])
        for strength in probes.STRENGTHS
    }
    scores = {key: fit.score((validation[0] - mean) / deviation, validation[1]) for key, fit in fits.items()}
    assert probe.validation == pytest.approx(scores)
    assert len(set(scores.values())) > 2
    best = max(scores.values())
    assert probe.strength == min(key for key, score in scores.items() if score == best)
    np.testing.assert_array_equal(probe.predict(test[0]), fits[probe.strength].predict((test[0] - mean) / deviation))
    assert probe.chosen == f"C={probe.strength:g} of 0.0001, 0.001, 0.01, 0.1, 1, 10"


def test_other_validation_rows_choose_otherwise():
    train = clouds(0, 40)
    # what was learned is wrong for turned labels, least so where it is regularised most
    turned = (train[0], (train[1] + 1) % 3)
    strengths = (1e-6, 100.0)
    assert choose_logistic(train, train, "classification", 3, strengths).strength == 100
    assert choose_logistic(train, turned, "classification", 3, strengths).strength == 1e-6


def test_labels_are_fitted_one_against_the_rest():
    train, validation, test = marks(0, 80), marks(1, 80), marks(2, 80)
    probe = choose_logistic(train, validation, "multilabel", 3, (0.01, 1.0))
    mean, deviation = train[0].mean(0), train[0].std(0)
    for label in range(3):
        fit = LogisticRegression(C=probe.strength).fit((train[0] - mean) / deviation, train[1][:, label])
        expected = fit.predict_proba((test[0] - mean) / deviation)[:, 1]
        np.testing.assert_allclose(probe.predict(test[0])[:, label], expected, atol=1e-3)
    score = average_precision_score(validation[1], probe.predict(validation[0]), average="micro")
    assert probe.validation[probe.strength] == pytest.approx(score, abs=1e-6)


def test_rows_of_maps_are_ranked_by_intersection_over_union():
    train, validation = clouds(0, 100), clouds(1, 100)
    probe = choose_logistic(train, validation, "segmentation", 3, (0.01,))
    expected = jaccard_score(validation[1], probe.predict(validation[0]), average="macro")
    assert probe.validation == {0.01: pytest.approx(expected)}


def test_equal_rows_give_an_equal_probe_and_the_solver_arrives():
    train, validation = clouds(0, 60, spread=0.1), clouds(1, 60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, other = (choose_logistic(train, validation, "classification", 3) for _ in range(2))
    np.testing.assert_array_equal(one.model[-1].coef_, other.model[-1].coef_)
    assert one.validation == other.validation


def test_bad_rows():
    features, labels = clouds(0, 10)
    rows, classes = torch.tensor(features), torch.tensor(labels)
    with pytest.raises(ConfigError, match="11 neighbours of 10 training rows"):
        knn(rows, classes, rows, 11)
    with pytest.raises(DataError, match="10 training features for 9 labels"):
        knn(rows, classes[1:], rows, 3)
    with pytest.raises(DataError, match="query features have 2 values, training features 6"):
        knn(rows, classes, rows[:, :2], 3)
    broken = features.copy()
    broken[3, 2] = np.nan
    with pytest.raises(DataError, match="a validation feature is not finite"):
        choose_logistic((features, labels), (broken, labels), "classification", 3)
    with pytest.raises(DataError, match=r"training features of shape \(0, 6\)"):
        choose_logistic((features[:0], labels[:0]), (features, labels), "classification", 3)
    with pytest.raises(DataError, match="all training rows are of class 1"):
        choose_logistic((features, np.ones(10, int)), (features, labels), "classification", 3)
    with pytest.raises(DataError, match="training label 255 is outside 0 to 2"):
        choose_logistic((features, np.full(10, 255)), (features, labels), "segmentation", 3)
    for strengths in ((), (0.0, 1.0)):
        with pytest.raises(ConfigError, match="give at least one, all above 0"):
            choose_logistic((features, labels), (features, labels), "classification", 3, strengths)
    probe = choose_logistic((features, labels), (features, labels), "classification", 3, (1.0,))
    with pytest.raises(DataError, match="features of 5 values, the probe was fitted to 6"):
        probe.predict(features[:, :5])
