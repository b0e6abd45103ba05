"""Pretraining from a card to a run folder, on a scene that a small model can reconstruct."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

from vision_lowrank import pretraining_run
from vision_lowrank.data.cards import load_card
from vision_lowrank.errors import CheckpointError, ConfigError
from vision_lowrank.fitting import read_checkpoint
from vision_lowrank.instantiate import instantiate
from vision_lowrank.models import LessViT
from vision_lowrank.tasks.masked_pretraining import HyperMAEPretraining
from vision_lowrank.training import train

CHANNELS = 12


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """Card of a scene whose spectra are smooth mixtures of two, by abundances that vary over space."""
    folder = tmp_path_factory.mktemp("scene")
    generator = np.random.default_rng(3)
    rows, columns = np.mgrid[:48, :48] / 8
    abundance = 0.5 + 0.5 * np.sin(rows + generator.random()) * np.cos(columns)
    ends = np.stack([np.linspace(100, 300, CHANNELS), np.linspace(250, 50, CHANNELS) ** 1.1])
    image = abundance[..., None] * ends[0] + (1 - abundance[..., None]) * ends[1]
    image += generator.normal(0, 2, image.shape)
    np.save(folder / "image.npy", image.astype(np.float32))
    np.save(folder / "labels.npy", np.ones((48, 48), np.uint8))
    content = {
        "name": "mixtures", "title": "Mixtures", "sensor": "a random generator",
        "files": {"image": ["image.npy"], "labels": ["labels.npy"]},
        "shape": {"height": 48, "width": 48, "channels": CHANNELS},
        "bands": {"start": 450, "stop": 950, "count": CHANNELS}, "gsd": 10,
        "classes": [{"name": "land", "colour": "#00ff00"}], "licence": "CC0", "citation": "nobody",
    }  # fmt: skip
    (folder / "mixtures.yaml").write_text(yaml.safe_dump(content))
    return folder / "mixtures.yaml"


@pytest.fixture
def configure(card, tmp_path, repository):
    """Function that composes the configuration of a short run, with further overrides."""

    def make(*overrides):
        source = "data.sources.indian_pines"
        with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
            return compose(
                "train",
                [
                    "experiment=hyper_mae_indian_pines", f"{source}.card={card}", f"{source}.root={card.parent}",
                    f"{source}.size=8", f"{source}.stride=4", f"{source}.cell=16", "data.batch_size=8",
                    "model.encoder.patch_size=2", "model.encoder.embed_dim=48", "model.encoder.num_heads=6",
                    "model.encoder.depth=2",
                    "model.decoder_dim=32", "model.decoder_depth=1", "model.decoder_heads=4",
                    "model.channel_mask_ratio=0.5", "task.learning_rate=0.003", "trainer.max_epochs=3",
                    "trainer.precision=32-true", f"runs_root={tmp_path}", *overrides,
                ],
            )  # fmt: skip

    return make


def run_folder(config):
    return max((Path(config.runs_root) / config.name).iterdir(), key=lambda path: path.stat().st_ctime_ns)


def test_run_learns_and_leaves_everything_behind(configure, capsys):
    config = configure("trainer.max_epochs=20", "task.learning_rate=0.005", "task.channel_sampling=null")
    assert train(config) == []
    folder = run_folder(config)
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.yaml", "provenance.json", "history.csv", "curves.png", "reconstructions.png", "spectra.png", "encoder",
        "metrics.json", "table.md", "checkpoints",
    }  # fmt: skip
    hashes = json.loads((folder / "provenance.json").read_text())["data"]
    assert json.loads((folder / "encoder" / "provenance.json").read_text())["data"] == hashes
    assert {Path(name).name for name in hashes} == {"image.npy", "labels.npy"}
    errors = json.loads((folder / "metrics.json").read_text())["mean_squared_error"]
    assert errors["channels"]["Hyper-MAE"] < 0.6 * errors["channels"]["over wavelength"]
    assert f"{errors['both']['Hyper-MAE']:.3f}" in (folder / "table.md").read_text()
    assert f"{errors['both']['Hyper-MAE']:.3f}" in capsys.readouterr().out
    encoder = LessViT.from_pretrained(folder / "encoder")
    best = read_checkpoint(folder / "checkpoints" / "best.ckpt")["state_dict"]
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, best[f"model.encoder.{name}"]), name


def test_without_validation_tiles_the_weights_of_the_last_epoch_are_kept(configure, monkeypatch):
    marked = []
    monkeypatch.setattr(pretraining_run, "save_curves", lambda path, panels, best: marked.append(best))
    source = "data.sources.indian_pines"
    config = configure("trainer.max_epochs=2", f"{source}.validation=0", f"{source}.stride=8")
    assert train(config) == []
    folder = run_folder(config)
    last = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    assert [row["epoch"] for row in last["history"]] == [1, 2]
    assert marked == [2]
    encoder = LessViT.from_pretrained(folder / "encoder")
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, last["state_dict"][f"model.encoder.{name}"]), name
    found = json.loads((folder / "metrics.json").read_text())["mean_squared_error"]
    assert all(found[kind]["Hyper-MAE"] > 0 for kind in ("positions", "channels", "both"))


def test_a_model_that_hides_channels_alone_is_judged_and_drawn(configure, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pretraining_run, "save_spectra", lambda *given: drawn.append(given))
    config = configure("model.mask_ratio=0")
    data = instantiate(config.data)
    data.setup()
    task = instantiate(config.task, model=instantiate(config.model)).eval()
    errors = pretraining_run.evaluate_reconstruction(task, data, "32-true", tmp_path)
    assert errors["channels"]["Hyper-MAE"] > 0
    assert errors["positions"] == errors["both"] == {}
    assert (tmp_path / "reconstructions.png").exists()
    ((_, wavelengths, hidden, spectra, titles),) = drawn
    assert [title.rpartition(" ")[2] for title in titles] == ["shown", "shown"]
    assert hidden.sum(1).tolist() == [len(wavelengths) // 2] * 2
    batch = next(iter(data.test_dataloader()))
    row, column = map(int, re.fullmatch(r"tile 0, row (\d+), column (\d+): position shown", titles[0]).groups())
    expected = batch["image"][0, :, row, column].numpy()
    np.testing.assert_allclose(spectra[0]["target"], expected, rtol=1e-6)


def test_errors_are_those_of_the_masked_values(configure):
    config = configure("trainer.max_epochs=1")
    train(config)
    folder = run_folder(config)
    task = instantiate(config.task, model=instantiate(config.model)).eval()
    task.load_state_dict(read_checkpoint(folder / "checkpoints" / "best.ckpt")["state_dict"])
    data = instantiate(config.data)
    data.setup()
    total = count = 0.0
    for number, batch in enumerate(data.test_dataloader()):
        patches, valid = task.patches(batch)
        noise = task.model.draw_noise(patches, "multi", torch.Generator().manual_seed(number))
        with torch.inference_mode():
            result = task.model.reconstruct(patches, "multi", noise, valid)
        where = ~result.hidden_channels[:, :, None] & result.hidden_positions[:, None]
        error = (result.prediction - patches.pixels).square()[where]
        total, count = total + float(error.sum()), count + error.numel()
    found = json.loads((folder / "metrics.json").read_text())["mean_squared_error"]["positions"]["Hyper-MAE"]
    assert found == pytest.approx(total / count, rel=1e-4)


def test_pixels_that_only_continue_a_tile_do_not_count(configure):
    config = configure()
    task = instantiate(config.task, model=instantiate(config.model))
    size = task.model.encoder.patch_size
    side = 2 * size + 1
    batch = {
        "image": torch.randn(1, 6, side, side),
        "valid": torch.ones(1, side, side, dtype=torch.bool),
        "wavelengths": torch.linspace(450, 2200, 6)[None],
        "gsd": torch.tensor([20.0]),
    }
    batch["valid"][0, 0, 0] = False
    assert int(task.patches(batch)[1].sum()) == side**2 - 1


def test_a_resumed_run_is_the_uninterrupted_one(configure):
    few_tiles = "data.sources.indian_pines.stride=8"
    config = configure("task.channel_sampling=[0.3,0.9]", "model.normalise_targets=true", few_tiles)
    train(config)
    whole = read_checkpoint(run_folder(config) / "checkpoints" / "last.ckpt")

    def stop(self):
        if self.current_epoch == 1:
            raise RuntimeError("power cut")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HyperMAEPretraining, "on_train_epoch_start", stop)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config)
    folder = run_folder(config)
    assert not (folder / "metrics.json").exists()
    train(configure(*[f"ckpt_path={folder}/checkpoints/last.ckpt"], "task.channel_sampling=[0.3,0.9]",
                    "model.normalise_targets=true", few_tiles))  # fmt: skip
    resumed = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    assert len(resumed["history"]) == 3


def test_wrong_options_end_before_work(configure, tmp_path):
    with pytest.raises(ConfigError, match="modal_mode='infrared' is not optical or radar or multi"):
        train(configure("task.modal_mode=infrared"))
    with pytest.raises(ConfigError, match="channel_sampling"):
        train(configure("task.channel_sampling=[0.5,0.2]"))
    for name in ("encoder.patch_size", "encoder.embed_dim", "encoder.depth", "encoder.num_heads", "encoder.rank",
                 "encoder.channel_dim_per_head", "decoder_dim", "decoder_heads"):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{name.rpartition('.')[2]} is 0; give at least 1"):
            train(configure(f"model.{name}=0"))
    with pytest.raises(ConfigError, match="seed is -1; give at least 0"):
        train(configure("data.sources.indian_pines.seed=-1"))
    before = set(tmp_path.rglob("*"))
    for mode in ("radar", "all", "random"):
        with pytest.raises(ConfigError, match="the images have none"):
            train(configure(f"task.modal_mode={mode}"))
    with pytest.raises(ConfigError, match=r"a step may have 2 of 12 channels, of which channel_mask_ratio 0\.6 leaves"):
        train(configure("task.channel_sampling=[0.1,0.9]", "model.channel_mask_ratio=0.6"))
    with pytest.raises(ConfigError, match=r"a step may have 12 of 12 channels, .* 0\.95 leaves none visible"):
        train(configure("task.channel_sampling=null", "model.channel_mask_ratio=0.95"))
    assert set(tmp_path.rglob("*")) == before
    other = tmp_path / "other.ckpt"
    torch.save({"state_dict": {}, "history": [], "strength": None}, other)
    with pytest.raises(CheckpointError, match="not of this task"):
        train(configure(f"ckpt_path={other}"))
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="damaged"):
        train(configure(f"ckpt_path={broken}"))


def test_the_shipped_encoder_says_what_it_saw(repository):
    record = repository / "vision_lowrank/assets/hyper_mae_indian_pines/provenance.json"
    files = load_card("indian_pines").files
    seen = {entry.path: entry.sha256 for entry in (*files.image, *files.labels)}
    assert json.loads(record.read_text())["data"] == seen
