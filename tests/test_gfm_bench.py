"""The seven tasks from a hub to rows of all protocols, shares and groups, a run that was cut off, and bad input."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from lightning import seed_everything
from sklearn.metrics import accuracy_score, average_precision_score, jaccard_score
from sklearn.metrics.pairwise import cosine_similarity
from task_archives import COUNTS, SIDE, Miniature, crops, expected_mask, samples_tiff, small, zip_files

from vision_lowrank.data.cards import CARDS_FOLDER
from vision_lowrank.data.task_cards import load_task_card
from vision_lowrank.errors import ConfigError, DataError, DownloadError
from vision_lowrank.evaluation.benchmark_rows import read_rows
from vision_lowrank.models.encoders import LessEncoder
from vision_lowrank.models.heads import UPerNetHead
from vision_lowrank.models.less_vit import LessViT
from vision_lowrank.raster_benchmark import run_raster_benchmark
from vision_lowrank.tasks.raster_tasks import RasterTask

pytestmark = [
    pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
    # a class that is in every training sample, or in none, has nothing to fit
    pytest.mark.filterwarnings("ignore:Label .* is present in all training examples"),
]

PATCH = 16
TINY = {"embed_dim": 32, "depth": 1, "num_heads": 4}
QUICK = [
    "benchmark=gfm_bench",
    "benchmark.seeds=[0]",
    "benchmark.num_workers=0",
    "benchmark.protocols.knn.neighbours=[1,2]",
    *(f"benchmark.protocols.{name}.{option}" for name in ("linear", "finetune", "adapter") for option in (
        "learning_rates=[0.001]", "epochs=1", "batch_size=2",
    )),
    "benchmark.protocols.adapter.rank=2",
    *(f"benchmark.protocols.{name}.head=linear" for name in ("finetune", "adapter")),
    "model.model._target_=vision_lowrank.models.less_vit.LessViT",
    *(f"+model.model.{name}={value}" for name, value in TINY.items()),
    "precision=32-true",
    "device=cpu",
]  # fmt: skip
# by the specification: side of the files, side and pixel size that a model sees, share of the labels, metric
PUBLISHED = {
    "eurosat": (64, 128, 5.0, 1.0, "accuracy"),
    "bigearthnet": (120, 112, 10.0, 0.1, "micro_map"),
    "so2sat": (32, 128, 2.5, 0.1, "accuracy"),
    "segmunich": (128, 128, 10.0, 1.0, "macro_miou"),
    "dfc2020": (96, 96, 10.0, 1.0, "macro_miou"),
    "marida": (96, 96, 10.0, 1.0, "macro_miou"),
    "nlcd_l": (136, 128, 30.0, 1.0, "macro_miou"),
}


@pytest.fixture
def configure(tmp_path, repository):
    def make(task, *overrides):
        with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
            places = (f"tasks=[{task}]", f"benchmark.root={tmp_path / 'data'}", f"runs_root={tmp_path / 'runs'}")
            return compose("evaluate", [*QUICK, *places, *overrides])

    return make


def write_small_card(name, folder, **changes):
    """The card of a task as a user's file, with tiles of `SIDE` pixels."""
    content = yaml.safe_load((CARDS_FOLDER / "gfm_bench" / f"{name}.yaml").read_text())
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**content, "side": SIDE, "protocol": {"crop": SIDE}, **changes}))
    return path


def prepared(made, images, side):
    """Images as the published protocol has them: normalised, the middle cut out, or enlarged."""
    if all("mean" in band for band in made.raw["bands"]):
        mean, std = (np.array([band[key] for band in made.raw["bands"]]) for key in ("mean", "std"))
    else:
        pixels = np.stack(made.images["train"]).astype(np.float64)
        mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    values = (np.stack(images) - mean[:, None, None]) / std[:, None, None]
    values = torch.from_numpy(values.astype(np.float32))
    if side > values.shape[-1]:
        return torch.nn.functional.interpolate(values, size=(side, side), mode="bicubic")
    start = (values.shape[-1] - side) // 2
    return values[..., start : start + side, start : start + side]


