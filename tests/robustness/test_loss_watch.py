"""A loss that is no number ends training at its step, names where the batch came from, and spares the checkpoint."""

import lightning as L
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch.utils.data import DataLoader

from vision_lowrank.checkpoints import read_checkpoint
from vision_lowrank.data.patches import EpochShuffle, collate_batch
from vision_lowrank.data.splits import Split
from vision_lowrank.data.windows import WindowDataset
from vision_lowrank.errors import DataError, TrainingError
from vision_lowrank.loss_watch import LossWatch
from vision_lowrank.tasks.masked_pretraining import HyperMAEPretraining
from vision_lowrank.tasks.scene_classification import SceneClassification
from vision_lowrank.training import train


def run(repository, root, overrides):
    with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
        train(compose("train", [*overrides, f"runs_root={root}"]))


def poison(patch, task):
    """Makes the loss of the third batch of the second epoch NaN; returns the seen batches' first entries."""
    step = task.training_step
    seen = []

    def training_step(self, batch, index):
        loss = step(self, batch, index)
        if (self.current_epoch, index) == (1, 2):
            seen.append(batch)
            loss = loss * float("nan")
        return loss

    patch.setattr(task, "training_step", training_step)
    return seen


def test_pixels_are_named(repository, scene, tmp_path, monkeypatch):
    poison(monkeypatch, SceneClassification)
    with pytest.raises(TrainingError, match=r"epoch 2, batch 3: the loss is nan on patches around") as caught:
        run(repository, tmp_path, scene)
    (folder,) = tmp_path.glob("*/*-seed0")
    pixels = Split.load(folder / "split.npz").train
    # the order that the loader promises: of seed and epoch alone
    chosen = pixels[np.random.default_rng((0, 1)).permutation(len(pixels))[32:48]]
    named = ", ".join(f"({pixel // 24}, {pixel % 24})" for pixel in chosen[:8])
    assert f"(row, column) {named} and 8 more, whose values are finite" in str(caught.value)
    last = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    assert len(last["history"]) == 1
    assert all(value.isfinite().all() for value in last["state_dict"].values())


def test_weights_that_are_no_numbers_reach_no_checkpoint(repository, scene, tmp_path, monkeypatch):
    def spoil(self):
        if self.current_epoch == 1 and self.trainer.is_last_batch:
            next(self.model.parameters()).grad[0] = float("nan")

    monkeypatch.setattr(SceneClassification, "on_after_backward", spoil)
    with pytest.raises(TrainingError, match=r"epoch 2: model\..* is not finite, though the loss was; lower task\."):
        run(repository, tmp_path, scene)
    (folder,) = tmp_path.glob("*/*-seed0")
    for name in ("last", "best"):
        kept = read_checkpoint(folder / "checkpoints" / f"{name}.ckpt")
        assert kept["epoch"] == 0
        assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_tiles_are_named(repository, tiles, tmp_path, monkeypatch):
    seen = poison(monkeypatch, HyperMAEPretraining)
    with pytest.raises(TrainingError, match=r"batch 3: .* on tiles indian_pines \d+") as caught:
        run(repository, tmp_path, tiles)
    named = str(caught.value).partition(" on tiles ")[2].partition(", whose")[0].split(", ")
    with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
        config = compose("train", tiles)
    from vision_lowrank.instantiate import instantiate

    data = instantiate(config.data)
    data.setup()
    mean, deviation = data.statistics("indian_pines")
    source = data.sources["indian_pines"]
    for name, image in zip(named, seen[0]["image"], strict=True):
        tile = source.read(int(name.removeprefix("indian_pines ")))
        expected = (tile - mean[:, None, None]) / deviation[:, None, None]
        assert np.allclose(image.numpy(), expected, atol=1e-5)


class Mean(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, index):
        return (self.weight * batch["image"]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_windows_with_damaged_pixels_are_named(tmp_path):
    cube = torch.rand(2, 12, 12)
    # with a border of 2, this is the pixel (3, 5) of the scene
    cube[1, 5, 7] = float("nan")
    corners = np.stack(np.meshgrid(range(0, 9, 3), range(0, 9, 3), indexing="ij"), -1).reshape(-1, 2)
    dataset = WindowDataset(cube, np.zeros((12, 12), np.int64), corners, 3, np.arange(2), {"gsd": torch.tensor(1.0)})
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, max_epochs=1, callbacks=[LossWatch()],
    )  # fmt: skip
    loader = DataLoader(dataset, 4, sampler=EpochShuffle(9, seed=0), collate_fn=collate_batch)
    model = Mean()
    with pytest.raises(DataError, match=r"NaN or infinite values in windows of 3 x 3 pixels from \(row, column\) "):
        trainer.fit(model, loader)
    with pytest.raises(DataError, match=r"\(row, column\) \(1, 4\); mend or mask them"):
        trainer.fit(model, loader)
    assert model.weight.isfinite().all()
