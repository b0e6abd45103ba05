"""Encoders on small tasks: rows against scikit-learn, resuming, other bands, options that cannot work."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from sklearn.neighbors import KNeighborsClassifier

import vision_lowrank
from vision_lowrank.data.scene_tasks import scene_task
from vision_lowrank.errors import ConfigError, DataError
from vision_lowrank.evaluation.benchmark_rows import read_rows
from vision_lowrank.raster_benchmark import run_raster_benchmark
from vision_lowrank.results import main

SIDE, CLASSES = 48, 6
CARD = Path(vision_lowrank.__file__).parent / "assets" / "enmap_potsdam.yaml"
LESS = (
    "{_target_: vision_lowrank.models.encoders.LessEncoder, weights: null, "
    "model: {_target_: vision_lowrank.models.less_vit.LessViT, embed_dim: 32, depth: 1, num_heads: 4, patch_size: 2, "
    "radar: false}}"
)
QUICK = [
    "benchmark.seeds=[0]",
    "benchmark.protocols.linear.epochs=2",
    "benchmark.protocols.finetune.epochs=2",
    "benchmark.protocols.adapter.epochs=1",
    "benchmark.protocols.adapter.learning_rates=[0.01]",
    f"benchmark.encoders.less_vit={LESS}",
    "~benchmark.encoders.less_vit_pretrained",
    "precision=32-true",
    "device=cpu",
]


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """A scene whose classes differ by their mean spectra."""
    folder = tmp_path_factory.mktemp("scene")
    generator = np.random.default_rng(0)
    labels = generator.integers(1, CLASSES + 1, (SIDE // 4, SIDE // 4)).repeat(4, 0).repeat(4, 1)
    spectra = generator.normal(size=(8, CLASSES + 1))
    image = spectra[:, labels] + 0.7 * generator.normal(size=(8, SIDE, SIDE))
    np.save(folder / "image.npy", image.astype(np.float32))
    np.save(folder / "labels.npy", labels)
    content = {
        "name": "painted", "title": "painted", "sensor": "none", "licence": "none", "citation": "none", "gsd": 5.0,
        "files": {
            "image": [{"path": "image.npy", "axes": "channels height width"}], "labels": [{"path": "labels.npy"}],
        },
        "shape": {"height": SIDE, "width": SIDE, "channels": 8},
        "bands": {"wavelengths": [450, 550, 650, 850, 950, 1200, 1600, 2200]},
        "classes": [{"name": f"c{index}", "colour": f"#0000{index:02x}"} for index in range(CLASSES)],
    }  # fmt: skip
    (folder / "painted.yaml").write_text(yaml.safe_dump(content))
    return folder / "painted.yaml"


@pytest.fixture
def configure(card, tmp_path, repository):
    def make(*overrides):
        scene = [
            f"tasks.{name}.{key}={value}"
            for name in ("classification", "segmentation")
            for key, value in (("card", card), ("root", card.parent), ("every", 1))
        ]
        with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
            return compose(
                "evaluate",
                [
                    *("benchmark=mini", f"runs_root={tmp_path}", f"benchmark.root={tmp_path}", *scene),
                    *("tasks.segmentation.side=8", *QUICK, *overrides),
                ],
            )

    return make


def test_all_protocols_are_measured_and_a_run_resumes(configure, card, capsys):
    folder = run_raster_benchmark(configure())
    rows = read_rows(folder / "results.csv")
    measured = {(row.task, row.protocol, row.encoder) for row in rows}
    frozen, trained = ["knn-5", "knn-20", "linear"], ["finetune", "adapter"]
    tasks = ["painted_classification", "painted_segmentation"]
    less, statistics = "less_vit 32 x 1 (random)", next(row.encoder for row in rows if row.weights == "none")
    expected = {(task, protocol, less) for task in tasks for protocol in frozen + trained}
    assert measured == expected | {(task, protocol, statistics) for task in tasks for protocol in frozen}
    for row in rows:
        assert row.low <= row.value <= row.high
        assert (row.weights == "random") == (row.encoder == less)
        assert (row.trainable_parameters == 0) == row.protocol.startswith("knn")
    assert len((folder / "table.md").read_text().splitlines()) == len(rows) + 2
    assert (folder / "cost.png").stat().st_size > 10_000

    # the row of neighbours on statistics of bands, with nothing of ours but the tiles
    data = scene_task(str(card), str(card.parent), "classification", side=4, seed=0)

    def described(samples):
        tiles = np.stack([samples[index]["image"].numpy().reshape(8, -1) for index in range(len(samples))])
        parts = (tiles.mean(2), tiles.std(2), tiles.min(2), tiles.max(2))
        return np.concatenate(parts, axis=1), [int(samples[index]["label"]) for index in range(len(samples))]

    train, test = described(data.train), described(data.test)
    found = KNeighborsClassifier(5, metric="cosine", weights=lambda distance: 1 + 1e-6 / (1 + distance)).fit(*train)
    (row,) = [row for row in rows if row.key[:3] == (tasks[0], "knn-5", statistics)]
    assert abs(row.value - np.mean(found.predict(test[0]) == np.array(test[1]))) < 2 / len(test[1])

    lines = (folder / "results.csv").read_bytes().splitlines(keepends=True)
    gone = [lines[2], lines[-1]]
    (folder / "results.csv").write_bytes(b"".join(line for line in lines if line not in gone))
    for path in (folder / "features").iterdir():
        with np.load(path) as file:
            content = dict(file)
        assert 0 < content["seconds"] < max(row.seconds for row in rows)
        np.savez(path, **{**content, "seconds": 1e6})
    run_raster_benchmark(configure(f"resume={folder}"))
    again = read_rows(folder / "results.csv")
    assert {row.key: row.value for row in again} == {row.key: row.value for row in rows}
    # features that were kept count with the seconds that they took, of training and of test samples
    (repeated,) = [row for row in again if row.key == rows[1].key]
    assert rows[1].seconds < 1e6
    assert 2e6 < repeated.seconds < 3e6
    table = (folder / "table.md").read_text()

    capsys.readouterr()
    assert main([str(folder / "results.csv"), "--out", str(folder / "second")]) == 0
    assert (folder / "second" / "table.md").read_text() == table
    assert main([str(folder / "results.csv")] * 2) == 2
    assert "one result, which may not count twice" in capsys.readouterr().err
    assert main([str(folder / "nothing.csv")]) == 2
    assert "nothing.csv: not found" in capsys.readouterr().err


def test_tasks_of_satellite_tiles_are_measured_where_these_are(configure, shared_path, caplog):
    only = ("~tasks.classification", "~benchmark.protocols.linear", "~benchmark.protocols.finetune",
            "~benchmark.protocols.adapter", "~benchmark.encoders.less_vit")  # fmt: skip
    run_raster_benchmark(configure(*only))
    for task in ("enmap_classification", "enmap_segmentation"):
        assert f"task {task} is left out: put images/*.tif, labels/*.tif under these names" in caplog.text
    with pytest.raises(DataError, match="none of the tasks enmap_classification, enmap_segmentation has its files"):
        run_raster_benchmark(configure(*only, "~tasks.segmentation"))

    folder = shared_path("data", "enmap_potsdam").parent
    caplog.clear()
    rows = read_rows(
        run_raster_benchmark(configure(*only, "~tasks.segmentation", f"benchmark.root={folder}")) / "results.csv"
    )
    assert {(row.task, row.protocol) for row in rows} == {
        (f"enmap_potsdam_{kind}", f"knn-{k}") for kind in ("classification", "segmentation") for k in (5, 20)
    }
    assert "left out: put" not in caplog.text
    # better than to call everything a tree, the most frequent class
    (row,) = [row for row in rows if row.key[:2] == ("enmap_potsdam_classification", "knn-5")]
    data = scene_task(str(CARD), str(folder), "classification", side=4, seed=0, every=20)
    truth = np.array([int(data.test[index]["label"]) for index in range(len(data.test))])
    assert len(data.wavelengths) == 11
    assert row.value > np.bincount(truth).max() / len(truth)


def test_other_bands_are_tested_without_training_on_them(configure):
    config = configure(
        "benchmark.bands={train: [400, 1000], test: [[1000, 2500], [400, 2500]]}", "~benchmark.encoders.band_statistics"
    )
    rows = read_rows(run_raster_benchmark(config) / "results.csv")
    assert {row.split for row in rows} == {
        "blocks, 400-1000 nm only", "blocks, 400-1000 nm to 1000-2500 nm", "blocks, 400-1000 nm to 400-2500 nm",
    }  # fmt: skip
    by_split = {}
    for row in rows:
        by_split.setdefault(row.split, set()).add((row.task, row.protocol))
    assert len(set(map(frozenset, by_split.values()))) == 1
    for protocol in ("finetune", "linear"):
        values = {
            row.split: row.value for row in rows if (row.task, row.protocol) == ("painted_classification", protocol)
        }
        assert len(values) == 3
        assert len(set(values.values())) > 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+benchmark.protocols.zero={}", "protocols has zero"),
        ("benchmark.seeds=[]", "at least one entry"),
        ("devices=2", "devices=2: this benchmark computes on one; run tasks or seeds by commands of their own"),
        ("benchmark.sensors=[radar]", "task classification has optical images only"),
        ("+benchmark.protocols.finetune.head=fpn", "finetune.head is 'fpn'; it can be linear, upernet, or null"),
        (f"+benchmark.encoders.again={LESS}", r"less_vit and again are both called less_vit 32 x 1 \(random\)"),
        ("benchmark.protocols.knn.neighbours=[5,500]", "neighbours has 500: classification has"),
        ("weights=somewhere", "has none to load"),
        ("benchmark.fractions=[0.1]", "task classification has none"),
        ("benchmark.split=grouped", "benchmark.split=grouped: task classification has its own; use cards of tasks"),
        ("benchmark.bands={train: [400, 1000], test: [[1000, 2500]]}", "features of images"),
        ("benchmark.bands={train: [2300, 2500], test: []}", "no channel from 2300 to 2500"),
    ],
)
def test_what_cannot_work_ends_before_work(configure, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        run_raster_benchmark(configure(override))
    assert not (tmp_path / "mini").exists()
