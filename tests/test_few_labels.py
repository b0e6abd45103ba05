"""Few labels: what training keeps, the runs from division to table, and that they go on where they were stopped."""

import csv
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from scipy import stats
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from stripes import write_stripes

from vision_lowrank import few_labels, fitting
from vision_lowrank.data.few_labels import FewLabelPatches, keep_labels
from vision_lowrank.data.scene import IGNORE
from vision_lowrank.data.splits import Split, block_split, random_split
from vision_lowrank.errors import ConfigError, DataError, SplitError
from vision_lowrank.evaluation.metrics import Scores
from vision_lowrank.evaluation.tables import RunResult, read_result, write_metrics
from vision_lowrank.few_labels import Division, Run, run_few_labels
from vision_lowrank.few_labels_report import chosen_runs, markdown_tables, read_runs, report, summary_rows
from vision_lowrank.instantiate import instantiate
from vision_lowrank.random_walk import Walk, random_walk

HEIGHT, WIDTH, BANDS = 40, 60, 8
BLOCKS = {
    "block_size": 6, "guard": 6, "train_pixels": 120, "validation_pixels": 60, "validation_classes": 2,
    "test_pixels": 60,
}  # fmt: skip
METHODS = ("svm", "svm_shape", "random_forest", "lola_full", "lola_and_svms", "lola_adapt", "less_vit", "chance")


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    return write_stripes(tmp_path_factory.mktemp("scene"), HEIGHT, WIDTH, BANDS)


def configure(card, runs, *overrides):
    sizes = ("model.dim=16", "model.num_heads=[2]", "model.depths=[1]", "model.stem_channels=[2,4]")
    small = [
        change
        for name in ("lola_full", "lola_adapt")
        for change in (
            *(f"+benchmark.methods.{name}.{size}" for size in (*sizes, "model.stem_depths=[3,3]")),
            *(f"benchmark.methods.{name}.{rest}" for rest in ("trainer.max_epochs=3", "task.learning_rate=0.01")),
        )
    ]
    with initialize_config_dir(str(Path(__file__).resolve().parents[1] / "configs"), version_base="1.3"):
        return compose(
            "evaluate",
            [
                "benchmark=few_labels",
                f"benchmark.card={card}",
                f"benchmark.data.patches.root={card.parent}",
                f"benchmark.data.shapes.root={card.parent}",
                f"benchmark.data.windows.root={card.parent}",
                f"runs_root={runs}",
                "precision=32-true",
                "kinds=[blocks]",
                "labels=[4]",
                "seeds=[0]",
                *(f"++benchmark.splits.blocks.{key}={value}" for key, value in BLOCKS.items()),
                "benchmark.data.patches.patch_size=3",
                "benchmark.data.patches.components=4",
                "benchmark.data.patches.batch_size=16",
                "benchmark.data.shapes.batch_size=16",
                "benchmark.data.patches.steps=10",
                "benchmark.data.windows={size: 4, stride: 4}",
                "benchmark.methods.less_vit.trainer.max_epochs=2",
                "benchmark.methods.random_forest.model.trees=20",
                *small,
                *overrides,
            ],
        )


@pytest.fixture(scope="module")
def root(card, tmp_path_factory):
    """Folder with a run of each method."""
    return run_few_labels(configure(card, tmp_path_factory.mktemp("runs")))


@pytest.mark.parametrize("kept", [3, 30, 0.1, 0.5])
def test_training_keeps_so_many_of_each_class_and_the_rest_stays(kept):
    labels = np.random.default_rng(1).choice([0, 1, 2, IGNORE], (50, 60), p=[0.6, 0.2, 0.01, 0.19])
    whole = random_split(labels, 4, 0.3, 0.1, seed=5)
    split = keep_labels(whole, labels, 4, kept)
    assert np.isin(split.train, whole.train).all()
    np.testing.assert_array_equal(split.test, whole.test)
    assert np.isin(split.validation, whole.validation).all()
    pool = [int((labels.flat[whole.train] == index).sum()) for index in range(4)]
    scene = [int((labels == index).sum()) for index in range(4)]
    wanted = [kept if isinstance(kept, int) else max(1, int(kept * count + 0.5)) for count in scene]
    expected = [min(pair) for pair in zip(pool, wanted, strict=True)]
    assert [int((labels.flat[split.train] == index).sum()) for index in range(4)] == expected
    held = [int((labels.flat[whole.validation] == index).sum()) for index in range(4)]
    held = [min(pair) for pair in zip(held, wanted, strict=True)]
    assert [int((labels.flat[split.validation] == index).sum()) for index in range(4)] == held
    assert split.parameters["kept_pixels"] == expected
    # class 3 does not occur
    assert split.parameters["short_classes"] == [i for i in range(3) if pool[i] < wanted[i]]
    assert pool[2] < 30
    more = keep_labels(whole, labels, 4, 2 * kept if isinstance(kept, int) else kept * 1.5)
    assert np.isin(split.train, more.train).all()
    assert keep_labels(whole, labels, 4, kept).digest() == split.digest()


