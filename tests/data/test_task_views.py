"""Views of tasks, compared with arrays."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from vision_lowrank.data.image_tasks import TaskData
from vision_lowrank.data.task_views import crop_middle, enlarge, select_bands
from vision_lowrank.errors import ConfigError, DataError

WAVELENGTHS = np.array([700.0, 450.0, 1000.0], np.float32)


class Samples(Dataset):
    def __init__(self, seed, kind):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(5, 3, 6, 7, generator=generator)
        self.masks = torch.randint(0, 4, (5, 6, 7), generator=generator)
        self.kind = kind
        self.groups = np.arange(5) // 2
        self.fingerprint = f"samples {seed}"

    def __len__(self):
        return 5

    def __getitem__(self, index):
        known = {"mask": self.masks[index]} if self.kind == "segmentation" else {"label": torch.tensor(index % 2)}
        shared = {"wavelengths": torch.from_numpy(WAVELENGTHS), "gsd": torch.tensor(10.0)}
        return {"image": self.images[index], **shared, **known}


def task(kind):
    sets = {name: Samples(seed, kind) for seed, name in enumerate(("train", "validation", "test"))}
    return TaskData("toy", kind, ("a", "b"), "accuracy", WAVELENGTHS, 10.0, "abc", **sets)


def test_bands_are_chosen_by_wavelength():
    data = task("classification")
    seen = select_bands(data, [450, 700])
    assert seen.wavelengths.tolist() == [700, 450]
    for index in range(5):
        assert torch.equal(seen.test[index]["image"], data.test.images[index, [0, 1]])
        assert seen.test[index]["wavelengths"].tolist() == [700, 450]
        assert int(seen.test[index]["label"]) == index % 2
    assert np.array_equal(seen.train.groups, data.train.groups)
    assert seen.fingerprint not in (data.fingerprint, select_bands(data, [450, 600]).fingerprint)
    parts = [part for one in (data, seen) for part in (one.train, one.validation, one.test)]
    assert len({part.fingerprint for part in parts}) == 6
    with pytest.raises(ConfigError, match="no channel from 500 to 600 nm; its channels lie from 450 to 1000"):
        select_bands(data, [500, 600])


def test_middle_is_cut_of_image_and_mask():
    data = task("segmentation")
    sample = crop_middle(data, 4).train[2]
    assert torch.equal(sample["image"], data.train.images[2, :, 1:5, 1:5])
    assert torch.equal(sample["mask"], data.train.masks[2, 1:5, 1:5])
    # where one pixel more is left over on a side, it is after the middle, along both sides
    sample = crop_middle(data, 3).train[2]
    assert torch.equal(sample["image"], data.train.images[2, :, 1:4, 2:5])
    assert torch.equal(sample["mask"], data.train.masks[2, 1:4, 2:5])
    with pytest.raises(DataError, match="a tile of 6 x 7 pixels has no middle of 7"):
        crop_middle(data, 7).train[0]


def test_enlarged_pixels_are_smaller():
    data = task("classification")
    big = enlarge(data, 2)
    sample = big.validation[1]
    expected = torch.nn.functional.interpolate(data.validation.images[1:2], size=(12, 14), mode="bicubic")[0]
    torch.testing.assert_close(sample["image"], expected)
    assert (big.gsd, float(sample["gsd"])) == (5.0, 5.0)
    assert big.fingerprint != data.fingerprint
    with pytest.raises(ConfigError, match="invent labels"):
        enlarge(task("segmentation"), 2)
