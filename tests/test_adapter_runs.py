"""Training by train.py with methods that ask for more than LoRA does: the same run whether it was stopped or not."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from stripes import write_stripes

from vision_lowrank.checkpoints import read_checkpoint
from vision_lowrank.errors import AdapterError, ConfigError
from vision_lowrank.tasks.masked_pretraining import MaskedPretraining
from vision_lowrank.tasks.scene_classification import SceneClassification
from vision_lowrank.training import train


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    return write_stripes(tmp_path_factory.mktemp("scene"), 24, 24)


def configure(card, runs, name, *overrides):
    with initialize_config_dir(str(Path(__file__).resolve().parents[1] / "configs"), version_base="1.3"):
        return compose(
            "train",
            [
                "experiment=own_scene",
                "regime=adapt",
                f"adapter={name}",
                f"data.card={card}",
                f"data.root={card.parent}",
                f"runs_root={runs}",
                "data.patch_size=5",
                "data.components=4",
                "data.batch_size=32",
                "data.split.train=0.2",
                "data.split.validation=0.1",
                "baselines=null",
                "pretraining.epochs=1",
                "trainer.max_epochs=3",
                "trainer.precision=32-true",
                "+model.dim=16",
                "+model.num_heads=[2]",
                "+model.depths=[1]",
                "+model.stem_channels=[2,4]",
                "+model.stem_depths=[3,3]",
                *overrides,
            ],
        )


def newest(runs):
    return max((runs / "own_scene").glob("*-seed*"), key=lambda path: path.stat().st_mtime_ns)


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "name", ["lora_sb", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dylora", "sora", "flylora", "dora"))]
)
def test_a_resumed_run_is_the_uninterrupted_one(card, tmp_path, monkeypatch, name):
    small = ["adapter.method.rank=4", "adapter.method.alpha=4"]
    train(configure(card, tmp_path, name, *small))
    whole = read_checkpoint(newest(tmp_path) / "checkpoints" / "last.ckpt")["state_dict"]
    step = SceneClassification.training_step

    def stop(task, batch, index):
        if task.current_epoch == 2:
            raise Stop
        return step(task, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(SceneClassification, "training_step", stop)
        with pytest.raises(Stop):
            train(configure(card, tmp_path, name, *small))
    stopped = newest(tmp_path)
    (result,) = train(configure(card, tmp_path, name, *small, f"ckpt_path={stopped / 'checkpoints' / 'last.ckpt'}"))
    resumed = read_checkpoint(stopped / "checkpoints" / "last.ckpt")["state_dict"]
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []
    assert result.facts["parameters"]["adapter"] > 0
    assert (stopped / "adapter" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("name", "overrides", "error", "message"),
    [
        ("sora", ["adapter.training.sparsity=null"], ConfigError, "SoRA without"),
        ("hydra", ["adapter.training.lora_pro=true"], AdapterError, "LoRA-Pro needs"),
        ("hydra", ["adapter.rate_ratio=16"], AdapterError, r"LoRA\+ is for LoRA"),
        ("pissa", ["adapter.method.rank=90"], AdapterError, "pissa rank=90"),
        (
            "dora",
            ["adapter.cycles={first_cycle: 1, growth: 2, minimum: 0.1}"],
            ConfigError,
            "set them to null for dora",
        ),
    ],
)
def test_what_does_not_fit_is_told_before_pretraining(card, tmp_path, monkeypatch, name, overrides, error, message):
    def refuse(*args, **kwargs):
        raise AssertionError("pretraining began")

    monkeypatch.setattr(MaskedPretraining, "__init__", refuse)
    with pytest.raises(error, match=message):
        train(configure(card, tmp_path, name, *overrides))