def test_seeds_draw_other_labels_of_the_same_blocks():
    labels = np.zeros((40, 40), int)
    labels[20:] = 1
    whole = block_split(labels, 2, 2, 7, block_size=6, train_pixels=150, validation_pixels=80, test_pixels=50)
    drawn = [keep_labels(Split(**{**vars(whole), "seed": seed}), labels, 2, 5) for seed in (1, 2)]
    assert drawn[0].digest() != drawn[1].digest()
    assert drawn[0].leakage(3) == drawn[1].leakage(3) == 0


@pytest.mark.parametrize("kept", [0, -3, 1.0, 1.5, 0.0, True, float("nan")])
def test_what_is_no_number_of_labels(kept):
    labels = np.arange(100).reshape(10, 10) % 2
    with pytest.raises(SplitError, match=r"labels has .*; give whole numbers \(pixels a class\) or shares below 1"):
        keep_labels(random_split(labels, 2, 0.3, 0.1, seed=0), labels, 2, kept)


def test_an_epoch_has_its_steps_however_few_the_pixels_are(card):
    options = {"patch_size": 3, "components": 4, "whiten": False, "evaluation_batch_size": 8, "seed": 0}
    split = {"kind": "random", "train": 0.3, "validation": 0.1}
    data = FewLabelPatches(steps=6, card=str(card), root=str(card.parent), split=split, batch_size=8, **options)
    data.setup()
    scale = data.preprocessor.state()["mean"]
    whole = data.split
    for kept in (1, 5, 15, 0.29):
        data.split = keep_labels(whole, data.scene.labels, 3, kept)
        batches = list(data.train_dataloader())
        count = max(6, len(data.split.train) // 8)
        assert [len(batch["label"]) for batch in batches] == [8] * count
        centres = np.concatenate([batch["image"][:, :, 1, 1].numpy() for batch in batches])
        image = data.scaled_image().reshape(4, -1).T
        # two pixels of this scene never have the same values
        times = [int((centres == image[pixel]).all(axis=1).sum()) for pixel in data.split.train]
        assert sum(times) == 8 * count
        assert max(times) - min(times) <= 1
    assert count > 6
    # the scaling is that of all pixels to draw from
    image = np.load(card.parent / "image.npy").reshape(-1, BANDS)
    np.testing.assert_allclose(scale, image[whole.train].mean(0), rtol=1e-5)


def test_a_run_of_each_method_on_one_division(root, card):
    folder = root / "blocks-4-seed0"
    results = {name: read_result(folder / name) for name in METHODS}
    assert {path.name for path in folder.iterdir()} == set(METHODS)
    splits = {name: Split.load(folder / name / "split.npz") for name in METHODS}
    assert len({split.digest() for split in splits.values()} | {result.split for result in results.values()}) == 1
    labels = np.load(card.parent / "labels.npy").astype(int) - 1
    split = splits["svm"]
    assert np.bincount(labels.flat[split.train]).tolist() == [4, 4, 4]
    for name, result in results.items():
        assert sorted(path.name for path in (folder / name).iterdir()) == [
            "metrics.csv", "metrics.json", "prediction.npy", "provenance.json", "random_walk", "split.npz",
        ]  # fmt: skip
        assert result.leakage == 0
        assert sum(result.scores["test"].pixels) == split.test.size
        assert result.facts["train_pixels"] == 12
        assert result.facts["classes"] == 3
        assert result.facts["absent_classes"] == []
    assert [name for name in METHODS if results[name].facts["transductive"]] == ["lola_adapt", "less_vit"]
    # what the svm reaches, reckoned anew
    spectra = np.load(card.parent / "image.npy").reshape(-1, BANDS)
    scaler = StandardScaler().fit(spectra[split.train])
    chosen = SVC(**results["svm"].facts["chosen"]).fit(scaler.transform(spectra[split.train]), labels.flat[split.train])
    right = chosen.predict(scaler.transform(spectra[split.test])) == labels.flat[split.test]
    assert results["svm"].scores["test"].oa == pytest.approx(right.mean())
    shapes = np.log(spectra)
    shapes -= shapes.mean(axis=1, keepdims=True)
    scaler_of_shapes = StandardScaler().fit(shapes[split.train])
    other = SVC(**results["svm_shape"].facts["chosen"])
    other.fit(scaler_of_shapes.transform(shapes[split.train]), labels.flat[split.train])
    right = other.predict(scaler_of_shapes.transform(shapes[split.test])) == labels.flat[split.test]
    assert results["svm_shape"].scores["test"].oa == pytest.approx(right.mean(), abs=0.005)
    # the walk, from the svm's decisions and the labels that training kept
    decided = np.eye(3)[chosen.predict(scaler.transform(spectra))]
    module = instantiate(
        {**configure(card, root).benchmark.data.patches, "split": {"kind": "blocks", **BLOCKS}, "seed": 0}
    )
    module.setup()
    seeds = np.full(labels.shape, IGNORE)
    seeds.flat[split.train] = labels.flat[split.train]
    settings = configure(card, root).benchmark.random_walk
    walked = random_walk(decided, module.scaled_image(), seeds, Walk(**settings), module.scene.valid).argmax(axis=1)
    found = read_result(folder / "svm" / "random_walk")
    assert found.method == "svm + random walk"
    assert found.facts["transductive"]
    assert found.scores["test"].oa == pytest.approx((walked[split.test] == labels.flat[split.test]).mean())
    # maps are those that were scored
    maps = {name: np.load(folder / name / "prediction.npy") for name in METHODS}
    for name, result in results.items():
        right = maps[name].flat[split.test] == labels.flat[split.test]
        assert result.scores["test"].oa == pytest.approx(right.mean())
    walked_map = np.load(folder / "svm" / "random_walk" / "prediction.npy")
    np.testing.assert_array_equal(walked_map.ravel(), walked)
    # two of three decide, and where no two agree the first
    first, second, third = (maps[name] for name in ("svm_shape", "lola_full", "svm"))
    np.testing.assert_array_equal(maps["lola_and_svms"], np.where(second == third, second, first))
    assert (first != second).any()
    members = [results[name].facts["seconds"] for name in ("svm_shape", "lola_full", "svm")]
    assert results["lola_and_svms"].facts["seconds"] > sum(members)
    for name in METHODS[:-2]:
        assert results[name].scores["test"].oa > 0.6, name
    assert results["lola_adapt"].facts["parameters"]["trainable_share"] < 0.5
    assert results["lola_full"].facts["parameters"]["trainable_share"] == 1
    base = json.loads((root / "bases" / "blocks-seed0" / "provenance.json").read_text())
    assert base["seconds"] > 0


def test_it_goes_on_where_it_was_stopped(root, card, monkeypatch, caplog):
    before = {path: path.read_text() for path in root.glob("*-seed*/*/metrics.json")}
    for module, name in ((few_labels, "train_network"), (fitting, "pretrain"), (few_labels, "fit_baseline")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("done again"))
    assert run_few_labels(configure(card, root.parent)) == root
    monkeypatch.undo()
    lost = root / "blocks-4-seed0" / "lola_adapt" / "metrics.json"
    lost.unlink()
    # what a killed run leaves
    (lost.parent / "training").mkdir()
    (lost.parent / "training" / "history.csv").write_text("half a line")
    base = root / "bases" / "blocks-seed0" / "model" / "model.safetensors"
    written = base.stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        run_few_labels(configure(card, root.parent))
    assert "8 runs, 7 of them finished before" in caplog.text
    assert "1 of 1: blocks, 4 labels, seed 0, lola_adapt: OA" in caplog.text
    assert base.stat().st_mtime_ns == written
    assert not (lost.parent / "training").exists()
    again = {path: path.read_text() for path in root.glob("*-seed*/*/metrics.json")}
    assert {path for path in before if before[path] != again[path]} == {lost}
    assert json.loads(before[lost])["scores"] == json.loads(again[lost])["scores"]


def test_parts_add_to_one_table(root, card, full_resolution):
    parts = ["methods=[svm]", "kinds=[random,blocks]", "labels=[2,0.02]", "seeds=[0,1]"]
    run_few_labels(configure(card, root.parent, *parts))
    with (root / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(row["split"], row["labels"], row["method"], row["runs"]) for row in rows]
    expected = [("blocks", "2", "2"), ("blocks", "4", "1"), ("blocks", "0.02", "2"), ("random", "2", "2"),
                ("random", "0.02", "2")]  # fmt: skip
    for name in ("svm", "svm + random walk"):
        assert [(kind, labels, count) for kind, labels, method, count in found if method == name] == expected
    assert len(found) == 2 * (8 + 4 + 1)
    assert ("blocks", "4", "lola_or_svm", "1") in found
    tests = [read_result(root / f"random-2-seed{seed}" / "svm").scores["test"].oa for seed in (0, 1)]
    (row,) = [row for row in rows if (row["split"], row["labels"], row["method"]) == ("random", "2", "svm")]
    assert float(row["oa"]) == pytest.approx(np.mean(tests))
    assert float(row["oa std"]) == pytest.approx(np.std(tests, ddof=1))
    with Image.open(root / "curve.png") as picture:
        assert min(picture.size) > 600


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["methods=[svm,forest]"], "methods has forest; it can have svm, random_forest, lola_full"),
        (["kinds=[stripes]"], "kinds has stripes; it can have random, blocks"),
        (["methods=[]"], r"methods=\[\]: give at least one"),
        (["benchmark.methods.lola_and_svms.members=[svm,lola]"], "lola_and_svms.members has lola, which is no method"),
        (["methods=[lola_and_svms]"], r"prediction\.npy: not found; lola_and_svms needs a run of svm_shape before it"),
        (["seeds=[1,1]"], "none twice"),
        (["labels=[5,0]"], "labels has 0; give whole numbers"),
        (["labels=[1.0]"], "labels has 1.0; give whole numbers"),
        (["resume=somewhere"], "leave out resume"),
        (["+benchmark.choices.best=[svm,forest]"], "benchmark.choices.best has forest, which is no method"),
        (["benchmark.random_walk.prior=strong"], "random_walk: prior is 'strong', which is not a number"),
        (["benchmark.random_walk=null"], "benchmark.random_walk is null; leave it"),
        (["benchmark.choices=null"], "benchmark.choices is null; for none give {}"),
        (["methods=svm"], "few_labels: methods is 'svm', which is not a list"),
        (["labels=5"], "few_labels: labels is 5, which is not a list"),
        (["labels=[many]"], r"few_labels: labels\[0\] is 'many', which is not a number"),
        (["seeds=20"], "few_labels: seeds is 20, which is not a list"),
        (["seeds=[-1]"], "give a list of whole numbers from 0 up"),
        (["benchmark.reference=forest"], "benchmark.reference=forest: it can be svm, .* each with ' \\+ random walk'"),
        (["benchmark.methods.svm.data=pixels"], "methods.svm.data=pixels: it can be patches, shapes, windows"),
        (["benchmark.methods.lola_full.regime=half"], "methods.lola_full.regime is 'half'; it can be full or probe"),
        (["benchmark.methods.lola_full.base=3"], "methods.lola_full.base is 3, which is not a text"),
        (["benchmark.splits.random=half"], "splits.random is 'half', which is not a mapping"),
        (["benchmark.data.windows.size=8"], "split.guard is 6; patches of 15 need 14"),
    ],
)
def test_wrong_options(card, tmp_path, overrides, message):
    with pytest.raises((ConfigError, SplitError), match=message):
        run_few_labels(configure(card, tmp_path, "methods=[less_vit]", *overrides))


