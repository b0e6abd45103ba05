import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vision_lowrank.data.scene import IGNORE, open_scene
from vision_lowrank.data.splits import Split, block_split, file_split, random_split
from vision_lowrank.errors import SplitError


@pytest.fixture(scope="module")
def pines():
    return open_scene("indian_pines", "nowhere").labels


def make_labels(height, width, classes, seed, labelled=0.8):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, (height, width))
    labels[generator.random((height, width)) > labelled] = IGNORE
    return labels


def brute_force_leakage(split, patch_size):
    """Looks at every pair of a test and a training pixel."""
    test = np.stack(np.divmod(split.test, split.shape[1]), axis=1)
    train = np.stack(np.divmod(split.train, split.shape[1]), axis=1)
    distance = np.abs(test[:, None] - train[None]).max(axis=-1)
    return (distance <= patch_size // 2).any(axis=1).mean()


def least_distance(first, second, width):
    """Chebyshev distance of the nearest pair of pixels."""
    a, b = (np.stack(np.divmod(indices, width), axis=1) for indices in (first, second))
    return min(np.abs(pixel - b).max(axis=1).min() for pixel in a)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shares=st.sampled_from([(0.09, 0.01), (0.3, 0.2), (0.05, 0.05), (3, 2)]),
    patch_size=st.sampled_from([1, 3, 5, 9]),
)
def test_random_split_is_a_partition_and_its_leakage_exact(seed, shares, patch_size):
    labels = make_labels(23, 17, 4, seed)
    split = random_split(labels, 4, *shares, seed=seed)
    parts = [set(indices.tolist()) for indices in split.subsets().values()]
    assert all(not (a & b) for a, b in itertools.combinations(parts, 2))
    assert set.union(*parts) == set(np.flatnonzero(labels != IGNORE).tolist())
    for index in range(4):
        pixels = (labels == index).sum()
        train, validation, test = ((labels.flat[list(part)] == index).sum() for part in parts)
        assert min(train, validation, test) >= 1
        if isinstance(shares[0], int):
            assert (train, validation) == shares
        else:
            assert abs(train + validation - max(1, pixels * sum(shares))) <= 0.5 + 1e-6
    assert split.leakage(patch_size) == pytest.approx(brute_force_leakage(split, patch_size), abs=0)


def test_shares_are_rounded_half_up_in_spite_of_binary_fractions():
    labels = np.repeat(np.arange(2), [205, 15])[None]
    split = random_split(labels, 2, 0.09, 0.01, seed=0)
    # 20.5 -> 21 and 1.5 -> 2; of these 2.1 -> 2 and 0.2 -> 0 validate
    assert np.bincount(labels.flat[split.train]).tolist() == [19, 2]
    assert np.bincount(labels.flat[split.validation]).tolist() == [2]


def test_a_class_of_few_pixels_trains_before_it_validates():
    labels = np.zeros((20, 20), np.int64)
    labels[0, :8] = 1
    # 8 x 0.12 is one pixel, more than half of which is asked for validation
    split = random_split(labels, 2, 0.05, 0.07, seed=0)
    assert [(labels.flat[part] == 1).sum() for part in split.subsets().values()] == [1, 0, 7]
    # and of two published pixels one stays, however large the share for validation
    published = np.full(labels.shape, IGNORE)
    published[0, 6:10] = labels[0, 6:10]
    split = file_split(labels, published, None, 0.9, 0, "Train.mat")
    for part in (split.train, split.validation):
        assert sorted(labels.flat[part].tolist()) == [0, 1]


def test_ten_percent_of_indian_pines(pines):
    split = random_split(pines, 16, 0.09, 0.01, seed=0)
    assert split.train.size + split.validation.size == pytest.approx(1025, abs=5)
    assert np.unique(pines.flat[split.train]).size == 16
    # the defect of this protocol that every result must tell
    assert split.leakage(15) > 0.99
    assert random_split(pines, 16, 0.09, 0.01, seed=0).digest() == split.digest()
    assert random_split(pines, 16, 0.09, 0.01, seed=1).digest() != split.digest()


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (25, 3, "class Oats has 20 labelled pixels; training and validation take 28"),
        (0.9, 0.05, "class Oats has 20 labelled pixels; training and validation take 20|leave nothing"),
        (0.9, 0.1, "leave nothing for one of the subsets"),
        (0, 5, "leave nothing for one of the subsets"),
        (0.1, 5, "two shares or two counts"),
    ],
)
def test_too_few_pixels_are_named(pines, train, validation, message):
    labels = np.where(pines == 8, 0, IGNORE)
    if isinstance(train, float):
        labels[np.unravel_index(np.flatnonzero(labels == 0)[1:], labels.shape)] = IGNORE
        message = message.replace("20 labelled pixels; training and validation take 20", "1 labelled pixels")
    with pytest.raises(SplitError, match=message) as caught:
        random_split(labels, 1, train, validation, seed=0, names=["Oats"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("patch_size", [9, 11, 13, 15])
def test_indian_pines_has_enough_block_layouts(pines, patch_size):
    splits = [block_split(pines, 16, patch_size - 1, seed) for seed in range(8)]
    assert len({split.digest() for split in splits}) == 8
    for split in splits:
        assert 850 <= split.train.size <= 1050
        assert 213 <= split.validation.size <= 263
        assert split.test.size >= 500
        assert split.leakage(patch_size) == 0
        trained = set(np.unique(pines.flat[split.train]).tolist())
        tested = set(np.unique(pines.flat[split.test]).tolist())
        assert tested | set(np.unique(pines.flat[split.validation]).tolist()) <= trained
        assert len(tested & trained) == split.parameters["shared_classes"] >= 6
        assert not trained & set(split.parameters["absent_classes"])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), block_size=st.integers(3, 9), patch_size=st.sampled_from([1, 3, 5, 7]))
