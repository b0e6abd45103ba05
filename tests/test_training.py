"""The whole way from a card to a run folder, on a scene that a small model can learn."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import yaml
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from vision_lowrank.adapters import load_adapter
from vision_lowrank.data.splits import Split
from vision_lowrank.errors import CheckpointError, ConfigError
from vision_lowrank.evaluation.tables import read_result
from vision_lowrank.fitting import read_checkpoint
from vision_lowrank.models import LolaSpecViT
from vision_lowrank.training import train

HEIGHT, WIDTH, BANDS, CLASSES = 30, 26, 8, 3


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Card of a scene in which every class is a stripe of columns with a spectrum of its own."""
    folder = tmp_path_factory.mktemp("scene")
    generator = np.random.default_rng(3)
    spectra = generator.normal(100, 20, (CLASSES, BANDS))
    classes = np.arange(WIDTH) * CLASSES // WIDTH * np.ones((HEIGHT, 1), int)
    image = spectra[classes] + generator.normal(0, 4, (HEIGHT, WIDTH, BANDS))
    labels = np.where(generator.random((HEIGHT, WIDTH)) < 0.8, classes + 1, 0)
    np.save(folder / "image.npy", image.astype(np.float32))
    np.save(folder / "labels.npy", labels.astype(np.uint8))
    colours = ["#00ff00", "#aa5500", "#0000ff"]
    card = {
        "name": "stripes",
        "title": "Stripes",
        "sensor": "a random generator",
        "files": {"image": ["image.npy"], "labels": ["labels.npy"]},
        "shape": {"height": HEIGHT, "width": WIDTH, "channels": BANDS},
        "bands": {"start": 450, "stop": 950, "count": BANDS},
        "gsd": 2,
        "classes": [{"name": f"class {i}", "colour": colour} for i, colour in enumerate(colours)],
        "licence": "CC0",
        "citation": "nobody",
    }
    (folder / "stripes.yaml").write_text(yaml.safe_dump(card))
    return folder / "stripes.yaml"


@pytest.fixture
def configure(scene, tmp_path, repository):
    """Function that composes the configuration of a short run, with further overrides."""

    def make(*overrides):
        with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
            return compose(
                "train",
                [
                    "experiment=own_scene",
                    f"data.card={scene}",
                    f"data.root={scene.parent}",
                    f"runs_root={tmp_path / 'runs'}",
                    "data.patch_size=5",
                    "data.components=4",
                    "data.split.train=0.2",
                    "data.split.validation=0.1",
                    "data.batch_size=16",
                    "trainer.max_epochs=3",
                    "trainer.precision=32-true",
                    "+model.dim=16",
                    "+model.num_heads=[2]",
                    "+model.depths=[1]",
                    "+model.stem_channels=[2,4]",
                    "+model.stem_depths=[3,3]",
                    "baselines=null",
                    *overrides,
                ],
            )

    return make


def run_folder(config):
    """The newest run of a configuration."""
    return max((Path(config.runs_root) / "own_scene").glob("*-seed*"), key=lambda path: path.stat().st_mtime_ns)


def test_run_leaves_everything_and_scores_are_those_of_its_map(configure):
    config = configure("trainer.max_epochs=12")
    (result,) = train(config)
    folder = run_folder(config)
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml", "provenance.json", "split.npz", "preprocessing.safetensors", "model", "checkpoints",
        "history.csv", "metrics.json", "metrics.csv", "table.md", "curves.png", "composite.png", "ground_truth.png",
        "prediction.png", "errors.png", "overview.png", "confusion.png", "prediction.tif", "prediction.npy",
    }  # fmt: skip
    predicted = np.load(folder / "prediction.npy")
    with rasterio.open(folder / "prediction.tif") as file:
        assert np.array_equal(file.read(1), predicted)
    split = Split.load(folder / "split.npz")
    labels = np.load(config.data.root + "/labels.npy").astype(int) - 1
    for name, pixels in split.subsets().items():
        assert result.scores[name].oa == pytest.approx(np.mean(predicted.flat[pixels] == labels.flat[pixels]))
    assert result.scores["test"].oa > 0.9
    assert read_result(folder).scores["test"].oa == result.scores["test"].oa
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 0
    assert set(json.loads((folder / "provenance.json").read_text())["data"]) == {"image.npy", "labels.npy"}


def test_weights_and_preprocessing_give_the_map_again(configure, scene):
    config = configure()
    train(config)
    folder = run_folder(config)
    model = LolaSpecViT.from_pretrained(folder / "model").eval()
    scaling = load_file(folder / "preprocessing.safetensors")
    image = torch.from_numpy(np.load(scene.parent / "image.npy")).permute(2, 0, 1)
    scaled = torch.einsum("kc,chw->khw", scaling["projection"], (image - scaling["mean"][:, None, None])
                          * scaling["gain"][:, None, None])  # fmt: skip
    padded = torch.nn.functional.pad(scaled[None], (2, 2, 2, 2), mode="reflect")[0]
    patches = padded.unfold(1, 5, 1).unfold(2, 5, 1).permute(1, 2, 0, 3, 4).reshape(-1, 4, 5, 5)
    with torch.inference_mode():
        logits = model(patches)
    clear = logits.topk(2).values.diff().abs().squeeze() > 1e-3
    predicted = torch.from_numpy(np.load(folder / "prediction.npy").reshape(-1).astype(int))
    assert torch.equal(logits.argmax(1)[clear], predicted[clear])
    assert clear.float().mean() > 0.9


def test_same_seed_same_result_and_another_seed_another_split(configure):
    first, again, other = (train(configure(f"seed={seed}"))[0] for seed in (1, 1, 2))
    assert first.split == again.split != other.split
    assert np.array_equal(first.scores["test"].confusion, again.scores["test"].confusion)


def test_several_seeds_give_one_table(configure, capsys):
    config = configure("seeds=[1,2]")
    results = train(config)
    assert [result.seed for result in results] == [1, 2]
    (table,) = (Path(config.runs_root) / "own_scene").glob("*-table/table.md")
    values = [100 * result.scores["test"].oa for result in results]
    assert f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" in table.read_text()
    assert f"{np.mean(values):.2f}" in capsys.readouterr().out