def test_other_settings_do_not_join_the_same_row(root, card):
    with pytest.raises(ConfigError, match="lola_full was begun with other settings; give the same, or another name="):
        run_few_labels(configure(card, root.parent, "benchmark.methods.lola_full.task.mixup=0.5"))


def test_the_default_methods_are_all_that_are_defined():
    with initialize_config_dir(str(Path(__file__).resolve().parents[1] / "configs"), version_base="1.3"):
        config = compose("evaluate", ["benchmark=few_labels"])
    assert tuple(config.methods) == METHODS
    assert set(config.benchmark.methods) == set(METHODS)
    assert len(config.seeds) >= 5
    assert OmegaConf.to_object(config.labels) == [5, 10, 20, 50, 0.01, 0.02, 0.05, 0.1]


def write_run(root, method, kind, labels, seed, right, walked=10, transductive=False):
    """Leaves a run: so many of ten test pixels of class 0 are right, and so many with the walk; of class 1 all ten."""
    for part, count in (("random_walk", walked), (".", right)):
        confusion = np.array([[count, 10 - count], [0, 10]])
        scores = {"test": Scores((10 + count) / 20, (1 + count / 10) / 2, None, (count / 10, 1.0), confusion)}
        facts = {
            "kind": kind, "labels": labels, "train_pixels": 2 * seed + 4, "classes": 2, "seconds": 3.0 * seed,
            "absent_classes": ["oats"] * seed, "short_classes": [], "random_walk": part != ".",
            "transductive": transductive or part != ".",
        }  # fmt: skip
        name = method if part == "." else f"{method} + random walk"
        result = RunResult(name, seed, f"{kind} {labels} {seed}", 0.25, scores, facts)
        write_metrics(root / f"{kind}-{labels:g}-seed{seed}" / method / part, result, ["corn", "hay"])


