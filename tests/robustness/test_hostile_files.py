"""Files from strangers: refused, and a canary shows that nothing in them ran.

What is not here is beside the reader's other tests: archives (tests/data/test_archives.py), arrays (test_readers.py),
dataset cards (test_cards.py), LoRA files (tests/composer/test_lora_files.py), `_target_` (tests/test_instantiate.py).
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from vision_lowrank.checkpoints import best_checkpoint, read_checkpoint
from vision_lowrank.composer.scene_files import load_scene
from vision_lowrank.data.cards import load_card
from vision_lowrank.data.readers import read_raster
from vision_lowrank.data.splits import Split
from vision_lowrank.data.task_cards import load_task_card
from vision_lowrank.errors import CheckpointError, ConfigError, DataError, SplitError, VisionLowRankError
from vision_lowrank.models import LessViT, LolaSpecViT
from vision_lowrank.runs import open_run
from vision_lowrank.training import train


@pytest.fixture
def canary(tmp_path):
    """A file that must not appear."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


class Code:
    """Makes the canary when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def configure(repository, root, overrides):
    with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
        return compose("train", [*overrides, f"runs_root={root}"])


@pytest.fixture(scope="module")
def trained(scene, repository, tmp_path_factory):
    """Folder of a finished run."""
    root = tmp_path_factory.mktemp("trained")
    train(configure(repository, root, [*scene, "trainer.max_epochs=1"]))
    (folder,) = root.glob("*/*-seed0")
    return folder


def test_an_instantiator_in_a_checkpoint_is_never_called(trained, scene, repository, tmp_path, canary):
    folder = tmp_path / "runs" / "own_scene" / "stranger"
    shutil.copytree(trained, folder)
    path = folder / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content |= {
        "_instantiator": "os.system", "hyper_parameters": {"command": f"touch {canary}", "_target_": "os.system"},
        "hparams_name": "command", "datamodule_hyper_parameters": {"_instantiator": "os.system"},
    }  # fmt: skip
    torch.save(content, path)
    train(configure(repository, tmp_path, [*scene, "trainer.max_epochs=2", f"ckpt_path={path}"]))
    assert len(read_checkpoint(path)["history"]) == 2


@pytest.mark.parametrize("place", ["state_dict", "callbacks", "optimizer_states", "_instantiator"])
def test_code_anywhere_in_a_checkpoint_is_refused(trained, tmp_path, canary, place):
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save({**content, place: Code(canary)}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt: damaged, or holds objects other than tensors"):
        read_checkpoint(tmp_path / "last.ckpt", "strength")


@pytest.mark.parametrize(
    "settings",
    [
        {"depths": {"_target_": "os.system", "command": "touch CANARY"}},
        {"dim": {"_target_": "vision_lowrank.runs.os.system", "command": "touch CANARY"}},
    ],
)
def test_targets_in_a_models_settings_are_never_called(trained, scene, repository, tmp_path, canary, settings):
    folder = tmp_path / "base" / "model"
    shutil.copytree(trained / "model", folder)
    known = json.loads((folder / "config.json").read_text())
    text = json.dumps({**known, **settings}).replace("CANARY", str(canary))
    (folder / "config.json").write_text(text)
    config = configure(repository, tmp_path / "runs", [*scene, "trainer.max_epochs=1", f"base={folder}"])
    with pytest.raises(CheckpointError, match="cannot be loaded as LolaSpecViT"):
        train(config)


def test_a_target_beside_a_models_settings_is_passed_over(trained, tmp_path, canary):
    folder = tmp_path / "model"
    shutil.copytree(trained / "model", folder)
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, "_target_": "os.system", "command": f"touch {canary}"}))
    found, expected = (LolaSpecViT.from_pretrained(path, local_files_only=True) for path in (folder, trained / "model"))
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in expected.state_dict().items())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickled_weights_of_a_model_are_refused(tmp_path, canary, name, trained, scene, repository):
    folder = tmp_path / "base" / "model"
    shutil.copytree(trained / "model", folder)
    (folder / "model.safetensors").unlink()
    torch.save({"head.weight": Code(canary)}, folder / name)
    config = configure(repository, tmp_path / "runs", [*scene, f"base={folder}"])
    with pytest.raises(CheckpointError, match="cannot be loaded as LolaSpecViT"):
        train(config)


def test_pickled_weights_of_an_encoder_are_refused(tmp_path, canary):
    LessViT(embed_dim=16, depth=1, num_heads=2, patch_size=2, radar=False).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"norm.weight": Code(canary)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only|safetensors|not found"):
        LessViT.from_pretrained(tmp_path, local_files_only=True)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("unet", ["os", "system"]),
        ("unet", ["subprocess", "Popen"]),
        ("_class_name", ["evil", "Pipeline"]),
    ],
)
def test_a_base_that_names_code_is_refused(tmp_path, canary, part, value):
    pytest.importorskip("diffusers")
    from vision_lowrank.composer.render import load_base
    from vision_lowrank.text_to_image_run import WORLD

    folder = tmp_path / "base"
    shutil.copytree(WORLD / "pipeline", folder)
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Pipeline: pass\n")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, part: value}))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_base(str(folder))


def test_pickled_weights_of_a_base_are_refused(tmp_path, canary):
    pytest.importorskip("diffusers")
    from vision_lowrank.composer.render import load_base
    from vision_lowrank.text_to_image_run import WORLD

    folder = tmp_path / "base"
    shutil.copytree(WORLD / "pipeline", folder)
    for path in (folder / "unet").glob("*.safetensors"):
        path.unlink()
    torch.save({"conv_in.weight": Code(canary)}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_base(str(folder))


TAGS = [
    "!!python/object/apply:os.system ['touch CANARY']",
    "name: !!python/object/new:os.system ['touch CANARY']",
    "name: !!python/name:os.system",
    "- &a [x, x]\n- !!python/module:antigravity",
]


@pytest.mark.parametrize("text", TAGS)
def test_tags_in_yaml_are_refused(tmp_path, canary, text):
    text = text.replace("CANARY", str(canary))
    path = tmp_path / "stranger.yaml"
    path.write_text(text)
    for load in (load_scene, load_task_card):
        with pytest.raises(VisionLowRankError, match="no valid YAML") as caught:
            load(str(path))
        assert "\n" not in str(caught.value)
    (tmp_path / "config.yaml").write_text(text)
    config = OmegaConf.create({"resume": str(tmp_path), "name": "a", "seed": 0, "runs_root": str(tmp_path / "runs")})
    with pytest.raises(ConfigError, match=r"config\.yaml: no valid YAML"):
        open_run(config, "32-true")


@pytest.mark.parametrize(
    "text", ["name: 2001-99-99", f"height: {'9' * 5000}", "[" * 5000], ids=["date", "number", "deep"]
)
def test_values_in_yaml_that_are_none_are_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="no valid YAML"):
        load_scene(str(tmp_path / "config.yaml"))
    # to OmegaConf, a date is a text
    if not text.startswith("name"):
        config = OmegaConf.create(
            {"resume": str(tmp_path), "name": "a", "seed": 0, "runs_root": str(tmp_path / "runs")}
        )
        with pytest.raises(ConfigError, match="no valid YAML"):
            open_run(config, "32-true")


def test_targets_on_the_command_line_are_refused(scene, repository, tmp_path, canary):
    for key in ("model", "data", "task"):
        override = f"{key}={{_target_: os.system, command: 'touch {canary}'}}"
        with pytest.raises(ConfigError, match=r"_target_ 'os\.system' is refused"):
            train(configure(repository, tmp_path, [item for item in scene if "model." not in item] + [f"++{override}"]))


def test_objects_in_a_split_are_refused(tmp_path, canary):
    np.savez(tmp_path / "split.npz", train=np.array([Code(canary)], dtype=object), allow_pickle=True)
    with pytest.raises(SplitError, match=r"split\.npz: missing or damaged"):
        Split.load(tmp_path / "split.npz")


def test_structures_and_functions_in_matlab_files_are_refused(tmp_path, canary):
    command = f"system('touch {canary}')"
    for name, value in {
        "structure": {"cube": {"run": command}},
        "record": {"cube": np.array([[(command, 1)]], dtype=[("run", object), ("count", object)])},
        "text": {"cube": command},
    }.items():
        path = tmp_path / f"{name}.mat"
        scipy.io.savemat(path, value)
        with pytest.raises(DataError, match=rf"{name}\.mat"):
            read_raster([path], "cube", None, 4, 4, 1)


def test_code_in_a_virtual_raster_does_not_run(tmp_path, canary):
    path = tmp_path / "image.tif"
    path.write_text(
        f"""<VRTDataset rasterXSize="4" rasterYSize="4"><VRTRasterBand dataType="Float32" band="1"
        subClass="VRTDerivedRasterBand"><PixelFunctionType>touch</PixelFunctionType>
        <PixelFunctionLanguage>Python</PixelFunctionLanguage><PixelFunctionCode><![CDATA[
def touch(*arguments, **options):
    open({str(canary)!r}, 'w')
]]></PixelFunctionCode></VRTRasterBand></VRTDataset>"""
    )
    with pytest.raises(DataError, match=r"image\.tif: damaged, truncated or no raster"):
        read_raster([path], None, None, 4, 4, 1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"package": "stranger.payload.x"}, "give the name of a package, no module"),
        ({"package": "numpy", "hub": "someone/tiny"}, "has a package and a hub"),
        ({"package": "numpy", "folder": "../elsewhere"}, "without '..'"),
        ({"package": "numpy", "folder": "/elsewhere"}, "must be relative to the data folder"),
    ],
)
def test_cards_neither_import_nor_write_elsewhere(card, tmp_path, canary, monkeypatch, source, message):
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger" / "__init__.py").touch()
    (tmp_path / "stranger" / "payload.py").write_text(f"open({str(canary)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    content = yaml.safe_load(Path(card).read_text()) | {"source": source}
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(DataError, match=message):
        load_card(tmp_path / "card.yaml")
    assert not canary.exists()


def test_a_checkpoint_names_no_paths_to_delete(tmp_path):
    (tmp_path / "docs").mkdir()
    kept = best_checkpoint(tmp_path / "run" / "checkpoints", "val/loss", "min")
    path = f"local://{tmp_path}/docs"
    score = torch.tensor(9.0)
    hostile = {"best_k_models": {path: score}, "kth_best_model_path": path, "best_model_path": path, "kth_value": score}
    hostile |= {"best_model_score": score, "monitor": "val/loss", "dirpath": str(tmp_path / "run" / "checkpoints")}
    kept.load_state_dict(hostile)
    assert kept.best_model_path == kept.kth_best_model_path == ""
    # with the run's own file there, its score counts, wherever the run lies now
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "best.ckpt").touch()
    kept.load_state_dict(hostile | {"dirpath": "/elsewhere"})
    assert kept.best_model_path == str(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert kept.best_k_models == {kept.best_model_path: score}
