"""The comparison of adapters from the base to the table, on a scene that small models learn."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from safetensors.torch import load_file
from scipy import stats
from stripes import write_stripes
from torch import nn

from vision_lowrank import adapter_comparison, fitting
from vision_lowrank.adapter_comparison import mean_intruders
from vision_lowrank.adapter_report import comparison_table, main
from vision_lowrank.adapters import FlyLoRA, LoRA, inject
from vision_lowrank.adapters.peft_methods import inject_peft
from vision_lowrank.data.scene_parts import ScenePartModule
from vision_lowrank.data.splits import Split
from vision_lowrank.errors import ConfigError, DataError, TrainingError
from vision_lowrank.evaluation.metrics import score
from vision_lowrank.evaluation.tables import RunResult, read_result
from vision_lowrank.memory import step_bytes
from vision_lowrank.training import train

HEIGHT, WIDTH, BORDER = 30, 60, 0.4
TARGETS = 5  # adapted layers of the small model


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    return write_stripes(tmp_path_factory.mktemp("scene"), HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def configure(card, runs, *overrides):
    with initialize_config_dir(str(Path(__file__).resolve().parents[1] / "configs"), version_base="1.3"):
        return compose(
            "train",
            [
                "experiment=adapter_comparison",
                f"data.card={card}",
                f"data.root={card.parent}",
                f"runs_root={runs}",
                f"data.border={BORDER}",
                "data.components=4",
                "data.batch_size=32",
                "data.split.block_size=6",
                "data.split.train_pixels=100",
                "data.split.validation_pixels=60",
                "+data.split.test_pixels=60",
                "pretraining.epochs=1",
                "trainer.max_epochs=4",
                "trainer.precision=32-true",
                "comparison.learning_rates=[0.03,0.003]",
                "comparison.budget=480",
                "+model.dim=16",
                "+model.num_heads=[2]",
                "+model.depths=[1]",
                "+model.stem_channels=[2,4]",
                "+model.stem_depths=[3,3]",
                *overrides,
            ],
        )


@pytest.fixture(scope="module")
def result(card, runs):
    """A run with LoRA."""
    return train(configure(card, runs))[0]


def test_a_run_has_the_budget_the_better_rate_and_the_scores_of_its_map(result, runs, card):
    folder = runs / "adapter_comparison" / "lora-seed0"
    trials = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("trials/*/trial.json")}
    assert set(trials) == {"0.03", "0.003"}
    better = max(trials, key=lambda rate: trials[rate]["validation_oa"])
    assert result.facts["learning_rate"] == float(better)
    assert result.facts["learning_rates"] == [0.003, 0.03]
    # weights of 48 x 16, 16 x 16, 32 x 16 twice and 16 x 32, by A and B of rank 2
    assert result.facts["size"] == 2
    assert result.facts["adapter_parameters"] == 2 * (64 + 32 + 48 + 48 + 48)
    head = 3 * 2 * 16 + 3
    assert result.facts["parameters"]["trainable"] == result.facts["adapter_parameters"] + head
    kept = {path.parent.name for path in folder.glob("trials/*/checkpoints")} | {
        path.parent.name for path in folder.glob("trials/*/adapter")
    }
    assert kept == {better}
    split, predicted = Split.load(folder / "split.npz"), np.load(folder / "prediction.npy")
    labels = np.load(card.parent / "labels.npy").astype(int) - 1
    for name, pixels in split.subsets().items():
        assert result.scores[name].oa == pytest.approx(np.mean(predicted.flat[pixels] == labels.flat[pixels]))
    assert result.scores["validation"].oa == pytest.approx(trials[better]["validation_oa"])
    assert result.scores["test"].oa > 0.8
    assert result.facts["intruders"] >= 0
    assert not result.facts["transductive"]


def test_what_is_finished_is_not_done_again(result, card, runs, monkeypatch):
    def refuse(*args):
        raise AssertionError("trained again")

    folder = runs / "adapter_comparison" / "lora-seed0"
    monkeypatch.setattr(adapter_comparison, "train_network", refuse)
    monkeypatch.setattr(fitting, "pretrain", refuse)
    (again,) = train(configure(card, runs))
    assert again.scores["test"].oa == result.scores["test"].oa
    # stopped after the trials, before the scores
    metrics = (folder / "metrics.json").read_text()
    (folder / "metrics.json").unlink()
    (again,) = train(configure(card, runs))
    assert np.array_equal(again.scores["test"].confusion, result.scores["test"].confusion)
    assert json.loads(metrics)["facts"] == json.loads((folder / "metrics.json").read_text())["facts"]
    with pytest.raises(ConfigError, match="lora-seed0: begun with another comparison; give the same"):
        train(configure(card, runs, "comparison.budget=600"))


def test_a_stem_that_remembers_changes_nothing(result, card, runs):
    plain = "task._target_=vision_lowrank.tasks.scene_classification.SceneClassification"
    (found,) = train(configure(card, runs, plain, "name=plain"))
    assert found.facts["learning_rate"] == result.facts["learning_rate"]
    folders = [runs / name / "lora-seed0" for name in ("adapter_comparison", "plain")]
    remembered, trained = (
        load_file(folder / "trials" / str(found.facts["learning_rate"]) / "adapter" / "adapter_model.safetensors")
        for folder in folders
    )
    assert remembered.keys() == trained.keys()
    for name, value in trained.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(remembered[name], value, atol=1e-3, rtol=1e-2)
    first, second = (np.load(folder / "prediction.npy") for folder in folders)
    assert np.mean(first == second) > 0.995


def test_all_methods_share_base_and_splits(result, card, runs, full_resolution):
    root = runs / "adapter_comparison"
    (base,) = root.glob("base-*/model/model.safetensors")
    written = base.stat().st_mtime_ns
    results = {"lora": result}
    for options in (["regime=full"], ["regime=probe"], ["adapter=dora"], ["adapter=flylora"]):
        (found,) = train(configure(card, runs, *options, "comparison.learning_rates=[0.01]", "trainer.max_epochs=2"))
        results[found.method] = found
    assert set(results) == {"lora", "full", "probe", "dora", "flylora"}
    assert len({found.split for found in results.values()}) == 1
    assert [base] == list(root.glob("base-*/model/model.safetensors"))
    assert base.stat().st_mtime_ns == written
    head = results["probe"].facts["parameters"]["trainable"]
    assert head == 3 * 2 * 16 + 3
    assert results["full"].facts["parameters"]["trainable_share"] == 1
    assert results["probe"].facts["intruders"] == 0
    assert results["flylora"].facts["intruders"] is None
    for name in ("dora", "flylora"):
        assert results[name].facts["parameters"]["trainable"] == results[name].facts["adapter_parameters"] + head
        assert abs(results[name].facts["adapter_parameters"] - 480) <= 0.2 * 480
    memory = {name: found.facts["step_megabytes"] for name, found in results.items()}
    assert memory["probe"] < memory["lora"] < memory["full"]

    assert main([str(root), "--out", str(runs / "report")]) == 0
    table = (runs / "report" / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table if line.startswith("|")][2:] == [
        "probe", "dora", "flylora", "lora", "full",
    ]  # fmt: skip
    with Image.open(runs / "report" / "accuracy.png") as picture:
        assert picture.size[0] > 300


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["comparison.learning_rates=[]"], "give at least one"),
        (["comparison.learning_rates=[0.1,0.1]"], "none twice"),
        (["trainer.devices=2"], "one device"),
        (["base=somewhere"], "leave out base"),
        (["compile=true"], "leave out compile"),
        (["data.border=0.99"], "leaves 59 to pretrain on and 0 to split"),
        (["adapter=vera", "adapter.cycles={first_cycle: 1}"], "set them to null for vera"),
        (["comparison.budget=10", "name=other"], "comparison.budget=10: the nearest of LoRA is 240"),
    ],
)
def test_wrong_options(card, runs, overrides, message):
    with pytest.raises(ConfigError, match=message):
        train(configure(card, runs, *overrides))


def test_a_rate_that_diverges_is_out(card, tmp_path, monkeypatch):
    train_network = adapter_comparison.train_network

    def diverge(config, *rest):
        if config.task.learning_rate > 0.01:
            raise TrainingError("the loss is nan")
        return train_network(config, *rest)

    monkeypatch.setattr(adapter_comparison, "train_network", diverge)
    (found,) = train(configure(card, tmp_path, "trainer.max_epochs=1"))
    assert found.facts["learning_rate"] == 0.003
    with pytest.raises(TrainingError, match=r"lora: training diverged at each of the rates \[0.03, 0.3\]"):
        train(configure(card, tmp_path, "seed=1", "comparison.learning_rates=[0.3,0.03]"))


def test_the_parts_of_a_scene_do_not_meet(card):
    options = {"kind": "blocks", "block_size": 6, "train_pixels": 100, "validation_pixels": 60, "test_pixels": 60}
    arguments = {"patch_size": 5, "components": 4, "whiten": False, "batch_size": 8, "evaluation_batch_size": 8}
    arguments |= {"card": str(card), "root": str(card.parent), "split": options}
    first, second = (ScenePartModule(BORDER, seed=seed, **arguments) for seed in (0, 1))
    for module in (first, second):
        module.setup()
    seen = set()
    for pixel in first.pretraining_pixels():
        row, column = divmod(int(pixel), WIDTH)
        seen |= {(row + y, column + x) for y in range(-2, 3) for x in range(-2, 3)}
    assert max(column for _, column in seen) == 24 - 1 + 2
    for pixels in first.split.subsets().values():
        rows, columns = np.divmod(pixels, WIDTH)
        around = {(row + y, column + x) for row, column in zip(rows, columns, strict=True)
                  for y in range(-2, 3) for x in range(-2, 3)}  # fmt: skip
        assert seen.isdisjoint(around)
    # the scaling does not depend on the split, and is that of the left part
    assert first.split.digest() != second.split.digest()
    assert torch.equal(first.cube, second.cube)
    image = np.load(card.parent / "image.npy")[:, :24].reshape(-1, 8)
    np.testing.assert_allclose(first.preprocessor.state()["mean"], image.mean(0), rtol=1e-5)


def test_intruders_are_those_of_the_weight_with_its_adapter():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 20), nn.Linear(20, 20))
    strong = torch.randn(20, 1) * 9, torch.randn(1, 24) * 9

    def with_one(adapt):
        model = nn.Sequential(nn.Linear(24, 20), nn.Linear(20, 20))
        model.load_state_dict(base.state_dict())
        return adapt(model)

    def ours(model):
        inject(model, ["0", "1"], LoRA(1, 1))
        adapter = model[0].adapters["default"]
        adapter.lora_A.weight.data, adapter.lora_B.weight.data = strong[1], strong[0]
        return model

    def of_peft(model):
        model = inject_peft(model, "lora", ["0", "1"], rank=1)
        layer = model.base_model.model[0]
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = strong[1], strong[0]
        return model

    def full(model):
        model[0].weight.data += strong[0] @ strong[1]
        return model

    # the new direction is in the span of 20 old ones and near none of them: one intruder in one of two layers
    cosine = (torch.linalg.svd(base[0].weight).U.T @ nn.functional.normalize(strong[0], dim=0)).abs().max()
    assert cosine < 0.5
    counts = [mean_intruders(base, with_one(make), ["0", "1"]) for make in (ours, of_peft, full)]
    assert counts[0] >= 0.5
    assert counts == [counts[0]] * 3
    fly = with_one(lambda model: (inject(model, ["0"], FlyLoRA(4, 8, 2)), model)[1])
    assert mean_intruders(base, fly, ["0"]) is None


def test_memory_of_a_step_is_the_sum_of_what_it_holds():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 4)

        def forward(self, batch):
            return self.second(self.first(batch["image"]).exp())

    net = Net()
    batch = {"image": torch.randn(5, 6)}
    held = (6 * 10 + 10 + 10 * 4 + 4) * 4
    # image for the first weight, exp for its own slope and the second weight
    assert step_bytes(net, batch, "32-true") == held + (5 * 6 + 5 * 10) * 4 + 3 * held
    net.first.requires_grad_(False)
    assert step_bytes(net, batch, "32-true") == held + 5 * 10 * 4 + 3 * (10 * 4 + 4) * 4


def make_results(accuracies, rates=(1, 2, 3)):
    """Results by method: one accuracy a seed, out of 1000 pixels."""
    results = []
    for method, values in accuracies.items():
        for seed, value in enumerate(values):
            labels = np.zeros(1000, int)
            labels[500:] = 1
            predicted = labels.copy()
            predicted[: round(1000 * (1 - value))] = 1
            facts = {
                "parameters": {"trainable": 100}, "learning_rate": 2, "learning_rates": list(rates),
                "training_seconds": 3.0, "step_megabytes": 1.5, "intruders": None,
            }  # fmt: skip
            results.append(RunResult(method, seed, f"split {seed}", 0.0, {"test": score(predicted, labels, 2)}, facts))
    return results


def test_the_table_claims_what_simultaneous_intervals_show():
    accuracies = {
        "probe": [0.600, 0.650, 0.700],
        "hydra": [0.811, 0.852, 0.889],
        "nola": [0.830, 0.871, 0.909],
        "lora": [0.810, 0.850, 0.890],
    }
    results = make_results(accuracies)
    text = comparison_table(results, "lora")
    values = {name: np.array(found) for name, found in accuracies.items()}
    # Bonferroni over the three others
    width = stats.t.ppf(1 - 0.05 / 3 / 2, 2) / np.sqrt(3)
    expected = {}
    for name in ("probe", "hydra", "nola"):
        difference = values[name] - values["lora"]
        half = width * difference.std(ddof=1)
        expected[name] = (100 * difference.mean(), 100 * (difference.mean() - half), 100 * (difference.mean() + half))
        mean, low, high = expected[name]
        assert f"{mean:+.2f} [{low:+.1f}, {high:+.1f}]" in text
    assert expected["nola"][1] > 0 > expected["probe"][2]
    assert expected["hydra"][1] < 0 < expected["hydra"][2]
    assert (
        "Better than lora in OA: nola.\nWorse than lora in OA: probe.\nNo difference shown from lora in OA: hydra."
        in text
    )
    assert "**" not in text
    assert "edge" not in text
    one = make_results({"lora": [0.8], "nola": [0.9]}, rates=(2, 3, 4))
    text = comparison_table(one, "lora")
    assert "Better" not in text
    assert re.search(r"edge of those tried: lora \(1 of 1 runs\), nola", text)
    with pytest.raises(DataError, match="no run of 'hydra'"):
        comparison_table(one, "hydra")


def test_a_folder_without_finished_runs(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "no finished run of a comparison" in capsys.readouterr().err


def test_a_table_reads_what_a_run_wrote(result, runs):
    assert read_result(runs / "adapter_comparison" / "lora-seed0").facts == json.loads(json.dumps(dict(result.facts)))