def test_tables_say_what_the_runs_reached(tmp_path, capsys):
    reached = {"svm": [2, 4, 9], "net": [3, 6, 10]}
    for method, counts in reached.items():
        for seed, right in enumerate(counts):
            write_run(tmp_path, method, "blocks", 10, seed, right, right - 1, transductive=method == "net")
    write_run(tmp_path, "svm", "blocks", 5, 0, 1)
    write_run(tmp_path, "svm", "random", 0.05, 0, 8)
    report(tmp_path, "svm", {})
    rows = {(row["split"], row["labels"], row["method"]): row for row in summary_rows(read_runs(tmp_path), "svm")}
    walks = [(kind, labels, f"{method} + random walk") for kind, labels, method in rows if "walk" not in method]
    assert set(rows) == {
        ("blocks", 5, "svm"), ("blocks", 10, "net"), ("blocks", 10, "svm"), ("random", 0.05, "svm"), *walks,
    }  # fmt: skip
    row = rows["blocks", 10, "net"]
    accuracies = {method: [(10 + right) / 20 for right in counts] for method, counts in reached.items()}
    assert row["oa"] == pytest.approx(np.mean(accuracies["net"]))
    half = stats.t.ppf(0.975, 2) * np.std(accuracies["net"], ddof=1) / np.sqrt(3)
    assert (row["oa low"], row["oa high"]) == pytest.approx((row["oa"] - half, row["oa"] + half))
    differences = np.subtract(accuracies["net"], accuracies["svm"])
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert row["oa - svm"] == pytest.approx(differences.mean())
    assert (row["difference low"], row["difference high"]) == pytest.approx((low, high))
    assert (row["train_pixels"], row["seconds"], row["leakage"], row["runs"]) == (6, 3, 0.25, 3)
    assert row["transductive"] is True
    assert rows["blocks", 10, "svm"]["transductive"] is False
    assert "kappa" not in row
    assert rows["blocks", 10, "svm + random walk"]["oa - svm"] == pytest.approx(-1 / 20)

    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    blocks, random = text.split("## random splits")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in blocks.splitlines() if line.startswith("|")]
    assert lines[0] == ["OA", "5 a class", "10 a class"]
    assert lines[2:4] == [["training pixels", "4", "6"], ["seeds", "1", "3"]]
    assert lines[4:6] == [["svm", "55.0", "75.0 ± 18.0"], ["net", "", "81.7 ± 17.6"]]
    assert lines[6:8] == [["net + random walk", "", "76.7 ± 17.6"], ["svm + random walk", "100.0", "70.0 ± 18.0"]]
    assert lines[8][0] == "AA"
    (difference,) = [line for line in lines[16:] if line[0] == "net"]
    assert difference == ["net", "", f"+6.67 [{100 * low:+.1f}, {100 * high:+.1f}]"]
    assert "transductive): net, net + random walk, svm + random walk." in blocks
    assert "lacks 0 to 2 of the classes" in blocks
    assert "| svm | 90.0 |" in random
    assert "net" not in random


