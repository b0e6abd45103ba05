"""The data module on a tiny scene: what it is fitted on, what it splits and what its loaders give."""

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch

from vision_lowrank.data.cards import load_card
from vision_lowrank.data.modules import SceneDataModule, make_split
from vision_lowrank.data.scene import IGNORE, open_scene
from vision_lowrank.errors import ConfigError, DataError

RANDOM = {"kind": "random", "train": 0.2, "validation": 0.1}


@pytest.fixture
def make(tiny, tmp_path):
    """Writes the scene and opens it through a data module."""

    def build(setup=True, **options):
        arguments = {
            "patch_size": 5,
            "components": None,
            "whiten": False,
            "split": RANDOM,
            "batch_size": 8,
            "evaluation_batch_size": 50,
            "seed": 0,
        }
        module = SceneDataModule(str(tiny.write()), str(tmp_path), **(arguments | options))
        if setup:
            module.setup()
        return module

    return build


def class_map(tiny):
    """Class indices of the tiny scene, made from its label values by hand."""
    return np.where(tiny.labels == 0, IGNORE, tiny.labels.astype(np.int64) - 1)


@pytest.mark.parametrize(("components", "whiten"), [(None, False), (3, True)])
def test_scaling_sees_training_pixels_only(tiny, make, components, whiten):
    before = make(components=components, whiten=whiten)
    untrained = np.ones(tiny.labels.size, bool)
    untrained[before.split.train] = False
    flat = tiny.image.reshape(-1, tiny.image.shape[2])
    flat[untrained] = 3 * flat[untrained] - 1000
    after = make(components=components, whiten=whiten)
    assert np.array_equal(after.split.train, before.split.train)
    for name, value in before.preprocessor.state().items():
        assert np.array_equal(value, after.preprocessor.state()[name])
    flat[before.split.train[0]] += 50
    changed = make(components=components, whiten=whiten).preprocessor.state()
    assert not np.array_equal(changed["mean"], before.preprocessor.state()["mean"])


def test_samples_are_scaled_patches_with_label_wavelengths_and_pixel_size(tiny, make):
    module = make()
    spectra = tiny.image.reshape(-1, 6)[module.split.train].astype(np.float64)
    scaled = (tiny.image - spectra.mean(0)) / spectra.std(0)
    padded = np.pad(scaled, ((2, 2), (2, 2), (0, 0)), mode="reflect").transpose(2, 0, 1)
    batch = next(iter(module.test_dataloader()))
    for position, index in enumerate(module.split.test[:50]):
        row, column = divmod(int(index), 20)
        patch = padded[:, row : row + 5, column : column + 5]
        assert np.allclose(batch["image"][position], patch, atol=1e-4)
        assert batch["label"][position] == tiny.labels[row, column] - 1
    assert batch["image"].dtype == torch.float32
    assert batch["wavelengths"][-1].tolist() == [450, 550, 650, 750, 850, 950]
    assert batch["gsd"].tolist() == [2] * 50
    assert (module.num_channels, module.num_classes) == (6, 3)


def test_components_have_no_wavelengths(make):
    module = make(components=4, whiten=True)
    batch = next(iter(module.train_dataloader()))
    assert set(batch) == {"image", "label", "gsd"}
    assert batch["image"].shape == (8, 4, 5, 5)
    centres = np.concatenate([batch["image"][:, :, 2, 2] for batch in module.train_dataloader()])
    assert np.allclose(centres.mean(0), 0, atol=1e-4)
    assert np.allclose(np.cov(centres.T), np.eye(4), atol=1e-3)


def test_dropped_bands_take_their_wavelengths_with_them(tiny, make):
    tiny.image[..., 2] = 5
    module = make()
    assert next(iter(module.val_dataloader()))["wavelengths"][0].tolist() == [450, 550, 750, 850, 950]
    assert module.num_channels == 5


@pytest.mark.parametrize("components", [None, 3])
def test_pixels_without_values_are_zero_in_the_cube(tiny, make, components):
    tiny.image[3, 4, 1] = np.nan
    tiny.image[0, 0, 2] = np.inf
    module = make(components=components)
    inside = module.cube[:, 2:-2, 2:-2]
    empty = np.zeros((24, 20), bool)
    empty[[3, 0], [4, 0]] = True
    assert np.array_equal((inside == 0).all(0).numpy(), empty)
    assert torch.isfinite(module.cube).all()
    assert not np.isin([3 * 20 + 4, 0], np.concatenate(list(module.split.subsets().values()))).any()


def test_prediction_covers_every_pixel_once_in_row_order(tiny, make):
    module = make()
    batches = list(module.predict_dataloader())
    assert [len(batch["label"]) for batch in batches] == [50] * 9 + [30]
    labels = torch.cat([batch["label"] for batch in batches])
    assert labels.tolist() == class_map(tiny).reshape(-1).tolist()
    centres = torch.cat([batch["image"][:, :, 2, 2] for batch in batches])
    assert torch.equal(centres, module.cube[:, 2:-2, 2:-2].reshape(6, -1).T)


