"""Training stopped within an epoch, or at its end, goes on as if it had never been stopped."""

import functools
import subprocess
import sys
from datetime import timedelta

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch.utils.data import DataLoader, Dataset

from vision_lowrank import checkpoints
from vision_lowrank.batch_order import samples_of_batch
from vision_lowrank.checkpoints import LastCheckpoint, Patience, Resumption, WholeFiles, read_checkpoint
from vision_lowrank.data.patches import EpochShuffle
from vision_lowrank.data.scene_tasks import scene_task
from vision_lowrank.data.tile_module import MixedBatches
from vision_lowrank.models.encoders import BandStatistics
from vision_lowrank.raster_fitting import fit_raster
from vision_lowrank.tasks.masked_pretraining import HyperMAEPretraining
from vision_lowrank.tasks.raster_tasks import RasterTask
from vision_lowrank.tasks.scene_classification import SceneClassification
from vision_lowrank.training import train


class PowerCut(Exception):
    pass


def cut(patch, task, epoch, batch):
    """Lets the training of a kind of task fail at a step."""
    step = task.training_step

    def training_step(self, content, index):
        if (self.current_epoch, index) == (epoch, batch):
            raise PowerCut
        return step(self, content, index)

    patch.setattr(task, "training_step", training_step)


@pytest.fixture(scope="module")
def uninterrupted(repository, tmp_path_factory):
    """Function that returns the checkpoint of a kind's training that nothing disturbed."""

    @functools.cache
    def trained(kind, *overrides):
        return run(repository, tmp_path_factory.mktemp(kind), *overrides)

    return trained


def run(repository, root, *overrides):
    """Trains and returns the checkpoint of the end."""
    with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
        train(compose("train", [*overrides, f"runs_root={root}"]))
    (path,) = root.glob("*/*/checkpoints/last.ckpt")
    return read_checkpoint(path)


@pytest.mark.parametrize(
    ("kind", "workers", "epoch", "batch", "accumulated"),
    [
        # worker processes are ahead of the training
        ("scene", 2, 1, 3, 1),
        ("scene", 2, 2, 0, 1),
        ("tiles", 2, 1, 2, 1),
        # the gradient of batch 2 would be lost
        ("tiles", 0, 1, 3, 2),
        # the average of the weights is a step's last deed
        ("sprites", 0, 1, 2, 1),
    ],
)
def test_a_cut_within_an_epoch_changes_nothing(
    repository, uninterrupted, tmp_path, request, kind, workers, epoch, batch, accumulated
):
    if kind == "sprites":
        pytest.importorskip("diffusers")
        from test_kills import SPRITES as overrides

        from vision_lowrank.tasks.text_to_image import TextToImage as task
    else:
        overrides = request.getfixturevalue(kind)
        task = {"scene": SceneClassification, "tiles": HyperMAEPretraining}[kind]
    overrides = [*overrides, f"data.num_workers={workers}"]
    if accumulated > 1:
        overrides.append(f"+trainer.accumulate_grad_batches={accumulated}")
    expected = uninterrupted(kind, *overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "SAVE_EVERY", timedelta(0))
        cut(patch, task, epoch, batch)
        with pytest.raises(PowerCut):
            run(repository, tmp_path / "cut", *overrides)
    (path,) = (tmp_path / "cut").glob("*/*/checkpoints/last.ckpt")
    steps = expected["global_step"] // 3
    assert read_checkpoint(path)["global_step"] == epoch * steps + batch // accumulated
    found = run(repository, tmp_path / "cut", *overrides, f"ckpt_path={path}")
    assert found["history"] == expected["history"]
    assert found["global_step"] == expected["global_step"]
    for name, value in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value), name
    moments, other = (part["optimizer_states"][0]["state"] for part in (found, expected))
    assert all(torch.equal(moments[key]["exp_avg_sq"], other[key]["exp_avg_sq"]) for key in other)
    assert found["lr_schedulers"] == expected["lr_schedulers"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_benchmark_goes_on_with_the_batches_of_its_epoch(fields, tmp_path, workers):
    data = scene_task(str(fields), str(fields.parent), "classification", side=4, seed=0)

    def make():
        encoder = BandStatistics(patch_size=2)
        encoder.prepare(data.wavelengths.tolist())
        return encoder

    def fit(name):
        return fit_raster(
            data, make, "linear", [0.01], 3, 4, "32-true", "cpu", tmp_path / name, 5, [], 1, workers, {"": data.test}
        )

    whole = fit("whole")
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, RasterTask, 2, 1)
        with pytest.raises(PowerCut):
            fit("cut")
    again = fit("cut")
    assert again.trials[0].score == whole.trials[0].score
    best, expected = (read_checkpoint(tmp_path / name / "lr_0.01" / "best.ckpt") for name in ("cut", "whole"))
    assert all(torch.equal(best["state_dict"][name], value) for name, value in expected["state_dict"].items())
    history, other = (
        [{key: value for key, value in row.items() if key != "seconds"} for row in part["history"]]
        for part in (best, expected)
    )
    assert history == other


class Line(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.tensor([float(index)])


class Slope(L.LightningModule):
    """Learns nothing and validates alike; remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []
        self.history = []

    def training_step(self, batch, index):
        self.seen.append(batch.flatten().int().tolist())
        return (self.weight * batch).mean()

    def validation_step(self, batch, index):
        self.log("score", 0.5)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["history"] = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit_slope(folder, path=None, **options):
    task = Slope()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, plugins=[WholeFiles()], max_epochs=9,
        callbacks=[Patience("score", patience=2, mode="max"), Resumption(), LastCheckpoint(folder, folder)], **options,
    )  # fmt: skip
    loader = DataLoader(Line(), 3, sampler=EpochShuffle(10, seed=4))
    trainer.fit(task, loader, DataLoader(Line(), 10), ckpt_path=path, weights_only=True)
    return task, trainer


def test_a_run_that_had_stopped_stays_stopped(tmp_path):
    task, trainer = fit_slope(tmp_path)
    assert trainer.current_epoch == 3
    assert len(task.seen) == 12
    task, trainer = fit_slope(tmp_path, str(tmp_path / "last.ckpt"))
    assert task.seen == []


def test_batches_are_those_that_the_loader_gave(tmp_path):
    task, _ = fit_slope(tmp_path)
    loader = DataLoader(Line(), 3, sampler=EpochShuffle(10, seed=4))
    told = [list(samples_of_batch(loader, epoch, batch)) for epoch in range(3) for batch in range(4)]
    assert told == task.seen
    mixed = MixedBatches([5, 9], 2, seed=1, rank=0, processes=1)
    loader = DataLoader(Line(), batch_sampler=mixed)
    mixed.set_epoch(3)
    expected = list(mixed)
    assert [samples_of_batch(loader, 3, batch) for batch in range(len(expected))] == expected


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom vision_lowrank.runs import atomic_folder, atomic_path\n"
        "run = Path(sys.argv[1])\n"
        "with atomic_folder(run / 'model') as folder, atomic_path(run / 'a.ckpt') as file:\n"
        "    (folder / 'weights').touch(); file.touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    kept = [tmp_path / name for name in (".gitignore", ".notes.2024abcd", "best.ckpt")]
    for path in kept:
        path.touch()
    fit_slope(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / "last.ckpt"])
