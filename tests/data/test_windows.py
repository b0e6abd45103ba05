"""Windows of a scene against slow references that pad and cut one window at a time."""

import numpy as np
import pytest
import torch

from vision_lowrank.data.scene import IGNORE
from vision_lowrank.data.windows import SceneWindowModule
from vision_lowrank.errors import ConfigError

SIZE, STRIDE = 4, 3


@pytest.fixture
def make(tiny, tmp_path):
    """Writes the scene and opens it through a window module."""

    def build(**options):
        arguments = {
            "size": SIZE,
            "stride": STRIDE,
            "split": {"kind": "random", "train": 0.2, "validation": 0.1},
            "batch_size": 8,
            "evaluation_batch_size": 7,
            "seed": 0,
        }
        module = SceneWindowModule(str(tiny.write()), str(tmp_path), **(arguments | options))
        module.setup()
        return module

    return build


def join(loader):
    """Whole content of a loader."""
    batches = list(loader)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def slow_windows(module, indices, stride):
    """Windows of a grid that hold a pixel of `indices`, cut one by one, as (image, label) arrays."""
    height, width = module.split.shape
    border = SIZE - 1
    flat = module.preprocessor.transform(module.scene.image)
    image = np.pad(flat, ((0, 0), (border, border), (border, border)), mode="reflect")
    label = np.full((height + 2 * border, width + 2 * border), IGNORE)
    for index in indices:
        row, column = divmod(int(index), width)
        label[row + border, column + border] = module.scene.labels[row, column]
    found = []
    for row in range(border % stride, border + height, stride):
        for column in range(border % stride, border + width, stride):
            window = np.s_[row : row + SIZE, column : column + SIZE]
            if (label[window] != IGNORE).any():
                found.append((image[:, *window], label[window]))
    return [np.stack(arrays) for arrays in zip(*found, strict=True)]


def test_without_brightness_windows_show_shapes(make):
    module = make(brightness=False)
    assert (module.scene.image > 1).all()
    shapes = np.log(module.scene.image.astype(np.float64))
    shapes = (shapes - shapes.mean(0)).reshape(len(shapes), -1)
    chosen = shapes[:, module.split.train]
    expected = (shapes - chosen.mean(1, keepdims=True)) / chosen.std(1, keepdims=True)
    np.testing.assert_allclose(module.scaled_image().reshape(len(shapes), -1), expected, atol=1e-3)


@pytest.mark.parametrize("options", [{"bands": [500, 900]}, {"other_bands": {"all": [400, 2500]}}])
def test_shapes_need_all_bands(make, options):
    with pytest.raises(ConfigError, match="brightness=false needs all bands of a spectrum; leave bands and other_ba"):
        make(brightness=False, **options)


def test_training_windows_lie_at_every_place_and_show_training_labels_only(make):
    module = make()
    found = join(module.train_dataloader())
    image, label = slow_windows(module, module.split.train, 1)
    # the loader shuffles: compare as sets
    rows = np.lexsort(np.concatenate([image.reshape(len(image), -1), label.reshape(len(label), -1)], 1).T)
    other = np.lexsort(torch.cat([found["image"].flatten(1), found["label"].flatten(1)], 1).numpy().T)
    np.testing.assert_array_equal(found["label"].numpy()[other], label[rows])
    np.testing.assert_allclose(found["image"].numpy()[other], image[rows], rtol=1e-6)
    assert found["wavelengths"].shape == (len(image), 6)
    np.testing.assert_allclose(found["wavelengths"][0].numpy(), np.linspace(450, 950, 6))
    assert (found["gsd"] == 2).all()


@pytest.mark.parametrize("part", ["validation", "test"])
def test_every_evaluated_pixel_counts_once(make, part):
    module = make()
    loader = module.val_dataloader() if part == "validation" else module.test_dataloader()
    found = join(loader)
    image, label = slow_windows(module, getattr(module.split, part), SIZE)
    np.testing.assert_array_equal(found["label"].numpy(), label)
    np.testing.assert_allclose(found["image"].numpy(), image, rtol=1e-6)
    assert (label != IGNORE).sum() == len(getattr(module.split, part))


