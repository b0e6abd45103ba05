"""Benchmark tasks out of miniature archives: every value, both axis orders, and what can be wrong with a tile."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from task_archives import COUNTS, SIDE, SPLITS, WRITERS, Miniature, expected_mask, pages_tiff, samples_tiff, small
from torch.utils.data import DataLoader

from vision_lowrank.data import image_tasks
from vision_lowrank.data.__main__ import main
from vision_lowrank.data.cards import CARDS_FOLDER
from vision_lowrank.data.download import fetch
from vision_lowrank.data.image_tasks import open_task, read_through
from vision_lowrank.data.task_cards import list_task_cards, load_task_card
from vision_lowrank.data.task_tiles import read_tiff
from vision_lowrank.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


@pytest.mark.parametrize("name", list_task_cards())
def test_every_task_goes_from_the_hub_to_samples(hub, tmp_path, name):
    card = dataclasses.replace(load_task_card(name), disk=1000)
    side = card.side or 24
    made = Miniature(card, tmp_path / "data", side, COUNTS)
    hub.files = made.served()
    assert len(fetch(card, made.root)) == len(hub.files) == (26 if name == "bigearthnet" else 1)
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


@pytest.mark.parametrize("sensors", [["radar"], ["radar", "optical"]])
def test_radar_comes_last_with_its_codes(dfc2020, sensors):
    """By the specification: dummy wavelengths, means and deviations in decibels."""
    dfc2020.write()
    task = open_task(dfc2020.card, dfc2020.root, sensors=sensors)
    assert task.wavelengths[-2:].tolist() == [5500, 5700]
    assert (task.radar, len(task.wavelengths)) == (2, 2 if sensors == ["radar"] else 15)
    mean, std = np.array([-12.54847273, -20.19237134]), np.array([5.25697717, 5.91150917])
    optical = open_task(dfc2020.card, dfc2020.root)
    assert (optical.radar, len(optical.wavelengths)) == (0, 13)
    assert optical.test.fingerprint != task.test.fingerprint
    for index, values in enumerate(dfc2020.radar["test"]):
        image = task.test[index]["image"]
        expected = (values - mean[:, None, None]) / std[:, None, None]
        np.testing.assert_allclose(image[-2:].numpy(), expected, atol=1e-5)
        if len(image) > 2:
            assert torch.equal(image[:13], optical.test[index]["image"])


def test_radar_that_is_not_there_is_told(dfc2020, eurosat):
    dfc2020.files[dfc2020.rows[4]["radar_path"]] = samples_tiff(np.zeros((3, SIDE, SIDE), np.float32))
    dfc2020.write()
    read_through(dfc2020.card, dfc2020.root, 0)
    with pytest.raises(DataError, match=r"DFC2020/radar/tile4\.tif: 3 x 8 x 8, neither .*with 2 bands"):
        read_through(dfc2020.card, dfc2020.root, 0, ["optical", "radar"])
    del dfc2020.files[dfc2020.rows[4]["radar_path"]]
    with pytest.raises(DataError, match=r"1 files of the index are not there, first DFC2020/radar/tile4\.tif"):
        dfc2020.open()
    for row in dfc2020.rows[2:5]:
        row["radar_path"] = ""
    assert len(dfc2020.open().wavelengths) == 13
    with pytest.raises(DataError, match=r"DFC2020\.zip: 3 samples without radar; use sensors=\[optical\]"):
        dfc2020.open(sensors=["radar"])
    with pytest.raises(ConfigError, match=r"task eurosat has no radar images; use sensors=\[optical\]"):
        eurosat.open(sensors=["radar"])
    with pytest.raises(ConfigError, match=r"sensors=\['sar'\]: give optical or radar, or both"):
        eurosat.open(sensors=["sar"])


def test_radar_folders_of_the_original(tmp_path):
    """One TIFF a band of either sensor; the second column names the folder of the radar tile."""
    card = small(load_task_card("bigearthnet"))
    made = Miniature(card, tmp_path, SIDE, COUNTS)
    files, lists = {}, {"train": [], "val": [], "test": []}
    for number, row in enumerate(made.rows):
        split = row["split"]
        index = sum(other["split"] == split for other in made.rows[:number])
        lists[split].append(f"S2_{number},S1_{number}")
        for kind, bands, values in (("S2", card.bands, made.images), ("S1", card.radar, made.radar)):
            for band, plane in zip(bands, values[split][index], strict=True):
                files[f"BigEarthNet/{kind}/{kind}_{number}/{kind}_{number}_{band.name}.tif"] = samples_tiff(plane[None])
        label = json.dumps({"labels": [card.classes[made.labels[split][index][0]].name]})
        files[f"BigEarthNet/S2/S2_{number}/S2_{number}_labels_metadata.json"] = label.encode()
    for split, lines in lists.items():
        files[f"BigEarthNet/bigearthnet-{split}.csv"] = "\n".join(lines).encode()
    for name, content in files.items():
        path = tmp_path / "bigearthnet" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    task = open_task(card, tmp_path, sensors=["optical", "radar"])
    expected = (made.radar["test"][1] - np.array([-12.54847273, -20.19237134])[:, None, None]) / np.array(
        [5.25697717, 5.91150917]
    )[:, None, None]
    np.testing.assert_allclose(task.test[1]["image"][12:].numpy(), expected, atol=1e-5)
    (tmp_path / "bigearthnet" / "BigEarthNet" / "S1" / "S1_3" / "S1_3_VH.tif").unlink()
    with pytest.raises(DataError, match=r"1 files of the index are not there, first BigEarthNet/S1/S1_3/S1_3_VH\.tif"):
        open_task(card, tmp_path)


def test_the_record_of_the_files_is_that_of_a_copy_too(eurosat, tmp_path):
    """Sizes from the disk, the index written out, members that differ by one byte."""
    first = eurosat.open().files
    archive = eurosat.root / "eurosat" / "EuroSAT.zip"
    assert first["archive"] == {"EuroSAT.zip": archive.stat().st_size}
    lines = [
        f"{SPLITS[row['split']]}\0EuroSAT/{row['optical_path']}\0{label}\0\n"
        for split in ("train", "val", "test")
        for row, label in zip(
            (row for row in eurosat.rows if row["split"] == split), eurosat.labels[split], strict=True
        )
    ]
    assert first["index"] == hashlib.sha256("".join(lines).encode()).hexdigest()
    copy = tmp_path / "copy"
    shutil.copytree(eurosat.root / "eurosat", copy / "eurosat")
    assert open_task(eurosat.card, copy, fraction=0.5).files == first
    name = eurosat.rows[0]["optical_path"]
    eurosat.files[name] = eurosat.files[name][:-1] + bytes([eurosat.files[name][-1] ^ 1])
    changed = eurosat.open().files
    assert changed["index"] == first["index"]
    assert changed["members"] != first["members"]

    archive.unlink()
    for member, content in eurosat.members().items():
        path = eurosat.root / "eurosat" / member
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    folder = open_task(eurosat.card, eurosat.root).files
    os.utime(path, (1, 1))
    assert open_task(eurosat.card, eurosat.root).files == folder
    assert (folder["archive"], folder["index"]) == ({}, first["index"])


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


def test_compressed_pages_are_read_in_their_order():
    values = np.random.default_rng(0).integers(0, 255, (12, 5, 5)).astype(np.uint16)
    for array in (values, values.transpose(1, 2, 0)):
        first, *rest = [Image.fromarray(page) for page in np.ascontiguousarray(array)]
        buffer = io.BytesIO()
        first.save(buffer, "TIFF", save_all=True, append_images=rest, compression="tiff_lzw")
        np.testing.assert_array_equal(read_tiff(buffer.getvalue(), 12, "tile.tif"), values)


@pytest.mark.parametrize(
    ("shape", "channels", "message"),
    [
        ((3, 5, 5), 4, "tile.tif: 3 x 5 x 5, neither bands x side x side nor side x side x bands with 4 bands"),
        ((3, 5, 6), 3, "tile.tif: 3 x 5 x 6, neither"),
        ((6, 5, 3), 3, "tile.tif: 6 x 5 x 3, neither"),
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


def test_missing_values_become_the_mean(tmp_path):
    made = Miniature(small(load_task_card("marida")), tmp_path, SIDE, COUNTS)
    image = made.images["train"][0]
    image[2, 3, 4], image[0, 0, 0], image[1, 1, 1] = np.nan, np.inf, -np.inf
    made.files[made.rows[0]["optical_path"]] = samples_tiff(image)
    sample = made.open().train[0]["image"]
    assert sample[2, 3, 4] == sample[0, 0, 0] == sample[1, 1, 1] == 0
    assert sample.isfinite().all()
    assert (sample == 0).sum() == 3


@pytest.mark.parametrize(("dtype", "nodata"), [("uint16", 0), ("int16", -9999), ("float32", -9999), ("uint8", 255)])
@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("side", [None, 8])
def test_what_a_tiff_declares_to_mean_none_is_missing_in_images_alone(dtype, nodata, bands, side):
    values = np.random.default_rng(bands).integers(1, 99, (bands, 8, 8)).astype(dtype)
    values[np.random.default_rng(9).random(values.shape) < 0.3] = nodata
    expected = np.where(values == nodata, np.nan, values.astype(np.float64))
    content = samples_tiff(values, nodata=nodata)
    # a file a band is what is brought to a side
    found = read_tiff(content, bands, "tile.tif", None if bands > 1 else side, blank=True)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(read_tiff(content, bands, "tile.tif"), values)


def test_a_tile_is_not_normalised_by_what_means_none(tmp_path):
    made = Miniature(dataclasses.replace(load_task_card("nlcd_l"), values="0 to 60000"), tmp_path, 24, COUNTS)
    for row, image in zip(made.rows, made.images["train"], strict=False):
        image[:, :6] = 0
        made.files[row["optical_path"]] = samples_tiff(image, nodata=0)
    pixels = np.where(np.stack(made.images["train"]) == 0, np.nan, np.stack(made.images["train"]).astype(np.float64))
    mean, std = np.nanmean(pixels, (0, 2, 3)), np.nanstd(pixels, (0, 2, 3))
    expected = np.nan_to_num((pixels - mean[:, None, None]) / std[:, None, None])
    task = made.open()
    for sample, values in zip(task.train, expected, strict=True):
        np.testing.assert_allclose(sample["image"].numpy(), values, atol=1e-5)


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


def test_all_tiles_are_read_once(dfc2020, monkeypatch):
    dfc2020.write()
    read, original = [], image_tasks.read_image

    def watch(card, store, name):
        read.append(name)
        return original(card, store, name)

    monkeypatch.setattr(image_tasks, "read_image", watch)
    for _ in range(2):
        read_through(dfc2020.card, dfc2020.root, 0)
        assert sorted(read) == sorted(f"DFC2020/{row['optical_path']}" for row in dfc2020.rows)
    dfc2020.files[dfc2020.rows[9]["optical_path"]] = samples_tiff(np.zeros((13, SIDE, SIDE - 1), np.uint16))
    dfc2020.write()
    for _ in range(2):
        with pytest.raises(DataError, match=r"DFC2020/optical/tile3_0\.tif: 13 x 8 x 7, neither"):
            read_through(dfc2020.card, dfc2020.root, 0)
    assert len(read) == 30


@pytest.mark.parametrize(("split", "name"), SPLITS.items())
@pytest.mark.parametrize("kind", ["segmentation", "multilabel"])
def test_a_subset_without_any_label_is_told_before_anything_is_trained(dfc2020, tmp_path, kind, split, name):
    made = dfc2020
    if kind == "multilabel":
        card = load_task_card("bigearthnet")
        archive = dataclasses.replace(card.archive, path="set.zip", parts=None)
        made = Miniature(small(card, archive=archive), tmp_path, SIDE, COUNTS)
    rows = [row for row in made.rows if row["split"] == split]
    for row in rows:
        if kind == "multilabel":
            row["label"] = "[]"
        else:
            made.files[row["label_path"]] = samples_tiff(np.zeros((1, SIDE, SIDE), np.uint8))
    made.write()
    with pytest.raises(DataError, match=rf"\.zip: no {name} sample has a label; correct the card or the files"):
        read_through(made.card, made.root, 0)
    if kind == "multilabel":
        rows[1]["label"] = "[18]"
    else:
        mask = np.zeros((1, SIDE, SIDE), np.uint8)
        mask[0, 3, 5] = 17
        made.files[rows[1]["label_path"]] = samples_tiff(mask)
    made.write()
    read_through(made.card, made.root, 0)


def test_a_tile_below_the_crop_is_told_where_the_card_states_no_side(eurosat):
    crop = dataclasses.replace(eurosat.card.protocol, crop=SIDE)
    eurosat.card = dataclasses.replace(eurosat.card, side=None, protocol=crop)
    eurosat.files[eurosat.rows[8]["optical_path"]] = samples_tiff(np.ones((13, SIDE + 1, SIDE + 1), np.uint16))
    eurosat.write()
    read_through(eurosat.card, eurosat.root, 0)
    larger = dataclasses.replace(eurosat.card, protocol=dataclasses.replace(crop, crop=SIDE + 1))
    with pytest.raises(DataError, match=r"EuroSAT/optical/tile0_0\.tif has a side of 8 pixels, below .* crop of 9"):
        read_through(larger, eurosat.root, 0)
    eurosat.files[eurosat.rows[8]["optical_path"]] = samples_tiff(np.ones((13, SIDE - 1, SIDE - 1), np.uint16))
    eurosat.write()
    with pytest.raises(DataError, match=r"EuroSAT/optical/tile2_2\.tif has a side of 7 pixels, below .* crop of 8"):
        read_through(eurosat.card, eurosat.root, 0)


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
