"""Scenes drawn at random, and the whole benchmark on pictures of which the outcome is known."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from hydra import compose as compose_config
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from vision_lowrank import composition_benchmark
from vision_lowrank.composer.lora_files import LoraWeights, write_lora
from vision_lowrank.composer.pipeline import build_pipeline
from vision_lowrank.composition_benchmark import Options, draw_scenes, run_composition, scene_content
from vision_lowrank.data.sprite_modules import to_tensor
from vision_lowrank.data.sprites import BACKGROUNDS, HELD_OUT, SIDE, Placed, concept_tokens, draw, vocabulary
from vision_lowrank.errors import CheckpointError, ConfigError
from vision_lowrank.models.sprite_classifier import Found
from vision_lowrank.records import make_record
from vision_lowrank.runs import write_json

CONCEPTS = sorted(HELD_OUT)
SIZES = {2: (28, 36), 3: (26, 30), 4: (24, 28)}


def test_scenes_are_drawn_apart_and_by_seed():
    scenes = draw_scenes({2: 10, 3: 10, 4: 10}, SIZES, 2, CONCEPTS, seed=0)
    assert [len(scene.placed) for scene in scenes] == [2] * 10 + [3] * 10 + [4] * 10
    assert len({scene.name for scene in scenes}) == 30
    for scene in scenes:
        cover = np.zeros((SIDE, SIDE), int)
        for name, (top, left, bottom, right) in scene.asked:
            assert name in HELD_OUT
            # two pixels more, so that neighbours two apart touch
            cover[top : bottom + 2, left : right + 2] += 1
            smallest, largest = SIZES[len(scene.placed)]
            assert smallest <= bottom - top == right - left <= largest
        assert cover.max() == 1
        names = [item.name for item in scene.placed]
        assert len(set(names)) == len(names)
    assert scenes == draw_scenes({2: 10, 3: 10, 4: 10}, SIZES, 2, CONCEPTS, seed=0)
    assert scenes != draw_scenes({2: 10, 3: 10, 4: 10}, SIZES, 2, CONCEPTS, seed=1)
    drawn = [item.name for scene in draw_scenes({2: 400}, SIZES, 2, CONCEPTS, seed=0) for item in scene.placed]
    counts = np.unique(drawn, return_counts=True)[1]
    assert len(counts) == len(CONCEPTS)
    # 800 draws of 8 concepts; five standard deviations
    assert np.abs(counts - 100).max() < 5 * (800 / 8 * 7 / 8) ** 0.5


def test_a_scene_asks_for_what_was_drawn(tmp_path):
    placed = (Placed("fox", 4, 0, 24), Placed("cactus", 30, 36, 28))
    scene = composition_benchmark.Drawn("two", "sky", placed)
    content = scene_content(scene, tmp_path, {"map_factor": 2}, 7, 3.0)
    assert content["joined_prompt"] == (
        "<fox1> <fox2> at the top left and <cactus1> <cactus2> at the bottom right in the night sky"
    )
    # all methods are guided away from the background alone
    assert content["joined_negative_prompt"] == "in the night sky"
    assert content["regions"][1] == {
        "box": {"left": 36, "top": 30, "right": 64, "bottom": 58},
        "prompt": "<cactus1> <cactus2> at the bottom right in the night sky",
        "negative_prompt": "in the night sky",
        "loras": [str(tmp_path / "loras" / "cactus.safetensors")],
    }
    four = composition_benchmark.Drawn(
        "four", "sky", tuple(Placed(name, 0, 0, 20) for name in ("fox", "bus", "tiger", "cactus"))
    )
    # with the background it would be longer than the encoder takes
    assert scene_content(four, tmp_path, {}, 7, 3.0)["joined_prompt"].endswith("<cactus1> <cactus2> at the top left")


@pytest.fixture
def configure(tmp_path, repository):
    def make(*overrides):
        with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
            return compose_config("evaluate", ["benchmark=composition", f"runs_root={tmp_path}", *overrides])

    return make


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A random base, and LoRAs that only bring the words of the concepts."""
    folder = tmp_path_factory.mktemp("world")
    tiny = {"channels": (8, 16), "heads": 2, "groups": 4, "text_width": 16, "text_layers": 1, "text_heads": 2}
    build_pipeline(vocabulary(), **tiny).save_pretrained(folder / "pipeline")
    for name in CONCEPTS:
        tokens = {token: torch.zeros(1, 16) for token in concept_tokens(name)}
        write_lora(LoraWeights({}, {}, tokens=tokens), folder / "loras" / f"{name}.safetensors")
    return folder


def swap(placed):
    """Exchanges what two boxes hold."""
    names = [item.name for item in placed][::-1]
    return [Placed(name, item.top, item.left, item.size) for name, item in zip(names, placed, strict=True)]


