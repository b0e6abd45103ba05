"""Benchmark tasks out of miniature archives: every value, both axis orders, splits, shares, and what can be wrong."""

import csv
import dataclasses
import io
import json
import logging
import pickle
import re
import tarfile
import zipfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rasterio.io import MemoryFile
from torch.utils.data import DataLoader

from vision_lowrank.data import image_tasks
from vision_lowrank.data.__main__ import main
from vision_lowrank.data.cards import CARDS_FOLDER
from vision_lowrank.data.download import fetch
from vision_lowrank.data.image_tasks import open_task, read_tiff
from vision_lowrank.data.task_cards import list_task_cards, load_task_card
from vision_lowrank.errors import ConfigError, DataError, SplitError

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

COUNTS = {"train": 4, "val": 3, "test": 3}
SPLITS = {"train": "train", "val": "validation", "test": "test"}
SIDE = 8


def samples_tiff(values, interleave="pixel"):
    """One page with the bands as samples; `values` are (bands, rows, columns)."""
    bands, rows, columns = values.shape
    with MemoryFile() as memory:
        profile = {"count": bands, "height": rows, "width": columns, "dtype": values.dtype, "interleave": interleave}
        with memory.open(driver="GTiff", **profile) as file:
            file.write(values)
        return memory.read()


def pages_tiff(values):
    """A page for each index of the first axis."""
    pages = [Image.fromarray(page) for page in np.ascontiguousarray(values)]
    buffer = io.BytesIO()
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    return buffer.getvalue()


WRITERS = (
    samples_tiff,
    lambda values: samples_tiff(values, "band"),
    pages_tiff,
    lambda values: pages_tiff(values.transpose(1, 2, 0)),
)