def test_where_no_two_members_agree_the_first_decides(tmp_path):
    # rows: members; columns: pixels
    maps = {"a": [2, 2, 0, 1], "b": [1, 0, 1, 1], "c": [0, 0, 1, 2]}
    for name, predicted in maps.items():
        write_run(tmp_path, name, "blocks", 10, 1, 5, transductive=name == "b")
        np.save(tmp_path / "blocks-10-seed1" / name / "prediction.npy", np.array(predicted, np.uint8))
    data = SimpleNamespace(scene=SimpleNamespace(labels=np.zeros(4)), num_classes=3)
    votes, facts = Division._votes(SimpleNamespace(root=tmp_path), Run(1, "blocks", 10, "all"), list(maps), data)
    assert votes.argmax(1).tolist() == [2, 0, 1, 1]
    np.testing.assert_allclose(votes, np.array([[1, 1, 1], [2, 0, 1], [1, 2, 0], [0, 2, 1]]) / 3, atol=1e-3)
    assert facts == {"seconds": 9.0, "transductive": True}


def test_cells_of_fewer_seeds_than_their_column_say_so(tmp_path):
    for seed in range(3):
        write_run(tmp_path, "svm", "blocks", 10, seed, 4)
        if seed:
            write_run(tmp_path, "net", "blocks", 10, seed, 6)
    write_run(tmp_path, "net", "blocks", 10, 3, 8)
    text = markdown_tables([one for one in read_runs(tmp_path) if "walk" not in one.method], "svm")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines[3] == ["seeds", "4"]
    assert lines[4:6] == [["svm", "70.0 ± 0.0 (n = 3)"], ["net", "83.3 ± 5.8 (n = 3)"]]
    assert lines[-1] == ["net", "+10.00 [+10.0, +10.0] (n = 2)"]


