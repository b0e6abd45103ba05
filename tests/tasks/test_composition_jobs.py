"""Many scenes at once: the same images as one by one, and nothing done twice."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import yaml
from hydra import compose as compose_config
from hydra import initialize_config_dir
from PIL import Image
from safetensors.torch import save_file

from vision_lowrank import compose
from vision_lowrank.composer.pipeline import build_pipeline
from vision_lowrank.composer.scene_files import LoadedScene, load_scene
from vision_lowrank.errors import ConfigError
from vision_lowrank.memory import PeakMemory
from vision_lowrank.tasks import composition


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with a random base and the scenes `one.yaml` and `two.yaml`."""
    folder = tmp_path_factory.mktemp("scenes")
    torch.manual_seed(0)
    tiny = {"channels": (8, 16), "heads": 2, "groups": 4, "text_width": 16, "text_layers": 1, "text_heads": 2}
    build_pipeline(["a", "dog", "cat"], length=12, side=32, **tiny).save_pretrained(folder / "base")
    for name, word in (("one", "dog"), ("two", "cat")):
        region = {
            "box": {"left": 0, "top": 0, "right": 0.5, "bottom": 1}, "prompt": f"a {word}", "subject": word,
        }  # fmt: skip
        scene = {
            "base": "base", "prompt": "a", "height": 32, "width": 32, "steps": 3, "regions": [region],
            "settings": {"map_factor": 2},
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(scene))
    return folder


@pytest.fixture
def run(tmp_path):
    def make(*overrides):
        with initialize_config_dir(str(compose.CONFIGS), version_base="1.3"):
            config = compose_config("compose", ["seeds=[3,4]", f"runs_root={tmp_path / 'runs'}", *overrides])
        return compose.run(config)

    return make


def test_several_scenes_are_each_as_alone(folder, run):
    both = run(f"scene=[{folder / 'one.yaml'},{folder / 'two.yaml'}]")
    for name in ("one", "two"):
        alone = run(f"scene={folder / name}.yaml")
        for seed in (3, 4):
            file = f"{name}-seed{seed}.png"
            assert np.array_equal(np.asarray(Image.open(both / file)), np.asarray(Image.open(alone / file)))
    facts = json.loads((both / "metrics.json").read_text())
    assert facts["images"] == 4
    assert facts["seconds_per_image"].keys() == {"one", "two"}
    assert not np.array_equal(
        np.asarray(Image.open(both / "one-seed3.png")), np.asarray(Image.open(both / "two-seed3.png"))
    )


@pytest.mark.parametrize("kind", ["EulerAncestralDiscreteScheduler", "LCMScheduler"])
def test_schedulers_that_add_noise_repeat_a_seed_alone_and_beside_others(kind, folder, run, tmp_path):
    shutil.copytree(folder, tmp_path / "noisy")
    scheduler = getattr(diffusers, kind)()
    scheduler.save_pretrained(tmp_path / "noisy" / "base" / "scheduler")
    index = tmp_path / "noisy" / "base" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", kind]}))
    scene = f"scene={tmp_path / 'noisy' / 'one.yaml'}"
    together = run(scene)
    for seed in (3, 4):
        alone = np.asarray(Image.open(run(scene, f"seeds=[{seed}]") / f"one-seed{seed}.png")).astype(int)
        # rounding of a batch, at most
        assert np.abs(alone - np.asarray(Image.open(together / f"one-seed{seed}.png"))).max() <= 1


