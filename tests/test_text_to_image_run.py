"""Runs on sprites from the command line's configuration to their folders, with tiny networks."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from torch import nn

from vision_lowrank.data.sprites import SPRITES
from vision_lowrank.errors import CheckpointError, ConfigError
from vision_lowrank.fitting import read_checkpoint
from vision_lowrank.models.sprite_classifier import Found
from vision_lowrank.sprite_classifier_run import load_classifier
from vision_lowrank.tasks.text_to_image import TextToImage
from vision_lowrank.text_to_image_run import arrange_for_cpu, recognise, save_grid
from vision_lowrank.training import train

pytest.importorskip("diffusers")

TINY = [
    "model.channels=[8,16]", "model.heads=2", "model.text_width=16", "model.text_layers=1", "+model.groups=4",
    "+model.text_heads=2", "data.batch_size=4", "data.steps=2", "trainer.max_epochs=3", "samples.every=2",
    "samples.prompts=[a dog on grass,an owl]",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(root, repository):
    """Function that trains an experiment and returns the newest run folder."""

    def start(experiment, *overrides):
        common = [f"experiment={experiment}", f"runs_root={root}", "trainer.precision=32-true"]
        with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
            config = compose("train", [*common, *overrides])
        assert train(config) == []
        return newest(root / experiment)

    return start


@pytest.fixture(scope="module")
def base(run):
    return run("sprites_base", *TINY)


def newest(folder):
    return max(folder.iterdir(), key=lambda path: path.stat().st_ctime_ns)


def test_the_form_for_cpus_computes_the_same_without_copies():
    from vision_lowrank.composer.pipeline import build_pipeline

    plain = build_pipeline(
        ["a"], side=16, channels=(8, 16), groups=4, heads=2, text_width=16, text_layers=1, text_heads=2
    ).unet.double()
    arranged = copy.deepcopy(plain)
    arrange_for_cpu(arranged)
    met = []
    for module in arranged.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_pre_hook(
                lambda _, args: met.append(args[0].is_contiguous(memory_format=torch.channels_last))
            )
    latents = torch.randn(2, 12, 8, 8, dtype=torch.float64)
    text = torch.randn(2, 5, 16, dtype=torch.float64)
    gradients = []
    for unet in (plain, arranged):
        x = latents.clone().requires_grad_()
        y = unet(x, torch.tensor([3, 700]), encoder_hidden_states=text).sample
        gradients.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *unet.parameters()])])
    for ours, theirs in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    # all but the first, which gets the latents as they come
    assert not met[0]
    assert len(met) > 10
    assert all(met[1:])


def test_base_leaves_everything_behind(base):
    from vision_lowrank.composer.render import load_base

    names = {path.name for path in base.iterdir()}
    assert names == {
        "config.yaml", "provenance.json", "history.csv", "curves.png", "samples", "pipeline", "checkpoints",
        "metrics.json",
    }  # fmt: skip
    assert [path.name for path in (base / "samples").iterdir()] == ["step000004.png"]
    with Image.open(base / "samples" / "step000004.png") as picture:
        assert picture.size == (1024, 128)
    metrics = json.loads((base / "metrics.json").read_text())
    assert metrics["steps"] == 6
    assert metrics["recognised"] is None
    saved, kept = load_base(str(base / "pipeline")), read_checkpoint(base / "checkpoints" / "last.ckpt", "min_snr")
    prefix = "averaged.module.unet."
    for name, value in saved.unet.state_dict().items():
        assert torch.equal(value, kept["state_dict"][prefix + name].half().float()), name
    assert (base / "history.csv").read_text().count("\n") == 4


def test_a_resumed_run_is_the_uninterrupted_one(base, run, root):
    def stop(self):
        if self.current_epoch == 1:
            raise RuntimeError("power cut")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextToImage, "on_train_epoch_start", stop)
        with pytest.raises(RuntimeError, match="power cut"):
            run("sprites_base", *TINY)
    folder = newest(root / "sprites_base")
    assert folder != base
    assert not (folder / "metrics.json").exists()
    assert run("sprites_base", *TINY, f"ckpt_path={folder}/checkpoints/last.ckpt") == folder
    whole, resumed = (read_checkpoint(path / "checkpoints" / "last.ckpt") for path in (base, folder))
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    assert resumed["history"] == whole["history"]


def test_training_goes_on_from_finished_weights(base, run):
    from vision_lowrank.composer.render import load_base

    folder = run("sprites_base", *TINY, f"base={base}/pipeline", "task.learning_rate=0", "trainer.max_epochs=1")
    start, end = (load_base(str(path / "pipeline")) for path in (base, folder))
    for name, value in start.unet.state_dict().items():
        assert torch.equal(value, end.unet.state_dict()[name]), name


def test_lora_leaves_a_file_that_fits_its_base(base, run):
    from vision_lowrank.composer.lora_files import check_fits, read_lora
    from vision_lowrank.composer.render import load_base

    folder = run(
        "sprites_lora", f"base={base}/pipeline", "concept=bus", "data.steps=2", "data.batch_size=2",
        "trainer.max_epochs=1", "samples.every=5",
    )  # fmt: skip
    lora, pipeline = read_lora(folder / "lora.safetensors"), load_base(str(base / "pipeline"))
    check_fits(lora, pipeline.unet, pipeline.text_encoder)
    assert set(lora.tokens) == {"<bus1>", "<bus2>"}
    assert {change.rank for change in lora.unet.values()} == {12}
    assert all(float(change.up.abs().max()) > 0 for change in lora.unet.values())
    assert {name.split(".")[-1] for name in lora.text_encoder} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    known = pipeline.text_encoder.get_input_embeddings().weight
    car = known[pipeline.tokenizer("car", add_special_tokens=False).input_ids[0]]
    # started as a car, and moved by few steps of about the learning rate
    assert 0 < float((lora.tokens["<bus2>"][0].float() - car).abs().max()) < 0.01
    assert not (folder / "pipeline").exists()
    assert json.loads((folder / "metrics.json").read_text())["concept"] == "bus"


def test_classifier_learns_and_leaves_its_accuracy(run):
    folder = run(
        "sprites_classifier", "data.steps=2", "data.batch_size=4", "data.held_out=30", "model.width=8",
        "trainer.max_epochs=2",
    )  # fmt: skip
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["boxes"] == 30
    assert 0 <= metrics["accuracy"] <= 1
    assert set(metrics["recall"]) == {*SPRITES, "none"}
    assert (folder / "confusion.png").exists()
    model = load_classifier(folder / "model")
    assert tuple(model.names) == SPRITES
    assert not model.training
    best = read_checkpoint(folder / "checkpoints" / "best.ckpt", "sprites")["state_dict"]
    assert all(torch.equal(value, best[f"model.{name}"]) for name, value in model.state_dict().items())


def test_recognition_counts_the_surest_sprite(base, monkeypatch):
    answers = iter([["dog", "cat"], ["cat", "dog"], [], ["dog"], ["owl"], ["owl", "dog"], ["owl"], ["owl"]])

    class Judge:
        def locate(self, image):
            assert image.shape == (3, 64, 64)
            return [Found(name, (0, 0, 1, 1), 0.9) for name in next(answers)]

    seen = []

    def sample(pipeline, prompts, precision, seed):
        seen.append((prompts, seed))
        return np.zeros((len(prompts), 64, 64, 3), np.uint8)

    monkeypatch.setattr("vision_lowrank.text_to_image_run.sample", sample)
    assert recognise(None, Judge(), {"dog": "a dog", "owl": "an owl"}, 4, "32-true") == {"dog": 0.5, "owl": 1.0}
    assert seen[1][0][:2] == ["an owl on a red background", "an owl on a blue background"]
    assert seen[0][1] != seen[1][1]


def test_grid_puts_images_side_by_side(tmp_path):
    images = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    save_grid(tmp_path / "grid.png", images, scale=3)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (24, 96, 3)
    assert (grid[0, ::12, 0] == np.arange(8)).all()
    assert grid[12, 0, 0] == 8
    assert (grid[12:, 12:] == 0).all()


def test_wrong_options_end_before_work(run, base, root, tmp_path):
    runs = len(list((root / "sprites_base").iterdir()))
    with pytest.raises(ConfigError, match=r"concept=dog: there are fox, tiger"):
        run("sprites_lora", "concept=dog", f"base={base}/pipeline")
    with pytest.raises(CheckpointError, match=r"no model_index\.json"):
        run("sprites_lora", "concept=fox", f"base={tmp_path}")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        run("sprites_base", *TINY, f"samples.classifier={tmp_path}")
    torch.save({"state_dict": {}, "history": []}, Path(tmp_path) / "other.ckpt")
    with pytest.raises(CheckpointError, match="not of this task"):
        run("sprites_base", *TINY, f"ckpt_path={tmp_path}/other.ckpt")
    assert len(list((root / "sprites_base").iterdir())) == runs


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("samples.every=0", r"samples\.every is 0; give at least 1"),
        ("samples.each=abc", "samples: each is 'abc', which is not a whole number"),
        ("samples.prompts=dog", "samples: prompts is 'dog', which is not a list"),
        ("samples.prompts=[]", r"samples\.prompts is empty"),
        ("samples.classifier=3", "samples: classifier is 3, which is not a text"),
        ("adapter.method=lora", "adapter: method is 'lora', which is not a mapping"),
        ("adapter.unet=[1]", r"adapter: unet\[0\] is 1, which is not a text"),
        ("adapter.text_encoder=null", "adapter: text_encoder is None, which is not a list"),
    ],
)
def test_values_of_another_kind_end_before_work(run, root, override, message):
    folder = root / "sprites_lora"
    runs = set(folder.iterdir()) if folder.exists() else set()
    with pytest.raises(ConfigError, match=message):
        run("sprites_lora", "concept=fox", override)
    assert (set(folder.iterdir()) if folder.exists() else set()) == runs