def csv_bytes(rows):
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def zip_files(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


class Miniature:
    """A task with a few tiles in the layout of its card; change `files`, `rows` or `card`, then `open()`."""

    def __init__(self, card, root, side, counts):
        self.card, self.root = card, root
        self.raw = yaml.safe_load((CARDS_FOLDER / "gfm_bench" / f"{card.name}.yaml").read_text())
        generator = np.random.default_rng(3)
        self.files, self.rows = {}, []
        self.images, self.labels = {split: [] for split in counts}, {split: [] for split in counts}
        known = [value for value in card.class_values if isinstance(value, int)]
        number = 0
        for split, count in counts.items():
            for _ in range(count):
                image = generator.integers(1, 60_000, (len(card.bands), side, side)).astype(np.uint16)
                if card.values.startswith("reflectance from 0 to 1"):
                    image = (image / 60_000).astype(np.float32)
                row = {"optical_path": f"optical/tile{number // 3}_{number % 3}.tif", "radar_path": "", "split": split}
                self.files[row["optical_path"]] = WRITERS[number % len(WRITERS)](image)
                if card.kind == "segmentation":
                    label = generator.choice(known, (side, side)).astype(np.uint8)
                    row["label_path"] = f"label/tile{number}.tif"
                    shapes = (samples_tiff(label[None]), pages_tiff(label[None]), pages_tiff(label[:, :, None]))
                    self.files[row["label_path"]] = shapes[number % 3]
                elif card.kind == "multilabel":
                    label = sorted(generator.choice(len(card.classes), 3, replace=False).tolist())
                    row["label"] = str([card.classes[index].name for index in label] if number % 2 else label)
                else:
                    label = number % len(card.classes)
                    row["label"] = card.classes[label].name if number % 2 else str(label)
                self.rows.append(row)
                self.images[split].append(image)
                self.labels[split].append(label)
                number += 1

    def members(self):
        """Every file of the archive by name."""
        files = {"metadata.csv": csv_bytes(self.rows), **self.files}
        return {f"{self.card.folder}/{name}": content for name, content in files.items()}

    def write(self):
        path = self.root / self.card.name / self.card.archive.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(zip_files(self.members()))

    def open(self, **options):
        self.write()
        return open_task(self.card, self.root, **options)


def small(card, **changes):
    """The card with other sizes, so that tests write kilobytes."""
    return dataclasses.replace(card, side=SIDE, disk=1000, **changes)


@pytest.fixture
def eurosat(tmp_path):
    return Miniature(small(load_task_card("eurosat")), tmp_path / "data", SIDE, COUNTS)


@pytest.fixture
def dfc2020(tmp_path):
    return Miniature(small(load_task_card("dfc2020")), tmp_path / "data", SIDE, COUNTS)


def expected_mask(name, raw):
    """Class indices by the specification's tables, written out independently of the cards."""
    tables = {
        "dfc2020": [255, 0, 0, 0, 0, 0, 1, 1, 255, 255, 2, 3, 4, 5, 4, 255, 6, 7],
        "marida": [255, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 6, 6, 6, 6],
    }
    if name in tables:
        return np.asarray(tables[name])[raw]
    if name == "segmunich":
        moved = {21: 1, 22: 2, 23: 3, 31: 4, 32: 6, 33: 7, 41: 8, 13: 9, 14: 10}
        return np.vectorize(lambda value: moved.get(value, value))(raw)
    legend = [0, 11, 12, 21, 22, 23, 24, 31, 41, 42, 43, 51, 52, 71, 72, 73, 74, 81, 82, 90, 95]
    return np.vectorize(legend.index)(raw)


@pytest.mark.parametrize("name", list_task_cards())
def test_every_task_goes_from_the_hub_to_samples(hub, tmp_path, name):
    card = dataclasses.replace(load_task_card(name), disk=1000)
    side = card.side or 24
    made = Miniature(card, tmp_path / "data", side, COUNTS)
    archive = zip_files(made.members())
    entries = card.archive.files()
    pieces = np.array_split(np.frombuffer(archive, np.uint8), len(entries))
    hub.files = {entry.path: bytes(piece) for entry, piece in zip(entries, pieces, strict=True)}
    assert len(fetch(card, made.root)) == len(entries) == (26 if name == "bigearthnet" else 1)
    task = open_task(card, made.root)

    assert (task.name, task.kind, task.metric, task.gsd) == (
        name,
        made.raw["kind"],
        made.raw["metric"],
        made.raw["gsd"],
    )
    np.testing.assert_array_equal(task.wavelengths, np.float32([band["wavelength"] for band in made.raw["bands"]]))
    assert len(task.classes) == len(made.raw["classes"])
    if name == "nlcd_l":
        pixels = np.stack(made.images["train"]).astype(np.float64)
        mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    else:
        mean, std = ([band[key] for band in made.raw["bands"]] for key in ("mean", "std"))
    mean, std = np.reshape(mean, (-1, 1, 1)), np.reshape(std, (-1, 1, 1))
    for split, attribute in SPLITS.items():
        samples = getattr(task, attribute)
        assert len(samples) == len(samples.groups) == COUNTS[split]
        for index, (image, label) in enumerate(zip(made.images[split], made.labels[split], strict=True)):
            sample = samples[index]
            shape = (len(card.bands), side, side)
            assert (sample["image"].dtype, tuple(sample["image"].shape)) == (torch.float32, shape)
            np.testing.assert_allclose(sample["image"].numpy(), (image - mean) / std, rtol=1e-4, atol=1e-4)
            assert torch.equal(sample["wavelengths"], torch.from_numpy(task.wavelengths))
            assert sample["gsd"] == made.raw["gsd"]
            assert sample["gsd"].dtype == torch.float32
            if card.kind == "classification":
                assert (int(sample["label"]), sample["label"].dtype) == (label, torch.int64)
            elif card.kind == "multilabel":
                assert sample["labels"].dtype == torch.float32
                assert torch.nonzero(sample["labels"]).flatten().tolist() == label
                assert len(sample["labels"]) == 19
            else:
                assert sample["mask"].dtype == torch.int64
                np.testing.assert_array_equal(sample["mask"].numpy(), expected_mask(name, label))
    first = open_task(card, made.root)
    assert first.fingerprint == task.fingerprint


def test_an_unpacked_folder_gives_the_same_samples(eurosat):
    packed = eurosat.open()
    for name, content in eurosat.members().items():
        path = eurosat.root / "eurosat" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (eurosat.root / "eurosat" / "EuroSAT.zip").unlink()
    unpacked = open_task(eurosat.card, eurosat.root)
    for one, other in zip(packed.test, unpacked.test, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert one["label"] == other["label"]


def test_a_tar_in_parts_is_unpacked_and_read(tmp_path):
    card = small(load_task_card("bigearthnet"))
    made = Miniature(card, tmp_path, SIDE, COUNTS)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in made.members().items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    pieces = np.array_split(np.frombuffer(buffer.getvalue(), np.uint8), 26)
    for entry, piece in zip(card.archive.files(), pieces, strict=True):
        (tmp_path / "bigearthnet" / entry.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bigearthnet" / entry.path).write_bytes(bytes(piece))
    task = open_task(card, tmp_path)
    assert torch.nonzero(task.test[2]["labels"]).flatten().tolist() == made.labels["test"][2]
    (tmp_path / "bigearthnet" / "data" / "bigearthnet_part_ac").unlink()
    with pytest.raises(DataError, match="task bigearthnet: 1 files not found; get data/bigearthnet_part_ac from"):
        open_task(card, tmp_path)


def test_workers_read_the_same_as_the_main_process(eurosat):
    task = eurosat.open()
    loader = DataLoader(task.train, batch_size=2, num_workers=2, multiprocessing_context="fork")
    images = torch.cat([batch["image"] for batch in loader])
    assert torch.equal(images, torch.stack([sample["image"] for sample in task.train]))
    # what a spawned worker gets
    assert torch.equal(pickle.loads(pickle.dumps(task.train))[3]["image"], images[3])


def test_the_real_files_have_the_order_of_the_card(shared_path, tmp_path):
    """The cirrus band is dark everywhere, and the narrow infrared band follows the vegetation's other ones."""
    source = shared_path("data", "rico_hdl_samples", "EuroSAT_MS")
    base = tmp_path / "eurosat"
    (base / "EuroSAT").mkdir(parents=True)
    for split, name in (("train", "AnnualCrop_1"), ("val", "Pasture_300"), ("test", "SeaLake_3000")):
        category = name.partition("_")[0]
        (base / "EuroSAT" / f"eurosat-{split}.txt").write_text(f"{name}.jpg\n")
        (base / "EuroSAT" / category).mkdir()
        (base / "EuroSAT" / category / f"{name}.tif").write_bytes((source / category / f"{name}.tif").read_bytes())
    card = load_task_card("eurosat")
    mean, std = ([getattr(band, key) for band in card.bands] for key in ("mean", "std"))
    names = [band.name for band in card.bands]
    task = open_task(card, tmp_path)
    for samples, label in ((task.train, 0), (task.validation, 5), (task.test, 9)):
        assert int(samples[0]["label"]) == label
        raw = samples[0]["image"].numpy() * np.reshape(std, (-1, 1, 1)) + np.reshape(mean, (-1, 1, 1))
        assert names[9] == "B10"
        assert mean[9] == pytest.approx(12.1, abs=0.05)
        assert 5 < raw[9].mean() < 20
        assert raw[9].max() < 25
        assert all(raw[index].mean() > 25 for index in range(13) if index != 9)
    for samples in (task.train, task.validation):
        similar = np.corrcoef(samples[0]["image"].numpy().reshape(13, -1))[names.index("B8A")]
        others = [index for index in range(13) if names[index] != "B8A"]
        assert names[max(others, key=lambda index: similar[index])] == "B7"
        assert similar[names.index("B12")] < 0.5


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_axes_are_told_by_the_number_of_bands(writer, dtype):
    values = np.random.default_rng(0).integers(0, 255, (3, 5, 5)).astype(dtype)
    found = read_tiff(writer(values), 3, "tile.tif")
    np.testing.assert_array_equal(found, values)
    assert found.dtype == dtype


@pytest.mark.parametrize(
    ("shape", "channels", "message"),
    [
        ((3, 5, 5), 4, "tile.tif: 3 x 5 x 5, neither bands x side x side nor side x side x bands with 4 bands"),
        ((3, 5, 6), 3, "tile.tif: 3 x 5 x 6, neither"),
        ((5, 5, 5), 5, "tile.tif: 5 x 5 x 5, cannot tell bands from rows with 5 bands"),
    ],
)
def test_other_shapes_are_refused(shape, channels, message):
    for write in (samples_tiff, pages_tiff):
        with pytest.raises(DataError, match=message):
            read_tiff(write(np.zeros(shape, np.uint16)), channels, "tile.tif")


def test_what_is_no_tiff_is_named():
    whole = samples_tiff(np.random.default_rng(0).integers(0, 9, (3, 50, 50)).astype(np.uint16))
    disguised = b'<VRTDataset rasterXSize="5" rasterYSize="5"><VRTRasterBand dataType="Byte" band="1"/></VRTDataset>'
    for content in (b"", b"hello", whole[:200], whole[:9_000], disguised):
        with pytest.raises(DataError, match=r"tile\.tif: no TIFF, or damaged"):
            read_tiff(content, 3, "tile.tif")


def lists_of_eurosat(made):
    """The archive in the earlier layout: lists of names, files below folders of classes."""
    files, lists = {}, dict.fromkeys(COUNTS, "")
    for number, row in enumerate(made.rows):
        label = made.card.classes[number % len(made.card.classes)].name
        files[f"EuroSAT/{label}/{label}_{number}.tif"] = made.files[row["optical_path"]]
        lists[row["split"]] += f"{label}_{number}.jpg\n"
    return files | {f"eurosat-{split}.txt": text.encode() for split, text in lists.items()}


def test_lists_of_the_earlier_eurosat_layout(eurosat):
    expected = list(eurosat.open().validation)
    files = lists_of_eurosat(eurosat)
    eurosat.members = lambda: files
    found = eurosat.open()
    for one, other in zip(expected, found.validation, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert one["label"] == other["label"]
    files["eurosat-val.txt"] += b"River_77.jpg\n"
    with pytest.raises(DataError, match=r"1 files of the index are not there, first River_77\.tif"):
        eurosat.open()
    files["eurosat-val.txt"] = files["eurosat-val.txt"].replace(b"River_77", b"Lake_77")
    with pytest.raises(DataError, match=r"eurosat-val\.txt line 4: label 'Lake' is neither a class nor ignored"):
        eurosat.open()


def test_lists_of_the_earlier_bigearthnet_layout(tmp_path):
    card = dataclasses.replace(load_task_card("bigearthnet"), side=12)
    generator = np.random.default_rng(5)
    bands, base = {}, tmp_path / "bigearthnet" / "BigEarthNet"
    for split in COUNTS:
        folder = base / "BigEarthNet-v1.0" / f"S2_{split}"
        folder.mkdir(parents=True)
        (base / f"bigearthnet-{split}.csv").write_text(f"S2_{split},S1_{split}\n")
        names = ["Rice fields", "Vineyards", "Olive groves", "Airports"]
        (folder / f"S2_{split}_labels_metadata.json").write_text(json.dumps({"labels": names}))
        for band in card.bands:
            side = {"B01": 2, "B09": 2, "B02": 12, "B03": 12, "B04": 12, "B08": 12}.get(band.name, 6)
            bands[split, band.name] = generator.integers(1000, 5000, (1, side, side)).astype(np.uint16)
            (folder / f"S2_{split}_{band.name}.tif").write_bytes(samples_tiff(bands[split, band.name]))
    task = open_task(card, tmp_path)
    sample = task.train[0]
    assert [task.classes[index] for index in torch.nonzero(sample["labels"]).flatten()] == [
        "Arable land",
        "Permanent crops",
    ]
    for index, band in enumerate(card.bands):
        raw = torch.from_numpy(bands["train", band.name].astype(np.float32))[None]
        fine = torch.nn.functional.interpolate(raw, size=(12, 12), mode="bilinear")[0, 0]
        # whole numbers in the file, so half a unit is lost
        assert torch.allclose(sample["image"][index] * band.std + band.mean, fine, atol=0.6)
    (base / "BigEarthNet-v1.0" / "S2_val" / "S2_val_B12.tif").unlink()
    with pytest.raises(DataError, match=r"1 files of the index are not there, first BigEarthNet/.*/S2_val_B12\.tif"):
        open_task(card, tmp_path)


def test_label_files_of_names_in_metadata(tmp_path):
    made = Miniature(small(load_task_card("bigearthnet")), tmp_path, SIDE, COUNTS)
    for number, row in enumerate(made.rows):
        row["label_path"] = f"json/{number}.json"
        made.files[row["label_path"]] = json.dumps({"labels": ["Peatbogs", "Dump sites"]}).encode()
        del row["label"]
    base = tmp_path / "bigearthnet"
    for name, content in made.members().items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(content)
    task = open_task(made.card, tmp_path)
    assert [torch.nonzero(sample["labels"]).flatten().tolist() for sample in task.test] == [[15]] * 3


def test_missing_values_become_the_mean(tmp_path):
    made = Miniature(small(load_task_card("marida")), tmp_path, SIDE, COUNTS)
    image = made.images["train"][0]
    image[2, 3, 4], image[0, 0, 0], image[1, 1, 1] = np.nan, np.inf, -np.inf
    made.files[made.rows[0]["optical_path"]] = samples_tiff(image)
    sample = made.open().train[0]["image"]
    assert sample[2, 3, 4] == sample[0, 0, 0] == sample[1, 1, 1] == 0
    assert sample.isfinite().all()
    assert (sample == 0).sum() == 3


def remove_column(made):
    for row in made.rows:
        del row["optical_path"]


def remove_labels(made):
    for row in made.rows:
        del row["label_path"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda made: made.rows[1].update(split="training"),
            "metadata.csv line 3: split 'training'; it can be train, val",
        ),
        (lambda made: made.rows.__setitem__(slice(4, 7), []), "no validation samples; get the archive again"),
        (
            lambda made: made.rows[0].update(label_path="label/none.tif"),
            "1 files .* not there, first DFC2020/label/none.tif",
        ),
        (lambda made: made.rows[0].update(optical_path="../x.tif"), "1 files of the index are not there, first x.tif"),
        (lambda made: made.rows[2].update(optical_path=""), "metadata.csv line 4: optical_path or label_path is empty"),
        (remove_column, "DFC2020/metadata.csv has no column optical_path, only radar_path, split, label_path"),
        (remove_labels, "DFC2020/metadata.csv has no column label_path, only optical_path, radar_path, split"),
    ],
)
def test_a_wrong_index_is_told_at_opening(dfc2020, change, message):
    change(dfc2020)
    with pytest.raises(DataError, match=message) as caught:
        dfc2020.open()
    assert "DFC2020.zip" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (dfc2020.root / "dfc2020" / ".cache").exists()


@pytest.mark.parametrize("label", ["Lake", "10", "-1", "[0, 1]", "3.5"])
def test_a_wrong_label_is_told_at_opening(eurosat, label):
    eurosat.rows[1]["label"] = label
    with pytest.raises(DataError, match=r"EuroSAT/metadata\.csv line 3: (label '|2 classes)"):
        eurosat.open()


def test_an_archive_of_something_else_is_told(eurosat):
    eurosat.members = lambda: {"Euro/metadata.csv": b"x", "Euro/a.tif": b"y"}
    with pytest.raises(DataError, match=r"no EuroSAT/metadata\.csv or split lists inside, it holds Euro/a\.tif"):
        eurosat.open()


def test_a_value_outside_the_classes_names_file_and_value(dfc2020):
    mask = np.full((1, SIDE, SIDE), 3, np.uint8)
    mask[0, 2, 2] = 18
    dfc2020.files[dfc2020.rows[1]["label_path"]] = samples_tiff(mask)
    task = dfc2020.open()
    with pytest.raises(DataError, match=r"DFC2020\.zip: DFC2020/label/tile1\.tif: value 18 is neither a class nor ign"):
        task.train[1]
    assert task.train[0]["mask"].shape == (SIDE, SIDE)


def test_tiles_of_another_size_or_band_count_are_refused(dfc2020):
    names = [row["optical_path"] for row in dfc2020.rows]
    dfc2020.files[names[0]] = samples_tiff(np.zeros((12, SIDE, SIDE), np.uint16))
    dfc2020.files[names[1]] = samples_tiff(np.zeros((13, 10, 10), np.uint16))
    dfc2020.files[dfc2020.rows[2]["label_path"]] = samples_tiff(np.ones((1, 6, 6), np.uint8))
    task = dfc2020.open()
    for index, message in (
        (0, "12 x 8 x 8, neither"),
        (1, "has a side of 10 pixels, the card says 8"),
        (2, r"label/tile2\.tif is \(6, 6\), DFC2020/optical/tile0_2\.tif \(8, 8\)"),
    ):
        with pytest.raises(DataError, match=message):
            task.train[index]


def test_the_index_is_kept_and_follows_the_data(dfc2020, monkeypatch):
    dfc2020.open()
    (kept,) = (dfc2020.root / "dfc2020" / ".cache").iterdir()
    assert re.fullmatch(r"index-[0-9a-f]{16}\.csv", kept.name)
    with monkeypatch.context() as patch:
        patch.setattr(image_tasks, "read_index", None)
        again = open_task(dfc2020.card, dfc2020.root)
    assert (len(again.train), len(again.validation), len(again.test)) == (4, 3, 3)
    dfc2020.rows = dfc2020.rows[1:]
    assert len(dfc2020.open().train) == 3


def test_a_folder_that_cannot_be_written_is_no_obstacle(dfc2020, monkeypatch, caplog):
    def refuse(*arguments):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(image_tasks, "write_csv", refuse)
    assert len(dfc2020.open().train) == 4
    assert "dfc2020: index not kept ([Errno 30] Read-only file system)" in caplog.text


def test_other_sizes_than_the_cards_are_logged(dfc2020, caplog):
    dfc2020.open()
    assert "dfc2020: 4 train samples, the card says 41537" in caplog.text


def test_statistics_are_measured_once_without_missing_values(tmp_path, monkeypatch):
    made = Miniature(
        dataclasses.replace(load_task_card("nlcd_l"), values="reflectance from 0 to 1"), tmp_path, 24, COUNTS
    )
    made.images["train"][1][4, :5] = np.nan
    made.files[made.rows[1]["optical_path"]] = samples_tiff(made.images["train"][1])
    task = made.open()
    pixels = np.stack(made.images["train"]).astype(np.float64)
    mean, std = np.nanmean(pixels, (0, 2, 3)), np.nanstd(pixels, (0, 2, 3))
    expected = (made.images["test"][0] - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(task.test[0]["image"].numpy(), expected, atol=1e-5)
    monkeypatch.setattr(image_tasks, "read_image", None)
    assert open_task(made.card, tmp_path).fingerprint == task.fingerprint


def test_a_constant_band_cannot_be_normalised(tmp_path):
    made = Miniature(
        dataclasses.replace(load_task_card("nlcd_l"), values="reflectance from 0 to 1"), tmp_path, 24, COUNTS
    )
    for row, image in zip(made.rows, made.images["train"], strict=False):
        image[7] = 0.1
        made.files[row["optical_path"]] = samples_tiff(image)
    with pytest.raises(DataError, match="bands ETM_B7 are constant in training"):
        made.open()


def crops(name, root, images, held):
    """A task whose training and validation are nine crops of each image, mixed; `held` of them validate."""
    made = Miniature(small(load_task_card(name)), root, SIDE, {"train": images * 9 - held, "val": held, "test": 3})
    order = np.random.default_rng(0).permutation(images * 9)
    for number, row in zip(order, made.rows, strict=False):
        content = made.files.pop(row["optical_path"])
        row["optical_path"] = f"{row['split']}/scene_p{number // 9}_{number % 9}.tif"
        made.files[row["optical_path"]] = content
    return made


def test_grouped_keeps_crops_of_one_image_together(tmp_path):
    made = crops("dfc2020", tmp_path, 5, 10)
    published = made.open()
    assert set(published.train.groups) & set(published.validation.groups)
    assert published.train.groups[0].startswith("scene_p")
    drawn = [open_task(made.card, tmp_path, split="grouped", seed=seed) for seed in range(4)]
    for task in drawn:
        assert not set(task.train.groups) & set(task.validation.groups)
        assert (len(task.train), len(task.validation), len(task.test)) == (36, 9, 3)
    after, before = (
        sorted(sample["image"].numpy().tobytes() for part in (task.train, task.validation) for sample in part)
        for task in (drawn[0], published)
    )
    assert after == before
    different = {frozenset(task.validation.groups) for task in drawn}
    assert len({task.fingerprint for task in [*drawn, published]}) == len(different) + 1 > 2
    again = open_task(made.card, tmp_path, split="grouped", seed=2)
    assert again.fingerprint == drawn[2].fingerprint
    assert again.validation.groups.tolist() == drawn[2].validation.groups.tolist()


def test_grouped_needs_groups(dfc2020, eurosat, caplog):
    with pytest.raises(SplitError, match="task eurosat: split grouped: the card has no `group`"):
        eurosat.open(split="grouped")
    for row in dfc2020.rows:
        name = row["optical_path"].replace("_", "")
        dfc2020.files[name] = dfc2020.files.pop(row["optical_path"])
        row["optical_path"] = name
    with caplog.at_level(logging.WARNING):
        task = dfc2020.open()
    assert "each is its own group" in caplog.text
    assert len(set(task.train.groups)) == 4
    with pytest.raises(SplitError, match=r"does not fit DFC2020/optical/tile00\.tif"):
        dfc2020.open(split="grouped")
    dfc2020.card = dataclasses.replace(dfc2020.card, group="(tile).*")
    with pytest.raises(SplitError, match="one group in all, tile"):
        dfc2020.open(split="grouped")


def test_a_fraction_keeps_every_class_and_grows_with_the_share(tmp_path):
    made = Miniature(small(load_task_card("so2sat")), tmp_path, SIDE, {"train": 17 * 10, "val": 2, "test": 2})
    whole = made.open()
    sizes = {}
    for fraction in (0.001, 0.1, 0.3, 1.0):
        task = open_task(made.card, tmp_path, fraction=fraction, seed=1)
        labels = np.bincount([int(sample["label"]) for sample in task.train], minlength=17)
        sizes[fraction] = set(task.train.groups)
        assert labels.tolist() == [max(1, round(fraction * 10))] * 17
        assert (len(task.validation), len(task.test)) == (2, 2)
    assert sizes[0.001] == sizes[0.1] < sizes[0.3] < sizes[1.0]
    other = open_task(made.card, tmp_path, fraction=0.3, seed=2)
    assert set(other.train.groups) != sizes[0.3]
    assert other.fingerprint != whole.fingerprint


def test_a_fraction_takes_whole_images(tmp_path):
    made = crops("marida", tmp_path, 6, 9)
    made.open()
    for fraction, groups in ((0.01, 1), (0.5, 3), (1.0, 6)):
        task = open_task(made.card, tmp_path, split="published", fraction=fraction)
        whole = open_task(made.card, tmp_path)
        assert abs(len(set(task.train.groups)) - groups) <= 1
        for group in set(task.train.groups):
            assert (task.train.groups == group).sum() == (whole.train.groups == group).sum()
        assert abs(len(task.train) - fraction * len(whole.train)) <= 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "groupd"}, "split is 'groupd', did you mean grouped"),
        ({"fraction": 0.0}, "fraction is 0.0"),
        ({"fraction": 10}, "fraction is 10"),
    ],
)
def test_wrong_options_are_told(options, message):
    with pytest.raises(ConfigError, match=message):
        open_task("eurosat", "nowhere", **options)


def test_a_missing_archive_is_told_with_the_way_to_get_it(tmp_path):
    with pytest.raises(DataError, match=r"task so2sat: 1 files not found; get So2Sat\.zip from https://huggingface"):
        open_task("so2sat", tmp_path)


def test_the_command_line_checks_a_task(eurosat, capsys, tmp_path):
    eurosat.write()
    text = (CARDS_FOLDER / "gfm_bench" / "eurosat.yaml").read_text()
    card = tmp_path / "eurosat.yaml"
    card.write_text(text.replace("side: 64", "side: 8"))
    assert main(["check", str(card), "--root", str(eurosat.root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(";")[0] for line in lines[:3]] == [
        "train: 4 samples in 4 groups",
        "validation: 3 samples in 3 groups",
        "test: 3 samples in 3 groups",
    ]
    assert "3 read, 13 x 8 x 8, normalised mean" in lines[1]
    assert lines[-1] == "eurosat: files and card agree"
    assert main(["check", "eurosat", "--root", str(eurosat.root)]) == 2
    assert "has a side of 8 pixels, the card says 64" in capsys.readouterr().err
