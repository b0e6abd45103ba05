"""Tasks cut from a scene that is painted by the test, and from Indian Pines."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from vision_lowrank.data.scene_tasks import scene_task
from vision_lowrank.errors import ConfigError, DataError

SIDE, CLASSES = 48, 6


@pytest.fixture
def card(tmp_path):
    """A scene in which the class of a pixel is known from its place; a frame and a hole have no label."""
    generator = np.random.default_rng(0)
    labels = generator.integers(1, CLASSES + 1, (SIDE // 4, SIDE // 4)).repeat(4, 0).repeat(4, 1)
    labels[:2] = labels[20:26, 20:26] = 0
    image = generator.normal(size=(4, SIDE, SIDE)) * np.array([1, 5, 2, 9])[:, None, None] + 3 + labels
    np.save(tmp_path / "image.npy", image.astype(np.float32))
    np.save(tmp_path / "labels.npy", labels)
    colours = [f"#0000{index:02x}" for index in range(CLASSES)]
    content = {
        "name": "painted", "title": "painted", "sensor": "none", "licence": "none", "citation": "none", "gsd": 5.0,
        "files": {
            "image": [{"path": "image.npy", "axes": "channels height width"}], "labels": [{"path": "labels.npy"}],
        },
        "shape": {"height": SIDE, "width": SIDE, "channels": 4}, "bands": {"wavelengths": [450, 550, 650, 850]},
        "classes": [{"name": f"c{index}", "colour": colour} for index, colour in enumerate(colours)],
    }  # fmt: skip
    (tmp_path / "painted.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "painted.yaml"), str(tmp_path), image.astype(np.float32), labels - 1


def parts(data):
    return {"train": data.train, "validation": data.validation, "test": data.test}


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_samples_are_what_the_scene_has_there(card, kind):
    path, root, image, labels = card
    data = scene_task(path, root, kind, side=4, seed=1, block=8, every=2)
    assert data.wavelengths.tolist() == [450, 650]
    assert (data.gsd, data.kind, data.classes[2]) == (5.0, kind, "c2")
    places = data.train.corners
    pixels = np.concatenate([image[:, r : r + 4, c : c + 4].reshape(4, -1) for r, c in places], axis=1)
    mean, deviation = pixels.mean(1), pixels.std(1)
    least, trained = 16, set()
    for row, column in places:
        trained |= set(np.unique(labels[row : row + 4, column : column + 4]).tolist()) - {-1}
    for samples in parts(data).values():
        for index, (row, column) in enumerate(samples.corners):
            sample = samples[index]
            window = image[:, row : row + 4, column : column + 4]
            expected = ((window.T - mean) / deviation).T[::2]
            np.testing.assert_allclose(sample["image"], expected, rtol=1e-3, atol=1e-4)
            truth = labels[row : row + 4, column : column + 4]
            if kind == "classification":
                known = truth[truth >= 0]
                assert known.size >= 8
                least = min(least, known.size)
                assert int(sample["label"]) == np.bincount(known).argmax()
            else:
                expected = np.where(np.isin(truth, sorted(trained)), truth, 255)
                assert np.array_equal(sample["mask"], expected)
                assert (expected != 255).any()
    # tiles at the frame, of which half has a label, are in
    assert kind == "segmentation" or least == 8


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_a_class_that_training_lacks_and_a_missing_value_do_not_count(card, kind):
    path, root, image, labels = card
    labels = labels + 1
    labels[labels == 6] = 1
    # in one block alone
    labels[32:36, 40:44] = 6
    np.save(Path(root, "labels.npy"), labels)
    image[2, 33, 13] = np.nan
    np.save(Path(root, "image.npy"), image)
    tasks = [scene_task(path, root, kind, side=4, seed=seed, block=16) for seed in range(12)]
    for data in tasks:
        found = [
            (row, column, sample)
            for samples in parts(data).values()
            for (row, column), sample in zip(samples.corners.tolist(), samples, strict=True)
        ]
        (hole,) = [sample["image"] for row, column, sample in found if (row, column) == (32, 12)]
        assert (hole[:, 1, 1] == 0).all()
        assert hole.isfinite().all()
        assert (hole != 0).any(0).sum() == 15
    trained = [[32, 40] in data.train.corners.tolist() for data in tasks]
    assert len(set(trained)) == 2
    for data, known in zip(tasks, trained, strict=True):
        name = "label" if kind == "classification" else "mask"
        held_out = [sample[name] for samples in (data.validation, data.test) for sample in samples]
        assert not any((target == 5).any() for target in held_out)
        assert any((sample[name] == 5).any() for sample in data.train) == known


def test_whole_blocks_go_to_one_subset(card):
    path, root, *_ = card
    data = scene_task(path, root, "classification", side=4, seed=1, block=16)
    owners = [set(map(tuple, samples.corners // 16)) for samples in parts(data).values()]
    assert sum(map(len, owners)) == len(set.union(*owners))
    counts = [len(samples) for samples in parts(data).values()]
    assert 0.35 < counts[0] / sum(counts) < 0.65
    for samples in parts(data).values():
        assert len(set(samples.groups)) == len(set(map(tuple, samples.corners // 16)))
    again, other = (scene_task(path, root, "classification", side=4, seed=seed, block=16) for seed in (1, 2))
    assert np.array_equal(again.train.corners, data.train.corners)
    assert again.fingerprint == data.fingerprint != other.fingerprint
    assert not np.array_equal(other.train.corners, data.train.corners)


@pytest.mark.parametrize("what", ["classes", "axes"])
def test_another_card_for_the_same_files_is_other_data(card, what):
    path, root, *_ = card
    before = scene_task(path, root, "classification", side=4, seed=1, block=16).fingerprint
    changed = yaml.safe_load(Path(path).read_text())
    if what == "classes":
        changed["classes"][1]["name"] = "renamed"
    else:
        changed["files"]["image"][0]["axes"] = "channels width height"
    Path(path).write_text(yaml.safe_dump(changed))
    assert scene_task(path, root, "classification", side=4, seed=1, block=16).fingerprint != before


def test_what_cannot_be_divided_is_refused(card):
    path, root, *_ = card
    with pytest.raises(ConfigError, match="side=5, block=16"):
        scene_task(path, root, "classification", side=5, seed=0)
    for shares in ((0.9, 0.1), (0.5,), (0.5, 0.0), (0.2, 0.2, 0.2)):
        with pytest.raises(ConfigError, match="leave nothing"):
            scene_task(path, root, "classification", side=4, seed=0, shares=shares)
    with pytest.raises(ConfigError, match="seed is -1; give at least 0"):
        scene_task(path, root, "classification", side=4, seed=-1)
    with pytest.raises(DataError, match="none of 1000 divisions of 1 blocks"):
        scene_task(path, root, "classification", side=4, seed=0, block=48)
    with pytest.raises(DataError, match="no labelled tile of 64 x 64"):
        scene_task(path, root, "classification", side=64, seed=0, block=64)


def test_indian_pines_has_room_for_both():
    tiles = scene_task("indian_pines", "data", "classification", side=4, seed=0)
    maps = scene_task("indian_pines", "data", "segmentation", side=16, seed=0)
    assert min(len(samples) for samples in parts(tiles).values()) > 60
    assert min(len(samples) for samples in parts(maps).values()) > 8
    assert tiles.train[0]["image"].shape == (200, 4, 4)
    assert maps.train[0]["image"].shape == (200, 16, 16)