@pytest.mark.parametrize(("size", "stride"), [(4, 3), (4, 4), (4, 1), (1, 1), (5, 2)])
def test_overlapping_predictions_are_averaged(make, size, stride):
    module = make(size=size, stride=stride)
    windows = join(module.predict_dataloaders()[""])["image"].numpy()
    # what every window says alike is what the average says: here the pixels themselves
    np.testing.assert_allclose(
        module.assemble(windows), module.preprocessor.transform(module.scene.image).reshape(6, -1).T, atol=1e-5
    )
    # and a window that says something of its own weighs as much as each other
    values = np.random.default_rng(2).normal(size=(len(windows), 1, size, size)).astype(np.float32)
    total, count = np.zeros((24 + 2 * size, 20 + 2 * size)), np.zeros((24 + 2 * size, 20 + 2 * size))
    position = 0
    for row in range((size - 1) % stride, size - 1 + 24, stride):
        for column in range((size - 1) % stride, size - 1 + 20, stride):
            total[row : row + size, column : column + size] += values[position, 0]
            count[row : row + size, column : column + size] += 1
            position += 1
    inside = np.s_[size - 1 : size - 1 + 24, size - 1 : size - 1 + 20]
    assert position == len(values)
    np.testing.assert_allclose(module.assemble(values)[:, 0], (total[inside] / count[inside]).flatten(), atol=1e-5)


def test_ranges_of_bands_choose_channels_and_their_wavelengths(make):
    module = make(bands=[500, 760], other_bands={"red": [600, 960]})
    whole = join(make().predict_dataloaders()[""])
    own, other = (join(module.predict_dataloaders()[name]) for name in ("", "red"))
    # 450, 550, 650, 750, 850, 950 nm
    assert own["wavelengths"][0].tolist() == [550, 650, 750]
    assert other["wavelengths"][0].tolist() == [650, 750, 850, 950]
    assert torch.equal(own["image"], whole["image"][:, 1:4])
    assert torch.equal(other["image"], whole["image"][:, 2:6])
    assert join(module.train_dataloader())["image"].shape[1] == 3


def test_index_tells_channels_by_their_number(make):
    module = make(bands=[500, 760], other_bands={"red": [600, 960]}, wavelengths="index")
    assert join(module.predict_dataloaders()[""])["wavelengths"][0].tolist() == [400, 410, 420]
    assert join(module.predict_dataloaders()["red"])["wavelengths"][0].tolist() == [400, 410, 420, 430]


def test_windows_of_test_pixels_share_no_pixel_with_those_of_training(make):
    counts = {"train_pixels": 60, "validation_pixels": 40, "shared_classes": 2, "validation_classes": 1}
    module = make(split={"kind": "blocks", "block_size": 6, **counts, "test_pixels": 30}, size=2, stride=2)
    width = module.split.shape[1]
    train = np.stack(np.divmod(module.split.train, width), 1)
    for index in module.split.test:
        row, column = divmod(int(index), width)
        assert np.abs(train - [row, column]).max(axis=1).min() > 2 * (module.size - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 5}, "size is 4, stride 5"),
        ({"size": 0, "stride": 1}, "size is 0"),
        ({"wavelengths": "names"}, "physical or index"),
        ({"bands": [2000, 2100]}, r"bands \[2000, 2100\]: tiny has 450 to 950 nm"),
        ({"other_bands": {"swir": [1500, 1600]}}, r"bands \[1500, 1600\]"),
    ],
)
def test_wrong_options(make, options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_pretraining_by_pixels_is_refused(make):
    with pytest.raises(ConfigError, match="give the `encoder` folder"):
        make().pretrain_dataloader()
