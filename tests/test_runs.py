import csv
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from vision_lowrank import runs
from vision_lowrank.errors import ConfigError


def test_atomic_path_replaces_on_success_and_makes_parents(tmp_path):
    target = tmp_path / "a" / "b" / "figure.png"
    with runs.atomic_path(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == ".png"
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_atomic_path_keeps_the_old_file_on_error(tmp_path, error):
    target = tmp_path / "table.csv"
    target.write_text("old")

    def write():
        with runs.atomic_path(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_atomic_path_names_the_file_that_could_not_be_written(tmp_path):
    target = tmp_path / "metrics.json"
    with pytest.raises(OSError, match="No space left") as caught, runs.atomic_path(target):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(target)
    assert caught.value.errno == 28
    (tmp_path / "plain").write_text("")
    with pytest.raises(NotADirectoryError) as caught, runs.atomic_path(target):
        (tmp_path / "plain" / "other").read_text()
    assert caught.value.filename == str(tmp_path / "plain" / "other")


def test_killed_writer_leaves_the_old_file(tmp_path):
    target = tmp_path / "metrics.json"
    target.write_text("old")
    script = (
        "import os, signal, sys\nfrom vision_lowrank.runs import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(target)], check=False).returncode == -9
    assert target.read_text() == "old"


def test_write_json_converts_arrays_and_refuses_nan(tmp_path):
    @dataclass
    class Point:
        x: float

    arrays = {"array": np.arange(3), "scalar": np.float32(0.5), "tensor": torch.ones(2)}
    content = {**arrays, "p": Point(1.0), "f": Path("a")}
    runs.write_json(tmp_path / "a.json", content)
    expected = {"array": [0, 1, 2], "scalar": 0.5, "tensor": [1.0, 1.0], "p": {"x": 1.0}, "f": "a"}
    assert json.loads((tmp_path / "a.json").read_text()) == expected
    with pytest.raises(ValueError, match="Out of range"):
        runs.write_json(tmp_path / "b.json", {"loss": float("nan")})
    with pytest.raises(TypeError, match="object cannot"):
        runs.write_json(tmp_path / "b.json", {"loss": object()})
    assert not (tmp_path / "b.json").exists()


def test_write_csv_unites_columns(tmp_path):
    runs.write_csv(tmp_path / "t.csv", [{"a": 1, "b": "x,y"}, {"a": 2, "c": 0.5}])
    with (tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": "x,y", "c": ""}, {"a": "2", "b": "", "c": "0.5"}]


def test_run_folders_are_unique_and_named_by_time_and_seed(tmp_path):
    folders = [runs.create_run_folder(tmp_path, "indian_pines", 3) for _ in range(5)]
    assert len(set(folders)) == 5
    assert all(folder.is_dir() for folder in folders)
    assert folders[0].parent == tmp_path / "indian_pines"
    assert re.fullmatch(r"\d{8}-\d{6}-seed3", folders[0].name)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden"])
def test_experiment_must_be_a_plain_name(tmp_path, name):
    with pytest.raises(ConfigError, match="experiment name"):
        runs.create_run_folder(tmp_path, name, 0)


def test_provenance_names_versions_and_data():
    record = runs.provenance("32-true", {"cube.npy": "abc"})
    assert record["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert record["packages"]["numpy"] == np.__version__
    assert "pytest" not in record["packages"]
    assert record["data"] == {"cube.npy": "abc"}
    assert record["precision"] == "32-true"
    assert record["threads"] == torch.get_num_threads()
    assert record["processor"]
    json.dumps(record)


def test_git_state_tells_commit_dirt_and_strangers(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    tracked, stranger = tmp_path / "tracked.py", tmp_path / "stranger.py"
    tracked.write_text("a = 1")
    git("add", "tracked.py")
    assert runs._git_state(tracked) is None  # no commit yet
    git("commit", "-q", "-m", "first")
    assert runs._git_state(tracked) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    tracked.write_text("a = 2")
    stranger.write_text("")
    assert runs._git_state(tracked)["dirty"] is True
    assert runs._git_state(stranger) is None


def test_a_checkpoint_belongs_to_a_run_of_the_same_configuration(tmp_path):
    def configuration(**changes):
        content = {
            "data": {"card": "a", "root": "data", "num_workers": 0},
            "task": {"rate": 1},
            "trainer": {"epochs": 2},
        }
        content["seed"] = 0
        return OmegaConf.merge(content, changes, {"ckpt_path": str(tmp_path / "run" / "checkpoints" / "last.ckpt")})

    with pytest.raises(ConfigError, match=r"no config\.yaml in .*run; give a checkpoint inside its run"):
        runs.resumed_run(configuration())
    (tmp_path / "run").mkdir()
    OmegaConf.save(configuration(), tmp_path / "run" / "config.yaml")
    (tmp_path / "run" / "provenance.json").write_text("{}")
    free = {"data": {"root": "elsewhere", "num_workers": 2}, "trainer": {"epochs": 5}}
    assert runs.resumed_run(configuration(**free)) == tmp_path / "run"
    runs.note_resumption(configuration(**free), tmp_path / "run")
    # the folder has what the run now is, and remembers what it was
    expected = OmegaConf.merge(configuration(**free), {"ckpt_path": None})
    assert OmegaConf.load(tmp_path / "run" / "config.yaml") == expected
    runs.note_resumption(configuration(**free, runs_root="moved"), tmp_path / "run")
    first, second = json.loads((tmp_path / "run" / "provenance.json").read_text())["resumed"]
    assert first["changed"] == {
        "data.num_workers": [0, 2], "data.root": ["data", "elsewhere"], "trainer.epochs": [2, 5],
    }  # fmt: skip
    assert (second["changed"], second["command"] != "") == ({}, True)
    OmegaConf.save(configuration(base="old/model"), tmp_path / "run" / "config.yaml")
    assert runs.resumed_run(configuration(base="moved/model")) == tmp_path / "run"
    with pytest.raises(ConfigError, match="that run differs in base; give"):
        runs.resumed_run(configuration())
    OmegaConf.save(configuration(), tmp_path / "run" / "config.yaml")
    with pytest.raises(
        ConfigError, match=r"that run differs in base, data\.card, data\.whiten, seed, task\.rate; give"
    ):
        runs.resumed_run(configuration(data={"card": "b", "whiten": True}, task={"rate": 2}, seed=9, base="other"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "???", "twice": "${weights}"}, "^weights not given; the command needs it$"),
        ({"a": {"b": "???"}, "c": "???"}, r"^a\.b, c not given; the command needs them$"),
        ({"weights": 2024}, r"^weights=2024 is not a text; for a name of digits write \"weights='2024'\"$"),
        ({"weights": ["run"]}, r"^weights=\['run'\] is not a text$"),
        ({"maps": 1.5}, "^maps=1.5 is not a text or null; for"),
        ({"seed": True}, "^seed=True: give a whole number from 0 up$"),
        ({"devices": 0}, "^devices=0: give a whole number from 1 up$"),
        ({"seed": 2**32}, "^seed=4294967296: give a number up to 4294967295$"),
    ],
)
def test_options_that_a_command_cannot_work_with(options, message):
    with pytest.raises(ConfigError, match=message):
        runs.check_command(OmegaConf.create(options), weights=str, maps=str | None)


@pytest.mark.parametrize(
    "options",
    [
        {"devices": 2},
        {"trainer": {"devices": "auto"}},
        {"trainer": {"devices": "0,1"}},
        {"trainer": {"devices": [0, 3]}},
        {"trainer": {"num_nodes": 2}},
    ],
)
def test_sweeps_go_with_one_device(monkeypatch, options):
    monkeypatch.setattr(runs.torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(runs.HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(runs.HydraConfig, "get", lambda: OmegaConf.create({"mode": runs.RunMode.MULTIRUN}))
    for one in (1, [3], "3,", "1"):
        runs.check_command(OmegaConf.create({"devices": 1, "trainer": {"devices": one, "num_nodes": 1}}))
    with pytest.raises(ConfigError, match=r"^-m, several runs in one command, goes with one device; run them one by"):
        runs.check_command(OmegaConf.create(options))
    monkeypatch.setattr(runs.HydraConfig, "get", lambda: OmegaConf.create({"mode": runs.RunMode.RUN}))
    runs.check_command(OmegaConf.create(options))


def test_options_that_a_command_can_work_with():
    given = {"weights": "run", "maps": None, "name": "a", "resume": None, "seed": 0, "devices": 2, "other": 3}
    runs.check_command(OmegaConf.create(given), weights=str, maps=str | None)


def test_seeds_have_bounds():
    assert runs.checked_seeds([0, 2**32 - 1]) == [0, 2**32 - 1]
    with pytest.raises(ConfigError, match=r"seeds=\[4294967296\]: give numbers up to 4294967295"):
        runs.checked_seeds([2**32])