def test_an_interrupted_run_makes_what_is_missing(folder, run):
    scenes = f"scene=[{folder / 'one.yaml'},{folder / 'two.yaml'}]"
    whole = run(scenes)
    expected = np.asarray(Image.open(whole / "two-seed4.png"))
    # as if the run had been stopped while it wrote the second scene's images
    for name in ("two.json", "two-seed4.png", "metrics.json", "two-layout.png"):
        (whole / name).unlink()
    before = {path: path.stat().st_mtime_ns for path in whole.glob("one-seed*.png")}
    assert run(scenes, f"resume={whole}") == whole
    assert np.array_equal(np.asarray(Image.open(whole / "two-seed4.png")), expected)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (whole / "metrics.json").is_file()
    # an image that is gone is made again
    (whole / "two-seed4.png").unlink()
    assert run(scenes, f"resume={whole}") == whole
    assert np.array_equal(np.asarray(Image.open(whole / "two-seed4.png")), expected)
    # nothing is left, which is no error
    assert run(scenes, f"resume={whole}") == whole
    with pytest.raises(ConfigError, match="that run differs in seeds"):
        run(scenes, f"resume={whole}", "seeds=[3,5]")
    with pytest.raises(ConfigError, match="that run differs in method"):
        run(scenes, f"resume={whole}", "method=merge")


def test_a_scene_that_was_changed_is_not_resumed(folder, run, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "scenes")
    path = tmp_path / "scenes" / "one.yaml"
    whole = run(f"scene={path}")
    (whole / "one.json").unlink()
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(content | {"steps": 2, "prompt": "a dog"}))
    with pytest.raises(ConfigError, match=r"scene one has other prompt, steps now than when that run began"):
        run(f"scene={path}", f"resume={whole}")
    path.write_text(yaml.safe_dump(content))
    monkeypatch.setattr(LoadedScene, "files", lambda scene: {"dog.safetensors": "0" * 64})
    with pytest.raises(ConfigError, match="scene one has other files now"):
        run(f"scene={path}", f"resume={whole}")
    (whole / "scenes.json").write_text("{")
    with pytest.raises(ConfigError, match=r"scenes\.json: damaged"):
        run(f"scene={path}", f"resume={whole}")
    assert not (whole / "one.json").exists()


def test_files_of_a_scene_are_told_by_their_content():
    scene = load_scene("sprites_two")
    assert len(scene.files()) == 2
    for name, digest in scene.files().items():
        assert digest == hashlib.sha256((scene.folder / name).read_bytes()).hexdigest()


def test_a_folder_of_peft_is_told_by_weights_and_scale(folder, run, tmp_path):
    shutil.copytree(folder, tmp_path / "peft")
    lora = tmp_path / "peft" / "lora"
    lora.mkdir()
    key = "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    weights, config = lora / "adapter_model.safetensors", lora / "adapter_config.json"
    save_file({f"{key}.lora_A.weight": torch.ones(2, 16), f"{key}.lora_B.weight": torch.ones(16, 2)}, weights)
    config.write_text('{"r": 2, "lora_alpha": 8}')
    path = tmp_path / "peft" / "one.yaml"
    content = yaml.safe_load(path.read_text())
    content["regions"][0]["loras"] = ["lora"]
    path.write_text(yaml.safe_dump(content))
    expected = hashlib.sha256(weights.read_bytes() + config.read_bytes()).hexdigest()
    assert load_scene(path).files() == {"lora": expected}
    whole = run(f"scene={path}")
    assert run(f"scene={path}", f"resume={whole}") == whole
    config.write_text('{"r": 2, "lora_alpha": 9}')
    with pytest.raises(ConfigError, match="scene one has other files now"):
        run(f"scene={path}", f"resume={whole}")