def test_without_the_reference_there_is_no_difference(tmp_path):
    write_run(tmp_path, "net", "blocks", 10, 0, 5)
    results = read_runs(tmp_path)
    assert "oa - svm" not in summary_rows(results, "svm")[0]
    assert "svm" not in markdown_tables(results, "svm")


def test_an_empty_folder_has_no_table(tmp_path):
    with pytest.raises(DataError, match="no finished run"):
        report(tmp_path, "svm", {})


def test_a_choice_is_the_method_that_is_best_on_the_validation_pixels_of_a_division():
    def run(method, seed, validation, test, walk=False, kind="blocks"):
        scores = {
            part: Scores(oa, oa, None, (oa,), np.ones((1, 1)))
            for part, oa in (("validation", validation), ("test", test))
        }
        facts = {"kind": kind, "labels": 5, "seconds": 10.0 * seed + len(method), "random_walk": walk}
        facts["transductive"] = walk or method == "transduced"
        return RunResult(f"{method} + random walk" if walk else method, seed, f"{kind}{seed}", 0.0, scores, facts)

    results = [
        run("net", 1, 0.6, 0.11), run("svm", 1, 0.7, 0.12), run("transduced", 1, 0.9, 0.13),
        # of equals the first
        run("svm", 2, 0.5, 0.21), run("net", 2, 0.5, 0.22),
        # with the walk another one may be better
        run("net", 1, 0.8, 0.31, walk=True), run("svm", 1, 0.7, 0.32, walk=True),
        # no division with both
        run("net", 3, 0.9, 0.41), run("svm", 3, 0.1, 0.42, kind="random"),
    ]  # fmt: skip
    found = chosen_runs(results, {"best": ["net", "svm"], "all": ["net", "svm", "transduced"]})
    told = [
        (one.method, one.seed, one.scores["test"].oa, one.facts["seconds"], one.facts["transductive"]) for one in found
    ]
    assert told == [
        ("best", 1, 0.12, 26.0, False),
        ("best", 2, 0.22, 46.0, False),
        ("best + random walk", 1, 0.31, 26.0, True),
        ("all", 1, 0.13, 46.0, True),
    ]