def test_guard_bands_keep_whole_patches_apart(seed, block_size, patch_size):
    labels = make_labels(60, 50, 3, seed)
    split = block_split(
        labels, 3, patch_size - 1, seed, block_size, train_pixels=120, validation_pixels=40, test_pixels=50
    )
    split.check(labels)
    for first, second in itertools.combinations(split.subsets().values(), 2):
        # patches of both share no pixel: their centres lie at least a whole patch apart
        assert least_distance(first, second, 50) >= patch_size
    assert split.leakage(patch_size) == brute_force_leakage(split, patch_size) == 0


def test_wider_patches_than_the_guard_leak_and_are_reported(pines):
    split = block_split(pines, 16, 8, seed=0)
    assert split.leakage(33) == pytest.approx(brute_force_leakage(split, 33), abs=0)
    assert split.leakage(33) > 0


def test_block_pixels_account_for_every_class(pines):
    split = block_split(pines, 16, 12, seed=3)
    absent = np.isin(pines, split.parameters["absent_classes"])
    assert split.parameters["dropped_pixels"] > 0
    assert not absent.flat[np.concatenate(list(split.subsets().values()))].any()


def test_a_scene_too_small_for_blocks_says_what_it_lacks():
    with pytest.raises(SplitError, match=r"blocks of 16 and guards of 14 pixels .* 1000 training"):
        block_split(make_labels(40, 40, 3, 0), 3, 14, seed=0)


def test_block_split_repeats_with_its_seed(pines):
    assert block_split(pines, 16, 12, seed=5).digest() == block_split(pines, 16, 12, seed=5).digest()


def published_maps(labels, seed):
    generator = np.random.default_rng(seed)
    chosen = generator.random(labels.shape) < 0.3
    return np.where(chosen, labels, IGNORE), np.where(~chosen, labels, IGNORE)


def test_published_training_pixels_are_kept():
    labels = make_labels(30, 30, 3, 1)
    train, test = published_maps(labels, 2)
    for given_test in (test, None):
        split = file_split(labels, train, given_test, 0.2, 0, "Train100.mat")
        assert set(split.test.tolist()) == set(np.flatnonzero(test != IGNORE).tolist())
        both = np.concatenate([split.train, split.validation])
        assert sorted(both.tolist()) == np.flatnonzero(train != IGNORE).tolist()
        assert split.validation.size == pytest.approx(0.2 * both.size, abs=2)


def test_published_maps_that_contradict_the_scene_are_refused():
    labels = make_labels(30, 30, 3, 1)
    train, test = published_maps(labels, 2)
    with pytest.raises(SplitError, match=r"Train\.mat: .* another class than in the scene, first at row 0"):
        file_split(labels, np.where(train == IGNORE, IGNORE, (train + 1) % 3), test, 0.2, 0, "Train.mat")
    with pytest.raises(SplitError, match=r"validation shares|test shares"):
        file_split(labels, train, labels, 0.2, 0, "Train.mat")
    with pytest.raises(SplitError, match=r"Train\.mat: shape \(30, 29\)"):
        file_split(labels, train[:, 1:], test, 0.2, 0, "Train.mat")
    for share in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(SplitError, match=rf"Train\.mat: validation={share}; give a share above 0 and below 1"):
            file_split(labels, train, test, share, 0, "Train.mat")


def test_save_and_load(tmp_path, pines):
    split = block_split(pines, 16, 12, seed=0)
    split.save(tmp_path / "split.npz")
    loaded = Split.load(tmp_path / "split.npz")
    assert loaded.digest() == split.digest()
    assert loaded.parameters == split.parameters
    assert (loaded.kind, loaded.seed, loaded.shape) == ("blocks", 0, (145, 145))
    assert loaded.train.dtype == np.int64


def test_changed_or_cut_split_files_are_refused(tmp_path, pines):
    path = tmp_path / "split.npz"
    random_split(pines, 16, 0.09, 0.01, seed=0).save(path)
    with np.load(path) as file:
        arrays = dict(file)
    arrays["test"] = arrays["test"][1:]
    np.savez(tmp_path / "changed.npz", **arrays)
    with pytest.raises(SplitError, match=r"changed\.npz: its pixels do not match"):
        Split.load(tmp_path / "changed.npz")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(SplitError, match=r"split\.npz: missing or damaged"):
        Split.load(path)
    with pytest.raises(SplitError, match=r"none\.npz: missing or damaged"):
        Split.load(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("subsets", "message"),
    [
        (([0, 1], [1, 2], [3]), "validation shares 1 pixels with train"),
        (([0, 1], [2], [1, 3]), "test shares 1 pixels with train"),
        (([1, 0], [2], [3]), "train indices are not sorted"),
        (([0, 1], [2], [99]), "within the scene"),
        (([0, 1], [2], [5]), "test holds unlabelled pixels"),
        (([0, 1], [], [3]), "no validation pixels"),
        (([0, 1], [2], [3]), "all training pixels are of one class"),
    ],
)
def test_check_refuses(subsets, message):
    labels = np.array([[0, 0, 1], [1, 1, IGNORE]])
    arrays = [np.array(indices, dtype=np.int64) for indices in subsets]
    with pytest.raises(SplitError, match=message):
        Split("random", *arrays, shape=(2, 3), seed=0).check(labels)
