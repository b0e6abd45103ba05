"""Hyper-MAE's training task: sampled channels, repeatable masks, and radar."""

import pytest
import torch

from vision_lowrank.models import HyperMAE, LessViT
from vision_lowrank.tasks.masked_pretraining import HyperMAEPretraining


def make(**options):
    torch.manual_seed(0)
    encoder = LessViT(patch_size=4, embed_dim=48, depth=1, num_heads=3)
    model = HyperMAE(encoder, decoder_dim=32, decoder_depth=1, decoder_heads=2)
    task = HyperMAEPretraining(model, learning_rate=0.01, weight_decay=0.0, warmup=0.1, **options)
    task.log = lambda name, value, **kwargs: task.__dict__.setdefault("logged", {}).__setitem__(name, float(value))
    return task


def batch(channels=20):
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(2, channels, 16, 16, generator=generator),
        "valid": torch.ones(2, 16, 16, dtype=torch.bool),
        "wavelengths": torch.linspace(450, 950, channels).expand(2, -1),
        "gsd": torch.full((2,), 10.0),
    }


def test_invalid_pixels_follow_their_patches():
    task = make()
    given = batch()
    given["valid"][1, 5, 9] = False
    patches, valid = task.patches(given)
    wrong = torch.nonzero(~valid).tolist()
    # row 5, column 9 of patches of 4: patch (1, 2), its pixel (1, 1)
    assert wrong == [[1, 1 * 4 + 2, 1 * 4 + 1]]
    assert patches.pixels[1, 3, 6, 5] == given["image"][1, 3, 5, 9]


def test_what_continues_a_tile_to_whole_patches_does_not_count():
    task = make()
    given = batch()
    given["image"], given["valid"] = given["image"][..., :14, :13], given["valid"][:, :14, :13]
    patches, valid = task.patches(given)
    assert patches.pixels.shape[2] == 16
    for row in range(16):
        for column in range(16):
            patch, pixel = row // 4 * 4 + column // 4, row % 4 * 4 + column % 4
            inside = row < 14 and column < 13
            assert valid[:, patch, pixel].tolist() == [inside] * 2
            # the last pixels of rows and columns go on
            source = given["image"][..., min(row, 13), min(column, 12)]
            assert torch.equal(patches.pixels[:, :, patch, pixel], source)


def test_steps_and_validation_repeat_exactly():
    task = make(channel_sampling=(0.3, 0.9))
    losses = []
    for _ in range(2):
        torch.manual_seed(5)
        losses.append(task.training_step(batch(), 0).item())
        torch.rand(7)
        task.validation_step(batch(), 3)
        losses.append(task.logged["val/loss"])
    assert losses[:2] == losses[2:]
    task.validation_step(batch(), 4)
    assert task.logged["val/loss"] != losses[1]


@pytest.mark.parametrize(("mode", "passes"), [("optical", 1), ("multi", 1), ("all", 3), ("random", 1)])
def test_passes_over_modalities_are_added(mode, passes):
    task = make(modal_mode=mode)
    given = batch() | {
        "radar": torch.randn(2, 2, 16, 16), "radar_wavelengths": torch.tensor([5500.0, 5700.0]).expand(2, -1),
    }  # fmt: skip
    patches, valid = task.patches(given)
    assert patches.pixels.shape[1] == 22
    results = task.reconstruct(patches, valid, mode, torch.Generator().manual_seed(2))
    assert len(results) == passes
    torch.manual_seed(6)
    loss = task.training_step(given, 0)
    assert loss.item() == pytest.approx(
        task.logged["train/position loss"] + task.logged["train/channel loss"], rel=1e-5
    )