def loaded(loader):
    """The label and the first centre value of each sample, which tells pixels apart."""
    batches = list(loader)
    centres = torch.cat([batch["image"][:, 0, 2, 2] for batch in batches]).tolist()
    return list(zip(torch.cat([batch["label"] for batch in batches]).tolist(), centres, strict=True))


def test_loaders_give_the_pixels_of_their_subset(tiny, make):
    module = make()
    whole = loaded(module.predict_dataloader())
    for loader, indices in (
        (module.val_dataloader(), module.split.validation),
        (module.test_dataloader(), module.split.test),
    ):
        assert loaded(loader) == [whole[index] for index in indices]
    assert sorted(loaded(module.train_dataloader())) == sorted(whole[index] for index in module.split.train)


def test_training_order_follows_the_seed_and_changes_each_epoch(make):
    split = {**RANDOM, "seed": 3}
    loader = make(split=split, seed=1).train_dataloader()
    epochs = [loaded(loader), loaded(loader)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    loader = make(split=split, seed=1).train_dataloader()
    torch.rand(5)
    assert [loaded(loader), loaded(loader)] == epochs
    other = loaded(make(split=split, seed=2).train_dataloader())
    assert other != epochs[0]
    assert sorted(other) == sorted(epochs[0])


def test_a_last_batch_that_is_not_full_waits_for_the_next_epoch(make):
    size = make().split.train.size
    loader = make(batch_size=50).train_dataloader()
    assert 50 < size < 100
    epochs = [loaded(loader) for _ in range(12)]
    assert [len(epoch) for epoch in epochs] == [50] * 12
    assert len(set().union(*epochs)) == size
    # where there is one batch only, it is kept
    assert len(loaded(make(batch_size=100).train_dataloader())) == size


def test_pretraining_takes_every_pixel_with_values(tiny, make):
    tiny.image[3, 4, 1] = np.nan
    module = make(batch_size=480)
    centres = next(iter(module.pretrain_dataloader()))["image"][:, :, 2, 2]
    valid = module.cube[:, 2:-2, 2:-2].reshape(6, -1)[:, torch.arange(480) != 3 * 20 + 4].T
    assert centres.shape == (479, 6)
    assert torch.equal(centres.unique(dim=0), valid.unique(dim=0))


def test_random_split_follows_options_and_seed(make):
    module = make(split={"kind": "random", "train": 5, "validation": 2})
    assert np.bincount(module.scene.labels.flat[module.split.train]).tolist() == [5, 5, 5]
    assert np.bincount(module.scene.labels.flat[module.split.validation]).tolist() == [2, 2, 2]
    assert make(seed=0).split.digest() == make(seed=0).split.digest() != make(seed=1).split.digest()


BLOCKS = {"kind": "blocks", "block_size": 4, "train_pixels": 50, "validation_pixels": 20, "test_pixels": 30}


def test_block_split_keeps_patches_apart(make, caplog):
    with caplog.at_level(logging.INFO):
        module = make(patch_size=3, split=BLOCKS)
    assert module.split.kind == "blocks"
    assert module.split.parameters["guard"] == 2
    # every pixel of every training patch is out of every test patch's reach
    train, test = (np.stack(np.divmod(indices, 20), 1) for indices in (module.split.train, module.split.test))
    assert np.abs(train[:, None] - test[None]).max(-1).min() >= 3
    assert "tiny, blocks split" in caplog.text
    assert "leakage 0.0 % of test pixels" in caplog.text
    assert make(patch_size=3, split={**BLOCKS, "guard": 3}).split.parameters["guard"] == 3


def test_a_guard_narrower_than_the_patch_is_refused(make):
    with pytest.raises(ConfigError, match=r"split\.guard is 3; patches of 5 need 4 or more"):
        make(split={**BLOCKS, "guard": 3})


@pytest.fixture
def published(tiny, tmp_path):
    """Writes training and test maps of the first and the last rows; returns which pixels they hold."""
    rows = np.arange(24)[:, None] + np.zeros(20, int)
    for name, chosen in (("train", rows < 10), ("test", rows >= 12)):
        np.save(tmp_path / f"{name}.npy", np.where(chosen, tiny.labels, 0))
    tiny.card["splits"] = {"rows": {"train": "train.npy", "test": "test.npy"}, "rest": {"train": "train.npy"}}
    labelled = tiny.labels > 0
    return [set(np.flatnonzero(labelled & chosen).tolist()) for chosen in (rows < 10, rows >= 12, rows >= 10)]


@pytest.mark.parametrize(
    ("options", "tested"),
    [
        ({"published": "rows"}, 1),
        ({"published": "rest"}, 2),
        ({"train_file": "train.npy", "test_file": "test.npy"}, 1),
        ({"train_file": "train.npy"}, 2),
    ],
)
def test_published_maps_decide_who_trains_and_tests(make, published, options, tested):
    split = make(split={"kind": "from_file", "validation": 0.1, **options}).split
    assert set(split.train.tolist()) | set(split.validation.tolist()) == published[0]
    assert split.validation.size == pytest.approx(0.1 * len(published[0]), abs=2)
    assert set(split.test.tolist()) == published[tested]
    assert (split.kind, split.parameters["train_file"]) == ("from_file", "train.npy")


def test_a_training_map_of_a_scene_from_a_package_lies_in_the_data_folder(tmp_path):
    card = load_card("indian_pines")
    labels = open_scene(card, tmp_path).labels
    chosen = (labels != IGNORE) & (np.add.outer(range(145), range(145)) % 3 == 0)
    options = {"kind": "from_file", "validation": 0.1, "train_file": "train.npy"}
    place = tmp_path / "indian_pines"
    with pytest.raises(DataError, match=f"train.npy .* into {place}"):
        make_split(labels, labels >= 0, card, tmp_path, 5, options, 0)
    place.mkdir()
    np.save(place / "train.npy", np.where(chosen, labels + 1, 0))
    split = make_split(labels, labels >= 0, card, tmp_path, 5, options, 0)
    assert np.array_equal(np.union1d(split.train, split.validation), np.flatnonzero(chosen))


def test_published_pixels_without_values_are_left_out(tiny, make, published, caplog):
    gap = np.zeros((24, 20), bool)
    gap[3, 2:9] = gap[15, 4:6] = True
    tiny.image[gap] = np.nan
    split = make(split={"kind": "from_file", "validation": 0.1, "published": "rows"}).split
    lost = set(np.flatnonzero(gap).tolist())
    assert set(split.train.tolist()) | set(split.validation.tolist()) == published[0] - lost
    assert set(split.test.tolist()) == published[1] - lost
    for name, pixels in (("train", published[0]), ("test", published[1])):
        assert f"split from train.npy: {len(pixels & lost)} {name} pixels lack values; left out" in caplog.text


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"kind": "randon"}, "split.kind is 'randon'; it can be random, blocks or from_file"),
        ({}, "split.kind is None"),
        ({**RANDOM, "trian": 0.2}, "split of kind random: got an unexpected keyword argument 'trian'"),
        ({"kind": "random"}, "split of kind random: missing 2 required positional arguments: 'train' and 'validation'"),
        ({**BLOCKS, "guards": 4}, "split of kind blocks: got an unexpected keyword argument 'guards'"),
        ({**BLOCKS, "block_size": 16.5}, "split of kind blocks: block_size=16.5 is not a whole number; correct it"),
        ({**BLOCKS, "guard": "wide"}, "split of kind blocks: guard='wide' is not a whole number"),
        ({**RANDOM, "train": True}, "split of kind random: train=True is not a number or a whole number"),
        ({**RANDOM, "seed": None}, "split of kind random: seed=None is not a whole number"),
        ({**RANDOM, "seed": -1}, "split.seed is -1; give at least 0"),
        ({"kind": "from_file", "validation": 0.1}, "split of kind from_file: give `published` or `train_file`"),
        (
            {"kind": "from_file", "validation": 0.1, "published": "row"},
            "split.published is 'row'; the card has rest, rows",
        ),
        ({"kind": "from_file", "published": "rows"}, "split of kind from_file: missing .* 'validation'"),
    ],
)
def test_misspelt_options_are_named(make, published, split, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make(split=split)
    assert "\n" not in str(caught.value)


def test_a_training_map_that_is_not_there_is_named(make):
    with pytest.raises(DataError, match=r"scene tiny: file not found; put none\.npy"):
        make(split={"kind": "from_file", "validation": 0.1, "train_file": "none.npy"})


def test_setup_opens_the_scene_once(make, tmp_path):
    module = make()
    cube = module.cube
    (tmp_path / "image.npy").unlink()
    module.setup("test")
    assert module.cube is cube


def test_missing_files_are_fetched(tiny, make, hub, tmp_path):
    tiny.card["source"] = {"hub": "someone/tiny"}
    module = make(setup=False)
    for name in ("image.npy", "labels.npy"):
        hub.files[name] = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
    module.prepare_data()
    module.setup()
    assert np.array_equal(module.scene.image, np.moveaxis(tiny.image, -1, 0))
    assert len(hub.requests) == 2


# the kernel's own peak of this process: `resource` would count the peak of the process that started it
MEMORY_SCRIPT = """
import re
from pathlib import Path
import h5py, lightning, numpy, rasterio, scipy.io, scipy.ndimage, sklearn.decomposition, torch
from vision_lowrank.data.cards import load_card
from vision_lowrank.data.modules import SceneDataModule, make_split
from vision_lowrank.data.preprocessing import ScenePreprocessor
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))
# linear algebra loads its code at its first use
few = numpy.random.default_rng(0).normal(size=(40, 60, 1)).astype(numpy.float32)
ScenePreprocessor(30, False).fit(few[..., 0].T).transform(few)
before = peak()
module = SceneDataModule("indian_pines", "data", 13, 30, False, {"kind": "random", "train": 0.09, "validation": 0.01},
                         64, 256, 0)
module.setup()
print((peak() - before) / (145 * 145 * 200 * 4))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_preparing_a_scene_takes_at_most_one_and_a_half_cubes():
    result = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True)
    # the cube itself is in there, which shows that something was measured
    assert 1 < float(result.stdout) <= 1.5