def test_settings_that_scale_nothing_tell_nothing(folder, tmp_path):
    path = tmp_path / "one.yaml"
    content = yaml.safe_load((folder / "one.yaml").read_text())
    content["regions"][0]["loras"] = ["lora.safetensors"]
    path.write_text(yaml.safe_dump(content))
    key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    factors = {f"{key}.lora_A.weight": torch.ones(2, 16), f"{key}.lora_B.weight": torch.ones(16, 2)}
    save_file(factors | {f"{key}.alpha": torch.tensor(3)}, tmp_path / "lora.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 8}')
    expected = hashlib.sha256((tmp_path / "lora.safetensors").read_bytes()).hexdigest()
    assert load_scene(path).files() == {"lora.safetensors": expected}


def test_a_signal_to_end_stops_between_scenes(folder, run, monkeypatch):
    decode = composition.decode

    def end(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return decode(*arguments)

    scenes = f"scene=[{folder / 'one.yaml'},{folder / 'two.yaml'}]"
    whole = run(scenes)
    for name in ("one", "two"):
        (whole / f"{name}.json").unlink()
    monkeypatch.setattr(composition, "decode", end)
    with pytest.raises(SystemExit) as stopped:
        run(scenes, f"resume={whole}")
    assert stopped.value.code == 143  # what a shell gives for a process that the signal ended
    assert (whole / "one.json").is_file()
    assert not (whole / "two.json").is_file()


@pytest.mark.parametrize(
    ("devices", "shares"), [(1, [[0, 2, 3, 4]]), (3, [[0, 4], [2], [3]]), (5, [[0], [2], [3], [4], []])]
)
def test_devices_share_what_the_first_of_them_found_left(tmp_path, monkeypatch, devices, shares):
    jobs = [composition.Job(tmp_path, f"scene{number}", None, 8, 8, [7], 1, 1.0) for number in range(5)]

    def finish(job):
        for path in (*job.images, job.record):
            path.touch()

    finish(jobs[1])
    told, found = [], []
    strategy = SimpleNamespace(broadcast=lambda left: told.append(left) or told[0])
    for rank in range(devices):
        monkeypatch.setattr(composition, "current_place", lambda rank=rank: (rank, devices))
        task = composition.Composition(SimpleNamespace(components={}), jobs)
        task.trainer = SimpleNamespace(strategy=strategy)
        found.append(list(task.predict_dataloader()))
        # as if this device were done with a job before the next one looks
        finish(jobs[found[0][0]])
    assert found == shares


@pytest.mark.slow
def test_two_devices_make_what_one_makes(folder, run, tmp_path):
    shutil.copytree(folder, tmp_path / "uneven")
    # the first device is done long before the second
    path = tmp_path / "uneven" / "two.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"steps": 60}))
    scenes = f"scene=[{path.with_name('one.yaml')},{path}]"
    command = [sys.executable, "-m", "vision_lowrank.compose", scenes, "device=cpu", "devices=2", "seeds=[3,4]"]

    def together(*overrides):
        done = subprocess.run([*command, *overrides], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    together(f"runs_root={tmp_path / 'together'}")
    (whole,) = (tmp_path / "together").glob("*/*")
    alone = run(scenes)
    images = [f"{name}-seed{seed}.png" for name in ("one", "two") for seed in (3, 4)]
    # fewer scenes than devices are left
    for missing in ([], ["two.json", "two-seed3.png", "metrics.json"]):
        for name in missing:
            (whole / name).unlink()
        if missing:
            together(f"resume={whole}")
        for name in images:
            assert np.array_equal(np.asarray(Image.open(whole / name)), np.asarray(Image.open(alone / name)))
        assert json.loads((whole / "metrics.json").read_text())["images"] == 4


def test_what_cannot_go_together_is_refused(folder, run, tmp_path):
    shutil.copy(folder / "one.yaml", tmp_path / "one.yaml")
    with pytest.raises(ConfigError, match="need names of their own and one base"):
        run(f"scene=[{folder / 'one.yaml'},{tmp_path / 'one.yaml'}]")
    with pytest.raises(ConfigError, match=r"no config\.yaml there"):
        run(f"scene={folder / 'one.yaml'}", f"resume={tmp_path}")


@pytest.mark.parametrize("name", ["scenes", "metrics", "provenance"])
def test_scenes_leave_the_files_of_the_run_alone(folder, run, tmp_path, name):
    shutil.copy(folder / "one.yaml", tmp_path / f"{name}.yaml")
    with pytest.raises(ConfigError, match=rf"{name}\.json is a file of the run itself; give the scene another name"):
        run(f"scene={tmp_path / name}.yaml")
    assert not (tmp_path / "runs").exists()


def test_peak_memory_is_that_of_the_block():
    with PeakMemory(torch.device("cpu")) as outer:
        np.ones(25_000_000)
    if outer.megabytes is None:
        pytest.skip("this system does not tell the peak of a process")
    assert outer.megabytes == pytest.approx(200, abs=20)
    with PeakMemory(torch.device("cpu")) as after:
        pass
    assert after.megabytes < 20