# what pictures of each row of the table show
SHOWN = {
    "LoRA-Composer": lambda placed: placed,
    "merge": swap,
    "plain prompt": lambda placed: [],
    "LoRA Switch": lambda placed: placed[:1],
}


class Witness:
    """Knows what the pictures show, since it was there when they were painted."""

    def __init__(self):
        self.pictures = {}

    def locate(self, image):
        return [
            Found(item.name, (item.top, item.left, item.top + item.size - 2, item.left + item.size), 0.9)
            for item in self.pictures[image.numpy().tobytes()]
        ]


def test_the_table_says_what_the_pictures_show(configure, monkeypatch, world, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    witness = Witness()
    scenes = {scene.name: scene for scene in draw_scenes({2: 8}, SIZES, 2, CONCEPTS, seed=0)}

    def paint(pipeline, jobs, device, devices, precision):
        for job in jobs:
            shown = SHOWN[job.folder.name.replace("_", " ")](scenes[job.name].placed)
            for number, path in enumerate(job.images):
                path.parent.mkdir(parents=True, exist_ok=True)
                picture = draw(scenes[job.name].background, shown, np.random.default_rng(number))
                Image.fromarray(picture).save(path)
                witness.pictures[to_tensor(picture).numpy().tobytes()] = shown
            # other work delayed all but one
            seconds = 6.0 if job.name == list(scenes)[3] else 60.0
            write_json(job.record, {"seeds": list(job.seeds), "seconds": seconds, "peak_megabytes": 5.0, "losses": []})

    monkeypatch.setattr(composition_benchmark, "run_jobs", paint)
    monkeypatch.setattr(composition_benchmark, "load_classifier", lambda folder: witness)
    config = configure("benchmark.image_seeds=[0,1,2]", f"benchmark.world={world}")
    config.benchmark.scenes = {2: 8}
    config.benchmark.variants = {name: config.benchmark.variants[name] for name in SHOWN}
    config.benchmark.sheet = list(SHOWN)
    folder = run_composition(config)
    metrics = json.loads((folder / "metrics.json").read_text())
    found = {row["variant"]: row for row in metrics["rows"]}
    assert found["LoRA-Composer"]["success"] == 1
    sizes = np.array([item.size for scene in scenes.values() for item in scene.placed])
    assert found["LoRA-Composer"]["overlap"] == pytest.approx((1 - 2 / sizes).mean())
    assert found["LoRA-Composer"]["confusion"] == 0
    assert found["merge"]["success"] == 0
    assert found["merge"]["confusion"] == 1
    assert found["merge"]["vanishing"] == 0
    assert found["plain prompt"]["vanishing"] == 1
    assert found["plain prompt"]["confusion"] == 0
    assert found["LoRA Switch"]["vanishing"] == 0.5
    assert found["merge"]["seconds_per_image"] == 2
    assert found["merge"]["images"] == 24
    gap = next(row for row in metrics["differences"] if row["variant"] == "LoRA-Composer - merge")
    assert gap["success"] == 1
    lines = (folder / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(SHOWN)
    printed = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["merge", "0"] for line in printed)
    assert len((folder / "judged.csv").read_text().splitlines()) == 1 + 4 * 24
    assert np.asarray(Image.open(folder / "sheet.png")).std() > 10
    scene = yaml.safe_load((folder / "scenes" / "2concepts000.yaml").read_text())
    assert scene["prompt"] in BACKGROUNDS.values()


def test_worlds_that_lack_something_are_refused(configure, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        run_composition(configure(f"benchmark.world={tmp_path}"))
    monkeypatch.setattr(composition_benchmark, "load_classifier", lambda folder: None)
    with pytest.raises(ConfigError, match="has LoRAs of 0 held-out sprites"):
        run_composition(configure(f"benchmark.world={tmp_path}"))


def test_numbers_of_concepts_without_scenes_are_left_out(configure):
    section = OmegaConf.to_container(configure().benchmark)
    # without sizes for four, which no scene has
    section |= {"scenes": {2: 14, 3: 10, 4: 0}, "sizes": {2: [28, 36], 3: [26, 30]}}
    assert make_record(Options, section, "benchmark", ConfigError).scenes == {2: 14, 3: 10}
    for scenes in ({}, {2: 0, 3: 0}, {2: 5, 3: -1}):
        with pytest.raises(ConfigError, match=re.escape(f"benchmark.scenes is {scenes}; give a number of scenes by")):
            make_record(Options, section | {"scenes": scenes}, "benchmark", ConfigError)


def test_a_sheet_of_unknown_rows_is_refused(configure, world, monkeypatch):
    monkeypatch.setattr(composition_benchmark, "load_classifier", lambda folder: None)
    with pytest.raises(ConfigError, match=r"benchmark\.sheet names blend"):
        run_composition(configure("benchmark.sheet=[blend]", f"benchmark.world={world}"))
