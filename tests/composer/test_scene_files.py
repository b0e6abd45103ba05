"""Scenes from files to images, on a small random model, and what is refused before sampling."""

import numpy as np
import pytest
import torch
import yaml
from hydra import compose as compose_config
from hydra import initialize_config_dir
from PIL import Image

from vision_lowrank import compose
from vision_lowrank.composer.lora_files import LoraFileError, LoraWeights, LowRank, write_lora
from vision_lowrank.composer.losses import CONSTANTS
from vision_lowrank.composer.pipeline import build_pipeline
from vision_lowrank.composer.render import draw_noise, load_base, seeded
from vision_lowrank.composer.sampler import Settings
from vision_lowrank.composer.scene_files import load_scene, make_settings, prepare
from vision_lowrank.errors import CheckpointError, ConfigError, VisionLowRankError

SIDE, STEPS = 32, 3
LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with a base model and LoRAs `ai.safetensors` and `other.safetensors`, the latter of another base."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    words = ["a", "dog", "cat", "on", "grass", "and"]
    tiny = {"channels": (8, 16), "heads": 2, "groups": 4, "text_width": 16, "text_layers": 1, "text_heads": 2}
    build_pipeline(words, length=12, side=SIDE, **tiny).save_pretrained(folder / "base")
    for name, width in (("ai", 16), ("other", 20)):
        lora = LoraWeights(
            unet={LAYER: LowRank(torch.randn(2, width), torch.randn(16, 2), 1.0)},
            text_encoder={"encoder.layers.0.self_attn.q_proj": LowRank(torch.randn(2, 16), torch.randn(16, 2), 1.0)},
            tokens={f"<{name}>": torch.randn(1, 16)},
        )
        write_lora(lora, folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def scene(folder, tmp_path):
    """Function that writes a scene with changes and returns its path."""

    def write(**changes):
        region = {
            "box": {"left": 0, "top": 0.25, "right": 0.5, "bottom": 1},
            "prompt": "a <ai> on grass",
            "loras": [str(folder / "ai.safetensors")],
        }
        content = {
            "base": str(folder / "base"), "prompt": "a dog and a cat", "height": SIDE, "width": SIDE, "steps": STEPS,
            "guidance_scale": 3, "regions": [region], "settings": {"map_factor": 2},
        } | changes  # fmt: skip
        content["regions"] = [region | changes.pop("region")] if "region" in changes else content["regions"]
        content.pop("region", None)
        path = tmp_path / "two.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return path

    return write


@pytest.fixture
def configure(tmp_path):
    def make(path, *overrides):
        with initialize_config_dir(str(compose.CONFIGS), version_base="1.3"):
            return compose_config("compose", [f"scene={path}", f"runs_root={tmp_path / 'runs'}", *overrides])

    return make


def pictures(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("two-seed*.png"))]


def test_without_regions_it_is_the_pipelines_own_image(folder, scene, configure):
    found = pictures(compose.run(configure(scene(regions=[]), "seeds=[3,4]")))
    pipeline = load_base(str(folder / "base"))
    for seed, image in zip((3, 4), found, strict=True):
        noise = torch.randn(1, 12, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(seed))
        options = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "np"}
        expected = pipeline("a dog and a cat", latents=noise, **options).images[0]
        # images of a batch may differ by rounding
        assert np.abs(np.rint(expected * 255) - image).max() <= 1


def test_a_region_changes_the_image_and_a_seed_repeats_it(scene, configure):
    path = scene()
    first, second = (pictures(compose.run(configure(path, "seed=3"))) for _ in range(2))
    assert np.array_equal(first, second)
    plain = pictures(compose.run(configure(scene(regions=[]), "seed=3")))
    assert not np.array_equal(first, plain)
    run = compose.run(configure(path, "seeds=[3,5]", "steps=2", "dtype=bfloat16"))
    assert (run / "two-layout.png").is_file()
    assert len((run / "two-losses.csv").read_text().splitlines()) == 3


def test_what_the_file_says_reaches_the_scene(folder, scene):
    box = {"left": 8, "top": 0, "right": 32, "bottom": 16}
    loaded = load_scene(
        scene(region={"box": box, "loras": [{"file": str(folder / "ai.safetensors"), "strength": 0.5}]}, background=[])
    )
    prepared = prepare(loaded, load_base(loaded.base))
    (region,) = prepared.regions
    assert (region.box.top, region.box.left, region.box.bottom, region.box.right) == (0, 0.25, 0.5, 1)
    assert region.tokens == [2]
    ((changes, strength),) = region.loras
    assert strength == 0.5
    assert set(changes) == {LAYER}
    named = load_scene(scene(region={"prompt": "a dog on grass", "loras": [], "subject": "dog on"}))
    assert prepare(named, load_base(named.base)).regions[0].tokens == [2, 3]


