"""A wheel works by itself: in an empty folder, far from the checkout, and without writing to itself."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools")

USE = """
import vision_lowrank
from hydra import compose, initialize_config_dir
from vision_lowrank.composer.scene_files import load_scene
from vision_lowrank.data.cards import load_card
from vision_lowrank.data.task_cards import load_task_card
from vision_lowrank.shipped import CONFIGS

print(vision_lowrank.__file__)
print(load_card("indian_pines").title, load_task_card("eurosat").name, load_scene("sprites_two").base)
with initialize_config_dir(str(CONFIGS), version_base="1.3"):
    config = compose("evaluate", ["benchmark=mini"])
print(load_card(config.tasks.enmap_segmentation.card).name)
print(CONFIGS, (CONFIGS / "predict" / "predict.yaml").is_file())
"""


def run(command, folder, **environment):
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_wheel_brings_configurations_cards_scenes_and_weights(repository, tmp_path):
    source, site, empty = (tmp_path / name for name in ("source", "site", "empty"))
    for name in ("vision_lowrank", "configs", "datasets"):
        shutil.copytree(
            repository / name, source / name, ignore=shutil.ignore_patterns("__pycache__"), copy_function=os.symlink
        )
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    run(["-c", f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"], source)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    files = {path.relative_to(site) for path in site.rglob("*") if path.is_file()}
    empty.mkdir()
    place, known, card, configs = run(["-c", USE], empty, PYTHONPATH=str(site), PYTHONDONTWRITEBYTECODE="1")
    assert Path(place) == site / "vision_lowrank" / "__init__.py"
    assert known == f"Indian Pines eurosat {site}/vision_lowrank/assets/scenes/../sprites/pipeline"
    assert card == "enmap_potsdam"
    assert configs == f"{site}/vision_lowrank/configs True"
    assert list(empty.iterdir()) == []
    assert {path.relative_to(site) for path in site.rglob("*") if path.is_file()} == files