def nearest_neighbour_score(made, side, gsd, train):
    """The metric of one neighbour, with nothing of the benchmark but the model: (classes predicted, truth) scored."""
    seed_everything(0, verbose=False)
    model = LessViT(patch_size=PATCH, radar=False, **TINY).eval()
    wavelengths = [band["wavelength"] for band in made.raw["bands"]]
    tokens = {}
    for split, images in (("train", [made.images["train"][index] for index in train]), ("test", made.images["test"])):
        with torch.no_grad():
            found = model.forward_features(prepared(made, images, side), wavelengths, gsd)
        # those of channels and places, without the model's own first row and column
        tokens[split] = found[:, 1:, 1:].mean(1).numpy()
    known = [made.labels["train"][index] for index in train]
    truth = made.labels["test"]
    if made.card.kind != "segmentation":
        features = {split: values.mean(1) for split, values in tokens.items()}
        chosen = [known[index] for index in cosine_similarity(features["test"], features["train"]).argmax(1)]
        if made.card.kind == "classification":
            return accuracy_score(truth, chosen)
        vectors = [
            [[float(k in one) for k in range(len(made.card.classes))] for one in part] for part in (truth, chosen)
        ]
        return average_precision_score(*map(np.array, vectors), average="micro")

    def cells(masks):
        start = (masks[0].shape[0] - side) // 2
        masks = np.stack([expected_mask(made.card.name, mask) for mask in masks])
        masks = masks[:, start : start + side, start : start + side]
        grid = masks.reshape(len(masks), side // PATCH, PATCH, side // PATCH, PATCH)
        return grid.swapaxes(2, 3).reshape(-1, PATCH**2)

    patches = {split: values.reshape(-1, values.shape[-1]) for split, values in tokens.items()}
    chosen = cells(known)[cosine_similarity(patches["test"], patches["train"]).argmax(1)].ravel()
    truth, known = cells(truth).ravel(), cells(known).ravel()
    chosen = np.where(chosen == 255, np.bincount(known[known != 255]).argmax(), chosen)
    labelled = truth != 255
    present = np.unique(truth[labelled])
    return jaccard_score(truth[labelled], chosen[labelled], labels=present, average="macro")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_task_goes_from_the_hub_to_rows_of_all_protocols(configure, hub, tmp_path, monkeypatch, name):
    side, seen_side, gsd, share, metric = PUBLISHED[name]
    # of a tenth of 20 images without groups, two are left; of the classes of So2Sat, one each
    counts = {**COUNTS, "train": 20} if name == "bigearthnet" else COUNTS
    # the other axis orders are slow to read, and tested with the reader
    made = Miniature(load_task_card(name), tmp_path / "data", side, counts, [samples_tiff])
    hub.files = made.served()
    free = shutil.disk_usage(tmp_path)._replace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    seen, read = set(), LessEncoder.forward_patch_features

    def watch(encoder, image, wavelengths, pixel):
        seen.add((*image.shape[1:], *torch.as_tensor(pixel).unique().tolist()))
        return read(encoder, image, wavelengths, pixel)

    monkeypatch.setattr(LessEncoder, "forward_patch_features", watch)
    folder = run_raster_benchmark(configure(name))
    assert seen == {(len(made.raw["bands"]), seen_side, seen_side, gsd)}
    assert sorted(file for file, _ in hub.ranges()) == sorted(hub.files)

    rows = {row.protocol: row for row in read_rows(folder / "results.csv")}
    assert set(rows) == {"knn-1", "knn-2", "linear", "finetune", "adapter"}
    for row in rows.values():
        assert (row.task, row.metric, row.fraction, row.split) == (name, metric, share, "published")
        assert (row.encoder, row.weights) == ("less_vit 32 x 1 (random)", "random")
        assert row.low - 1e-6 <= row.value <= row.high + 1e-6
    lengths = {len(np.load(path)["targets"]): np.load(path)["targets"] for path in (folder / "features").iterdir()}
    train = range(counts["train"])
    if name == "bigearthnet":
        # which two were drawn is told by their labels
        labels = [np.flatnonzero(labels).tolist() for labels in lengths[2]]
        train = [index for index in train if made.labels["train"][index] in labels]
        assert len(train) == 2
    assert rows["knn-1"].value == pytest.approx(nearest_neighbour_score(made, seen_side, gsd, train), abs=1e-6)
    width = (made.card.kind == "segmentation" and PATCH**2) or 1
    assert rows["linear"].trainable_parameters == len(made.card.classes) * width * 33


def test_segmentation_has_the_head_of_its_authors_unless_told(configure, tmp_path):
    made = Miniature(small(load_task_card("marida")), tmp_path / "data", SIDE, COUNTS)
    made.write()
    card = write_small_card("marida", tmp_path, protocol={"crop": SIDE, "head": "upernet"})
    options = ("model.model.patch_size=4", "~benchmark.protocols.knn", "benchmark.protocols.finetune.head=null")
    refuse(configure, tmp_path, card, ConfigError, "has 1 blocks; UPerNet takes maps from four", *options)
    folder = run_raster_benchmark(configure(card, *options, "model.model.depth=4"))
    rows = {row.protocol: row for row in read_rows(folder / "results.csv")}
    assert list(rows) == ["linear", "finetune-upernet", "adapter"]
    model = LessViT(patch_size=4, radar=False, **{**TINY, "depth": 4})
    model.reset_classifier(0)
    parts = (model, UPerNetHead([32] * 4, len(made.card.classes), 4))
    assert rows["finetune-upernet"].trainable_parameters == sum(p.numel() for part in parts for p in part.parameters())


@pytest.mark.parametrize(("sensors", "channels"), [(["radar"], 2), (["optical", "radar"], 15)])
def test_radar_alone_and_beside_the_optical_channels(configure, repository, tmp_path, monkeypatch, sensors, channels):
    made = Miniature(small(load_task_card("dfc2020")), tmp_path / "data", SIDE, COUNTS)
    made.write()
    card = write_small_card("dfc2020", tmp_path)
    options = ("model.model.patch_size=4", f"benchmark.sensors=[{','.join(sensors)}]")
    refuse(configure, tmp_path, card, ConfigError, "reads no radar; build it with model.model.radar=true", *options)
    bands = "benchmark.bands={train: [400, 1000], test: []}"
    refuse(configure, tmp_path, card, ConfigError, "which radar has none of; use sensors=", *options, bands)
    timm = ("model=timm_vit_small", "model.model_name=test_vit")
    protocols = [f"~benchmark.protocols.{name}" for name in ("linear", "finetune", "adapter")]
    with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
        places = (f"tasks=[{card}]", f"benchmark.root={tmp_path / 'data'}", f"runs_root={tmp_path / 'runs'}")
        quick = [one for one in QUICK if "model.model" not in one]
        config = compose("evaluate", [*quick, *places, *timm, options[1], *protocols])
    with pytest.raises(ConfigError, match="does not tell radar from optical channels"):
        run_raster_benchmark(config)

    seen, read = set(), LessViT.forward_features

    def watch(model, image, wavelengths, gsd, radar, radar_wavelengths):
        seen.add((0 if image is None else image.shape[1], radar.shape[1], *radar_wavelengths.unique().tolist()))
        return read(model, image, wavelengths, gsd, radar, radar_wavelengths)

    monkeypatch.setattr(LessViT, "forward_features", watch)
    options = (*options, "model.model.radar=true", "~benchmark.protocols.linear", "~benchmark.protocols.adapter")
    folder = run_raster_benchmark(configure(card, *options))
    assert seen == {(channels - 2, 2, 5500, 5700)}
    rows = read_rows(folder / "results.csv")
    assert [row.protocol for row in rows] == ["knn-1", "knn-2", "finetune"]
    assert {row.split for row in rows} == {"published, radar only" if channels == 2 else "published, with radar"}


def test_a_run_notes_its_files_and_does_not_go_on_with_others(configure, tmp_path):
    made = Miniature(small(load_task_card("eurosat")), tmp_path / "data", SIDE, COUNTS)
    made.write()
    card = write_small_card("eurosat", tmp_path)
    options = ("model.model.patch_size=4", *(f"~benchmark.protocols.{name}" for name in ("finetune", "adapter")))
    folder = run_raster_benchmark(configure(card, *options))
    noted = json.loads((folder / "provenance.json").read_text())
    assert noted["data"]["eurosat"]["archive"] == {
        "EuroSAT.zip": (tmp_path / "data" / "eurosat" / "EuroSAT.zip").stat().st_size
    }
    assert [len(noted["data"]["eurosat"][name]) for name in ("members", "index")] == [64, 64]
    assert noted["precision"] == "32-true"
    run_raster_benchmark(configure(card, *options, f"resume={folder}"))
    made.rows[0]["label"] = "River"
    made.write()
    with pytest.raises(ConfigError, match=r"its rows are of other files of eurosat; begin a new run"):
        run_raster_benchmark(configure(card, *options, f"resume={folder}"))


class PowerCut(BaseException):
    """What no handler of errors stops."""


def test_shares_of_whole_images_in_a_run_that_is_cut_off(configure, tmp_path, monkeypatch):
    made = crops("dfc2020", tmp_path / "data", 5, 10)
    # a second test image
    made.files["optical/other_0.tif"] = made.files[made.rows[-1]["optical_path"]]
    made.rows[-1]["optical_path"] = "optical/other_0.tif"
    made.write()
    card = write_small_card("dfc2020", tmp_path)
    options = (
        "benchmark.split=grouped", "benchmark.fractions=[0.5,1.0]", "model.model.patch_size=4",
        "benchmark.protocols.finetune.epochs=2", "benchmark.protocols.finetune.batch_size=16",
        "~benchmark.protocols.linear", "~benchmark.protocols.adapter",
    )  # fmt: skip
    whole = run_raster_benchmark(configure(card, *options))
    expected = read_rows(whole / "results.csv")
    assert [(row.fraction, row.protocol) for row in expected] == [
        (fraction, protocol) for fraction in (0.5, 1.0) for protocol in ("knn-1", "knn-2", "finetune")
    ]
    assert {row.split for row in expected} == {"grouped"}
    # four images of nine crops train, half of them two; the published 35 crops are of five images
    assert sorted(len(np.load(path)["targets"]) for path in (whole / "features").iterdir()) == [3, 18, 36]

    epochs = []

    def cut(task):
        epochs.append(task.current_epoch)
        if len(epochs) == 4:
            raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(RasterTask, "on_train_epoch_start", cut)
        with pytest.raises(PowerCut):
            run_raster_benchmark(configure(card, *options))
    assert epochs == [0, 1, 0, 1]
    (folder,) = (path for path in (tmp_path / "runs" / "gfm_bench").iterdir() if path != whole)
    assert [row.key for row in read_rows(folder / "results.csv")] == [row.key for row in expected[:5]]

    epochs.clear()
    with monkeypatch.context() as patch:
        patch.setattr(RasterTask, "on_train_epoch_start", cut)
        run_raster_benchmark(configure(card, *options, f"resume={folder}"))
    assert epochs == [1]

    def lasting(row):
        return row.key, row.value, row.low, row.high, row.chosen, row.further

    rows = read_rows(folder / "results.csv")
    assert list(map(lasting, rows)) == list(map(lasting, expected))
    (trial,) = folder.glob("fits/*-1-seed0/lr_*/finished.json")
    assert rows[-1].seconds >= json.loads(trial.read_text())["seconds"] > 0


@pytest.fixture
def dfc2020(tmp_path):
    return Miniature(small(load_task_card("dfc2020")), tmp_path / "data", SIDE, COUNTS)


def refuse(configure, tmp_path, task, error, message, *options):
    with pytest.raises(error, match=message) as caught:
        run_raster_benchmark(configure(task, *options))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()
    return str(caught.value)


def test_without_archive_and_network_the_way_by_hand_is_told(configure, no_network, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    told = refuse(configure, tmp_path, "bigearthnet", DownloadError, "task bigearthnet: .* cannot be loaded")
    parts = ", ".join(f"data/bigearthnet_part_a{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")
    assert f"get {parts} from https://huggingface.co/datasets/GFM-Bench/BigEarthNet" in told
    assert f"into {tmp_path / 'data' / 'bigearthnet'}" in told
    assert not list((tmp_path / "data" / "bigearthnet").iterdir())


def truncate(made):
    content = zip_files(made.members())
    made.write()
    (made.root / "dfc2020" / "data" / "DFC2020.zip").write_bytes(content[: len(content) // 2])


def lose_a_band(made):
    made.files[made.rows[3]["optical_path"]] = samples_tiff(np.zeros((12, SIDE, SIDE), np.uint16))
    made.write()


def snow_and_a_stranger(made):
    mask = np.full((1, SIDE, SIDE), 15, np.uint8)
    mask[0, 1, 1] = 18
    made.files[made.rows[9]["label_path"]] = samples_tiff(mask)
    made.write()


def lose_a_file(made):
    del made.files[made.rows[5]["label_path"]]
    made.write()


def lose_a_split(made):
    made.rows = [row for row in made.rows if row["split"] != "test"]
    made.write()


def join_test_images(made):
    made.rows[9]["optical_path"] = made.rows[8]["optical_path"]
    made.write()


@pytest.mark.parametrize(
    ("change", "workers", "message"),
    [
        (truncate, 0, r"DFC2020\.zip: zip archive damaged or cut off .*get it again"),
        (lose_a_band, 0, r"DFC2020\.zip: DFC2020/optical/tile1_0\.tif: 12 x 8 x 8, neither .*with 13 bands; correct"),
        (lose_a_band, 2, r"DFC2020\.zip: DFC2020/optical/tile1_0\.tif: 12 x 8 x 8, neither .*with 13 bands; correct"),
        (snow_and_a_stranger, 0, r"DFC2020/label/tile9\.tif: value 18 is neither a class nor ignored"),
        (lose_a_file, 0, r"1 files of the index are not there, first DFC2020/label/tile5\.tif"),
        (lose_a_split, 0, r"DFC2020\.zip: no test samples; get the archive again"),
        (join_test_images, 0, r"all test samples are of one group, so no interval"),
    ],
)
def test_damage_is_told_before_work(configure, tmp_path, dfc2020, change, workers, message):
    change(dfc2020)
    card = write_small_card("dfc2020", tmp_path)
    refuse(
        configure, tmp_path, card, DataError, message, "model.model.patch_size=4", f"benchmark.num_workers={workers}"
    )


def test_options_that_do_not_suit_the_data_are_told_before_work(configure, tmp_path):
    made = Miniature(small(load_task_card("eurosat")), tmp_path / "data", SIDE, COUNTS)
    made.write()
    card = write_small_card("eurosat", tmp_path)
    five = "benchmark.protocols.knn.neighbours=[1,5]"
    refuse(configure, tmp_path, card, ConfigError, "neighbours has 5: .* has 4 training images at a share of 1; ", five)
    (tmp_path / "copy").mkdir()
    both = f"{card},{write_small_card('eurosat', tmp_path / 'copy', gsd=20.0)}"
    refuse(configure, tmp_path, both, ConfigError, r"tasks: \S+copy/eurosat\.yaml is the second called eurosat; rename")
    small_tiles = write_small_card("eurosat", tmp_path, side=None, protocol={"crop": 12})
    refuse(configure, tmp_path, small_tiles, DataError, "a tile of 8 x 8 pixels has no middle of 12")
