"""Patches against a slow reference that pads with numpy and cuts one patch at a time."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from vision_lowrank.data.patches import PatchDataset, allocate_cube, collate_batch, reflect_border
from vision_lowrank.errors import ConfigError, DataError


def make_cube(image, patch_size):
    cube, inside = allocate_cube(*image.shape, patch_size)
    inside[:] = image
    return reflect_border(cube, patch_size)


def slow_patches(image, patch_size, indices):
    radius = patch_size // 2
    padded = np.pad(image, ((0, 0), (radius, radius), (radius, radius)), mode="reflect")
    patches = []
    for index in indices:
        row, column = divmod(int(index), image.shape[2])
        patches.append(padded[:, row : row + patch_size, column : column + patch_size])
    return np.stack(patches)


@pytest.fixture
def image():
    return np.random.default_rng(4).normal(size=(3, 8, 11)).astype(np.float32)


@pytest.fixture
def labels():
    return np.random.default_rng(5).integers(0, 9, (8, 11))


@pytest.mark.parametrize("patch_size", [1, 3, 5, 7])
def test_every_patch_of_a_scene_borders_included(image, labels, patch_size):
    indices = np.random.default_rng(6).permutation(88)
    dataset = PatchDataset(make_cube(image, patch_size), patch_size, indices, labels)
    batch = dataset.__getitems__(list(range(88)))
    assert np.array_equal(batch["image"].numpy(), slow_patches(image, patch_size, indices))
    assert batch["label"].tolist() == labels.reshape(-1)[indices].tolist()
    single = dataset[7]
    assert np.array_equal(single["image"].numpy(), slow_patches(image, patch_size, indices[7:8])[0])
    assert single["label"].shape == ()
    assert len(dataset) == 88


def test_a_patch_may_be_as_large_as_the_scene():
    image = np.random.default_rng(4).normal(size=(2, 5, 9)).astype(np.float32)
    batch = PatchDataset(make_cube(image, 5), 5, np.arange(45)).__getitems__(range(45))
    assert np.array_equal(batch["image"].numpy(), slow_patches(image, 5, range(45)))
    assert set(batch) == {"image"}


def test_axes_are_channel_row_column():
    channel, row, column = np.ogrid[:7, :9, :6]
    image = (10_000 * channel + 100 * row + column).astype(np.float32)
    patch = PatchDataset(make_cube(image, 3), 3, np.array([4 * 6 + 2]))[0]["image"]
    assert patch.shape == (7, 3, 3)
    for c, i, j in np.ndindex(7, 3, 3):
        assert patch[c, i, j] == 10_000 * c + 100 * (4 + i - 1) + (2 + j - 1)


@pytest.mark.parametrize("patch_size", [0, 4, -3])
def test_a_patch_needs_a_centre(patch_size):
    with pytest.raises(ConfigError, match=f"patch_size is {patch_size}; give an odd number"):
        allocate_cube(3, 8, 11, patch_size)


def test_a_patch_larger_than_the_scene_is_refused():
    with pytest.raises(DataError, match="patch_size 9 is larger than the scene, 8 x 11 pixels"):
        allocate_cube(3, 8, 11, 9)


def test_the_border_is_filled_in_place():
    cube, _ = allocate_cube(2, 6, 6, 3)
    assert np.shares_memory(cube, reflect_border(cube, 3).numpy())


def test_shared_tensors_belong_to_every_sample(image):
    shared = {"wavelengths": torch.tensor([450.0, 550.0, 650.0]), "gsd": torch.tensor(20.0)}
    dataset = PatchDataset(make_cube(image, 3), 3, np.arange(88), shared=shared)
    batch = dataset.__getitems__([3, 1])
    assert batch["wavelengths"].tolist() == [[450, 550, 650], [450, 550, 650]]
    assert batch["gsd"].tolist() == [20, 20]
    assert dataset[5]["wavelengths"].tolist() == [450, 550, 650]
    assert dataset[5]["gsd"].item() == 20


def test_a_pickled_dataset_is_the_same_and_no_larger_than_the_cube(image, labels):
    dataset = PatchDataset(make_cube(image, 7), 7, np.arange(88), labels, {"gsd": torch.tensor(20.0)})
    dataset.__getitems__([0])
    content = pickle.dumps(dataset)
    # windows spelt out would take 49 times the image
    assert len(content) < 2 * dataset.cube.nbytes + 8 * 88 * 2 + 2000
    before, after = dataset.__getitems__(range(88)), pickle.loads(content).__getitems__(range(88))
    assert all(torch.equal(before[name], after[name]) for name in ("image", "label", "gsd"))


def test_worker_processes_give_the_same_batches(image, labels):
    dataset = PatchDataset(make_cube(image, 3), 3, np.arange(88), labels, {"gsd": torch.tensor(20.0)})
    loaders = [DataLoader(dataset, 10, collate_fn=collate_batch, num_workers=workers) for workers in (0, 1)]
    for ours, theirs in zip(*loaders, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours["label"].tolist() == labels.reshape(-1)[80:].tolist()
