"""Crops against a plain resize, and what the classifier makes of windows."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vision_lowrank.errors import ConfigError
from vision_lowrank.models.sprite_classifier import CROP, SpriteClassifier, crop


def test_crop_of_whole_pixels_is_the_mean_of_squares():
    images = torch.rand(2, 3, 128, 128)
    boxes = torch.tensor([[0.0, 0.0, 128.0, 128.0], [64.0, 32.0, 128.0, 96.0]])
    crops = crop(images, boxes)
    assert crops.shape == (2, 3, CROP, CROP)
    # at four pixels a cell each sample lies between the pixels of a quarter, at two on them
    expected = images[1, :, 64:, 32:96].reshape(3, 32, 2, 32, 2).mean((2, 4))
    torch.testing.assert_close(crops[1], expected, atol=1e-5, rtol=0)
    expected = images[0].reshape(3, 32, 4, 32, 4).mean((2, 4))
    torch.testing.assert_close(crops[0], expected, atol=1e-5, rtol=0)


def test_small_crops_are_those_of_pillow():
    rows, columns = np.mgrid[:64, :64]
    smooth = np.stack([rows, columns, rows + columns], -1) * 2
    image = torch.from_numpy(smooth.transpose(2, 0, 1).astype(np.float32))
    found = crop(image[None], torch.tensor([[10.0, 20.0, 30.0, 40.0]]))[0]
    picture = Image.fromarray(smooth.astype(np.uint8)).resize((CROP, CROP), Image.BILINEAR, box=(20, 10, 40, 30))
    assert np.abs(np.asarray(picture) - found.numpy().transpose(1, 2, 0)).max() < 1.5


def test_crop_beyond_the_edge_repeats_it():
    image = torch.zeros(1, 3, 8, 8)
    image[:, :, :, 7] = 1
    found = crop(image, torch.tensor([[0.0, 8.0, 8.0, 16.0]]))
    assert torch.equal(found, torch.ones(1, 3, CROP, CROP))


class Detector(nn.Module):
    """Gives 'red' or 'blue' to crops that are full of that channel up to an empty rim, and none to the rest."""

    def forward(self, crops):
        rim = torch.ones(CROP, CROP)
        rim[2:-2, 2:-2] = 0
        filled = crops[:, :, 3:-3, 3:-3].mean((2, 3)) - (crops * rim).sum((2, 3)) / rim.sum()
        return torch.stack([20 * filled[:, 0] - 10, 20 * filled[:, 2] - 10, torch.zeros(len(crops))], 1)


def test_sprites_are_located(monkeypatch):
    model = SpriteClassifier(["red", "blue"], width=8).eval()
    monkeypatch.setattr(model, "forward", Detector().forward)
    image = torch.zeros(3, 64, 64)
    image[0, 4:32, 2:30] = 1
    image[2, 36:60, 38:62] = 1
    found = model.locate(image)
    assert sorted(item.name for item in found) == ["blue", "red"]
    boxes = {item.name: item.box for item in found}
    for name, expected in (("red", (4, 2, 32, 30)), ("blue", (36, 38, 60, 62))):
        assert np.abs(np.array(boxes[name]) - expected).max() < 7, name
    assert [item.probability for item in found] == sorted((item.probability for item in found), reverse=True)
    assert model.locate(torch.zeros(3, 64, 64)) == []
    probabilities = model.classify(image, torch.tensor([[2.0, 0.0, 34.0, 32.0], [0.0, 40.0, 20.0, 60.0]]))
    assert probabilities.argmax(1).tolist() == [0, 2]
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2))


def test_saved_model_is_the_same(tmp_path):
    torch.manual_seed(0)
    model = SpriteClassifier(["dog", "owl", "cat"], width=8).eval()
    model.save_pretrained(tmp_path)
    loaded = SpriteClassifier.from_pretrained(tmp_path).eval()
    crops = torch.randn(2, 3, CROP, CROP)
    assert loaded.names == ["dog", "owl", "cat"]
    assert torch.equal(loaded(crops), model(crops))
    assert model(crops).shape == (2, 4)
    with pytest.raises(ConfigError, match=r"crops are \(1, 3, 16, 16\)"):
        model(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("width", [0, -8, 12])
def test_a_width_that_does_not_divide_into_groups_is_refused(width):
    with pytest.raises(ConfigError, match=f"width={width}: give a multiple of 8"):
        SpriteClassifier(["dog"], width)
