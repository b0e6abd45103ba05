"""`kill -9` at random moments: what was written before loads, and the resumed run ends as the uninterrupted one."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from vision_lowrank.checkpoints import read_checkpoint

pytest.importorskip("diffusers")

WORLD = Path(__file__).resolve().parents[2] / "vision_lowrank" / "assets" / "sprites"
SPRITES = [
    "experiment=sprites_base", "model.channels=[8,16]", "model.heads=2", "model.text_width=16", "model.text_layers=1",
    "+model.groups=4", "+model.text_heads=2", "data.batch_size=4", "data.steps=4", "trainer.max_epochs=3",
    "samples.every=2", "samples.prompts=[a dog on grass]", "trainer.precision=32-true",
]  # fmt: skip
CLASSIFIER = [
    "experiment=sprites_classifier", "data.steps=5", "data.batch_size=4", "data.held_out=8", "model.width=8",
    "trainer.max_epochs=3", "trainer.precision=32-true",
]  # fmt: skip
ENCODERS = (
    "{statistics: {_target_: vision_lowrank.models.encoders.BandStatistics, patch_size: 2}, "
    "less: {_target_: vision_lowrank.models.encoders.LessEncoder, weights: null, model: {embed_dim: 16, depth: 1, "
    "_target_: vision_lowrank.models.less_vit.LessViT, num_heads: 2, patch_size: 2, radar: false}}}"
)
PROTOCOLS = (
    "{knn: {neighbours: [3], batch_size: 64}, linear: {learning_rates: [0.01], epochs: 2, batch_size: 16}, "
    "finetune: {learning_rates: [0.001, 0.01], epochs: 2, batch_size: 16}}"
)
TRIALS = [pytest.param(2), pytest.param(50, marks=pytest.mark.slow)]


def newest(root):
    """The newest run below a folder of runs that got as far as its configuration, or None."""
    found = sorted(root.glob("*/*/config.yaml"), key=lambda path: path.stat().st_mtime_ns)
    return found[-1].parent if found else None


def check_files(root):
    """Opens all that a killed run left under its final name."""
    for path in root.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        if path.suffix == ".ckpt":
            assert torch.load(path, weights_only=True)["state_dict"]
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            load_file(path)


def same(first, second, path=""):
    """Compares nested containers bit by bit."""
    assert type(first) is type(second), path
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            same(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), path
        for number, pair in enumerate(zip(first, second, strict=True)):
            same(*pair, f"{path}/{number}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), path
    else:
        assert first == second, path


def untimed(content):
    """JSON without what depends on the clock."""
    if isinstance(content, dict):
        return {key: untimed(value) for key, value in content.items() if "seconds" not in key and "bytes" not in key}
    return content


def finished_runs(forks, root, trials, seconds, resume, **job):
    """Kills runs of a job at random moments, each going on from the last, until there were enough.

    Args:
        resume: function from the folder of a stopped run to the overrides that go on with it.
        seconds: how long an undisturbed run takes.

    Yields:
        The folders of the runs that reached their end, the last of them for certain.
    """
    draw = random.Random(trials)
    kills, attempt, overrides = 0, 0, job.pop("overrides")
    while True:
        place = root / str(attempt)
        folder = newest(place)
        options = [*overrides, f"runs_root={place}", *([] if folder is None else resume(folder))]
        moment = {"kill_after": draw.uniform(0, seconds)} if kills < trials else {}
        found = forks.run(**job, **moment, overrides=options, within=draw.random() < 0.5)
        check_files(place)
        if found["status"] == 0:
            yield newest(place)
            attempt += 1
            if kills >= trials:
                return
        else:
            assert found["status"] == -9, found["output"]
            kills += 1


def from_last_checkpoint(folder):
    paths = [folder / part / "last.ckpt" for part in ("checkpoints", "pretraining")]
    return [f"ckpt_path={path}" for path in paths if path.exists()][:1]


def from_folder(folder):
    return [f"resume={folder}"]


@pytest.fixture
def overrides(request, scene, tiles):
    """Overrides of a training by its name."""
    adapted = [*scene, "regime=adapt", "pretraining.epochs=2", "adapter.cycles.first_cycle=1"]
    named = {"scene": scene, "adapted": adapted, "tiles": tiles, "sprites": SPRITES, "classifier": CLASSIFIER}
    return [*named[request.param], "seed=3"]


@pytest.mark.parametrize("trials", TRIALS)
@pytest.mark.parametrize(
    ("overrides", "workers"),
    [
        ("scene", 0),
        ("tiles", 0),
        *(pytest.param(*case, marks=pytest.mark.slow)
          for case in (("scene", 2), ("adapted", 0), ("tiles", 2), ("sprites", 0), ("sprites", 2), ("classifier", 0))),
    ],
    indirect=["overrides"],
)  # fmt: skip
def test_killed_training_ends_as_the_undisturbed_one(forks, tmp_path, overrides, workers, trials):
    overrides = [*overrides, f"data.num_workers={workers}"]
    undisturbed = forks.run(kind="train", overrides=[*overrides, f"runs_root={tmp_path / 'whole'}"])
    assert undisturbed["status"] == 0, undisturbed["output"]
    whole = newest(tmp_path / "whole")
    expected = read_checkpoint(whole / "checkpoints" / "last.ckpt")
    runs = finished_runs(
        forks, tmp_path / "killed", trials, undisturbed["seconds"], from_last_checkpoint, kind="train",
        overrides=overrides,
    )  # fmt: skip
    for folder in runs:
        found = read_checkpoint(folder / "checkpoints" / "last.ckpt")
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "history"):
            same(found[part], expected[part], part)
        names = {path.relative_to(folder) for path in folder.rglob("*") if path.suffix in (".safetensors", ".csv")}
        names |= {Path("prediction.npy")} if (whole / "prediction.npy").exists() else set()
        assert names >= {Path("history.csv")}
        for name in names - {Path("metrics.csv")}:
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
        metrics = [json.loads((path / "metrics.json").read_text()) for path in (folder, whole)]
        assert untimed(metrics[0]) == untimed(metrics[1])
        assert not list(folder.rglob(".*"))


@pytest.mark.parametrize("trials", TRIALS)
def test_killed_evaluation_ends_with_the_same_rows(forks, tmp_path, fields, trials):
    overrides = [
        "benchmark=mini", f"tasks.classification.card={fields}", f"tasks.classification.root={fields.parent}",
        "tasks.classification.every=1", "~tasks.segmentation", "benchmark.seeds=[0]", "~benchmark.encoders",
        f"+benchmark.encoders={ENCODERS}", "~benchmark.protocols", f"+benchmark.protocols={PROTOCOLS}",
        "precision=32-true", "device=cpu",
    ]  # fmt: skip
    undisturbed = forks.run(kind="evaluate", overrides=[*overrides, f"runs_root={tmp_path / 'whole'}"])
    assert undisturbed["status"] == 0, undisturbed["output"]

    def rows(folder):
        with (folder / "results.csv").open(newline="") as file:
            return [untimed(row) for row in csv.DictReader(file)]

    expected = rows(newest(tmp_path / "whole"))
    assert {row["protocol"] for row in expected} == {"knn-3", "linear", "finetune"}
    runs = finished_runs(
        forks, tmp_path / "killed", trials, undisturbed["seconds"], from_folder, kind="evaluate", overrides=overrides
    )
    for folder in runs:
        assert rows(folder) == expected


@pytest.mark.parametrize("trials", TRIALS)
def test_killed_composition_ends_with_the_same_images(forks, tmp_path, trials):
    regions = [
        {
            "box": {"left": left, "top": 16, "right": left + 28, "bottom": 44},
            "prompt": f"<{name}1> <{name}2> on grass",
            "loras": [str(WORLD / "loras" / f"{name}.safetensors")],
        }
        for left, name in ((3, "fox"), (34, "cactus"))
    ]  # fmt: skip
    content = {
        "base": str(WORLD / "pipeline"), "prompt": "on grass", "height": 64, "width": 64, "steps": 2,
        "regions": regions,
        "joined_prompt": "<fox1> <fox2> on the left and <cactus1> <cactus2> on the right on grass",
    }  # fmt: skip
    for name in ("first", "second", "third"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    scenes = ",".join(str(tmp_path / f"{name}.yaml") for name in ("first", "second", "third"))
    job = {"kind": "compose", "base": content["base"], "overrides": [f"scene=[{scenes}]", "device=cpu", "seed=1"]}
    undisturbed = forks.run(**{**job, "overrides": [*job["overrides"], f"runs_root={tmp_path / 'whole'}"]})
    assert undisturbed["status"] == 0, undisturbed["output"]
    whole = newest(tmp_path / "whole")
    names = [path.name for path in whole.iterdir() if path.suffix in (".png", ".csv")]
    assert len(names) == 9
    for folder in finished_runs(forks, tmp_path / "killed", trials, undisturbed["seconds"], from_folder, **job):
        assert {name: (folder / name).read_bytes() == (whole / name).read_bytes() for name in names} == dict.fromkeys(
            names, True
        )


@pytest.mark.parametrize("trials", TRIALS)
def test_killed_prediction_ends_with_the_same_map(forks, tmp_path, card, scene, trials):
    trained = forks.run(kind="train", overrides=[*scene, "trainer.max_epochs=1", f"runs_root={tmp_path / 'run'}"])
    assert trained["status"] == 0, trained["output"]
    content = yaml.safe_load(card.read_text())
    content["shape"] |= {name: 2 * content["shape"][name] for name in ("height", "width")}
    del content["files"]["labels"]
    np.save(tmp_path / "image.npy", np.tile(np.load(card.parent / "image.npy"), (2, 2, 1)))
    (tmp_path / "large.yaml").write_text(yaml.safe_dump(content))
    options = [f"weights={newest(tmp_path / 'run')}", f"scene={tmp_path / 'large.yaml'}", f"root={tmp_path}"]

    def run(folder, **more):
        return forks.run(kind="predict", window_side=16, overrides=[*options, f"out={folder / 'map.tif'}"], **more)

    undisturbed = run(tmp_path / "whole")
    assert undisturbed["status"] == 0, undisturbed["output"]
    expected = (tmp_path / "whole" / "map.tif").read_bytes()
    draw, kills, resumed, out = random.Random(trials), 0, 0, tmp_path / "killed" / "map.tif"
    while kills < trials:
        found = run(out.parent, kill_after=draw.uniform(0, undisturbed["seconds"]))
        resumed += "windows are finished already" in found["output"]
        assert found["status"] in (0, -9), found["output"]
        kills += found["status"] == -9
        if out.exists():
            assert out.read_bytes() == expected
            out.unlink()
        else:
            assert found["status"] == -9
    other = out.with_name(".map.v2.0123abcd.part.tif")
    other.touch()
    assert run(out.parent)["status"] == 0
    assert out.read_bytes() == expected
    assert set(out.parent.iterdir()) == {out, other}
    assert trials < 50 or resumed > 5