def test_settings_by_name():
    assert make_settings({}, "here") == Settings()
    assert make_settings({"constants": "paper", "fill": False}, "here") == Settings(
        fill=False, constants=CONSTANTS["paper"]
    )
    changed = make_settings({"constants": {"preset": "paper", "top": 0.5}}, "here").constants
    assert (changed.top, changed.region) == (0.5, CONSTANTS["paper"].region)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"promt": "a"}, "unknown key promt, did you mean prompt"),
        ({"prompt": None}, "prompt is missing"),
        ({"region": {"box": {"left": 0.5, "top": 0, "right": 0.5, "bottom": 1}}}, r"regions\[0\]: box .* is empty"),
        (
            {"region": {"box": {"left": 0.05, "top": 0, "right": 1.05, "bottom": 1}}},
            r"regions\[0\]: box .* leaves the image; give fractions of it up to 1, or whole pixels",
        ),
        (
            {"region": {"box": {"left": 8, "top": 0, "right": 40, "bottom": 9}}},
            r"regions\[0\]: box .* leaves the image",
        ),
        ({"region": {"prompt": "a <bi>"}}, "token <bi> is in no LoRA"),
        ({"region": {"prompt": "a dog"}}, r"regions\[0\]: prompt 'a dog' names no token of its LoRAs"),
        ({"region": {"loras": []}}, "neither loras nor a subject"),
        ({"region": {"loras": ["nowhere.safetensors"]}}, "nowhere.safetensors"),
        ({"region": {"loras": ["OTHER"]}}, "other.safetensors: the LoRA changes layer"),
        (
            {"region": {"loras": [{"file": "ai.safetensors", "strength": float("nan")}]}},
            r"regions\[0\]: ai\.safetensors has strength nan; give a finite number",
        ),
        (
            {"background": [{"file": "ai.safetensors", "strength": float("-inf")}]},
            r"background: ai\.safetensors has strength -inf; give a finite number",
        ),
        ({"prompt": "a dog and " * 5}, "the text encoder takes 10"),
        ({"settings": {"regoin": False}}, "settings: unknown key regoin, did you mean region"),
        ({"settings": {"constants": "papers"}}, "preset of constants 'papers'; it can be code or paper"),
        (
            {"settings": {"constants": {"preset": ["code"]}}},
            r"scene two: preset of constants \['code'\]; it can be code or paper",
        ),
        ({"settings": {"constants": {"top": 2}}}, "top is 2"),
        ({"height": 10**20}, "100000000000000000000 x 32 pixels; give at most 16384 along a side"),
        ({"height": 33}, "33 x 32 pixels; this model makes multiples of 2"),
        ({"steps": 0}, "give 1 or more"),
        ({"base": "nowhere"}, "base nowhere: cannot be loaded"),
    ],
)
def test_wrong_scenes_are_refused_before_a_run(folder, scene, configure, tmp_path, changes, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if changes.get("region", {}).get("loras") == ["OTHER"]:
        changes = {"region": {"loras": [str(folder / "other.safetensors")], "prompt": "a <other>"}}
    with pytest.raises(VisionLowRankError, match=message):
        compose.run(configure(scene(**changes)))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seeds=3", "seeds=3: give a list"),
        ("seeds=[]", "give a list of whole numbers"),
        ("seeds=[1.5]", "give a list of whole numbers"),
        ("seeds=[2,2]", "the same seed gives the same again"),
        ("steps=0", "steps=0: give a whole number from 1"),
        ("steps=2.5", "steps=2.5: give a whole number"),
        ("guidance_scale=abc", "guidance_scale=abc: give a finite number"),
        ("devices=0", "devices=0: give a whole number"),
        ("device=tpu", "device=tpu: not to be had here"),
        ("settings=abc", "settings=abc is not a mapping or null"),
        ("+settings.enhancement=off", "settings: enhancement is 'off', which is not true or false"),
        ("+settings.fill=3", "settings: fill is 3, which is not true or false"),
        ("+settings.constants=5", "constants is 5; give the name of a preset"),
        ("+settings.constants.top=much", "settings: constants.top is 'much', which is not a number"),
        ("+settings.overlaps=mine", "settings: overlaps is 'mine'; it can be own or official"),
        ("+settings.map_factor=8", "map_factor is 8"),
    ],
)
def test_wrong_options_are_refused_before_a_run(scene, configure, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        compose.run(configure(scene(), override))
    assert not (tmp_path / "runs").exists()


def test_single_constants_of_the_command_leave_the_scenes_others():
    settings = {"fill": False, "constants": {"preset": "paper", "step_size": 5, "largest_step": 0.1}}
    changed = compose._changed(settings, {"constants": {"step_size": 3}})
    assert changed == {"fill": False, "constants": {"preset": "paper", "step_size": 3, "largest_step": 0.1}}
    assert compose._changed({"constants": "paper"}, {}) == {"constants": {"preset": "paper"}}
    assert compose._changed({}, {"fill": True}) == {"fill": True}


def test_unknown_scenes_and_bases(scene, configure, folder, tmp_path):
    with pytest.raises(ConfigError, match="scene nowhere: not found"):
        compose.run(configure("nowhere"))
    with pytest.raises(ConfigError, match="dtype=int8"):
        compose.run(configure(scene(), "dtype=int8"))
    with pytest.raises(CheckpointError, match=r"no model_index\.json"):
        load_base(str(tmp_path))
    with pytest.raises(LoraFileError):
        load_scene(scene(background=[str(folder / "base")]))


def test_noise_of_a_seed_does_not_depend_on_the_others(folder):
    pipeline = load_base(str(folder / "base"))
    both = draw_noise(pipeline, SIDE, SIDE, seeded([7, 8]))
    assert torch.equal(both[1:], draw_noise(pipeline, SIDE, SIDE, seeded([8])))
    assert not torch.equal(both[0], both[1])
