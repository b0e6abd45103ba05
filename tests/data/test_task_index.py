"""Indices of tasks: every layout, what can be wrong with one, the copy that is kept, groups, and shares."""

import dataclasses
import json
import logging
import re

import numpy as np
import pytest
import torch
from task_archives import COUNTS, SIDE, SPLITS, Miniature, crops, samples_tiff, small

from vision_lowrank.data import task_index
from vision_lowrank.data.image_tasks import open_task
from vision_lowrank.data.task_cards import load_task_card
from vision_lowrank.data.task_index import Row, digest, group_of, regroup
from vision_lowrank.errors import DataError, SplitError

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


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


@pytest.mark.parametrize("name", ["eurosat-train.txt", "River_3.tif"])
def test_two_files_of_one_name_are_told(eurosat, name):
    files = lists_of_eurosat(eurosat)
    (first,) = [path for path in files if path.endswith(name)] or ["EuroSAT/River/River_3.tif"]
    files.update({first: b"x", f"old/{name}": b"y"})
    eurosat.members = lambda: files
    with pytest.raises(DataError, match=rf"{first} and old/{name} have one name, which tells samples apart"):
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


@pytest.mark.parametrize("label", ["[0, 0, 1, 0, 0]", "[1, 1]", "['Permanent crops', 'Permanent crops']"])
def test_a_vector_of_zeros_and_ones_is_not_taken_for_indices(tmp_path, label):
    card = load_task_card("bigearthnet")
    archive = dataclasses.replace(card.archive, path="set.zip", parts=None)
    made = Miniature(small(card, archive=archive), tmp_path, SIDE, COUNTS)
    made.rows[1]["label"] = label
    with pytest.raises(DataError, match=r"metadata\.csv line 3: label .* is there twice; list each class once"):
        made.open()


@pytest.mark.parametrize(("places", "told"), [((2, 7), 1), ((2, 5), 1), ((5, 8), 1), ((0, 1), 0), ((8, 9), 0)])
def test_tiles_in_several_subsets_are_told(eurosat, caplog, places, told):
    first, second = places
    eurosat.rows[second]["optical_path"] = eurosat.rows[first]["optical_path"]
    eurosat.open()
    image = eurosat.rows[first]["optical_path"]
    message = f"eurosat: {told} tiles for training and validation are held out too, or of an image of the test, first "
    assert (f"{message}EuroSAT/{image}; scores are too good" in caplog.text) == bool(told)
    assert ("held out too" in caplog.text) == bool(told)


def test_crops_of_an_image_of_the_test_are_told(tmp_path, caplog):
    made = crops("dfc2020", tmp_path, 4, 9)
    made.open()
    # those in training and validation are known
    assert "held out too" not in caplog.text
    row = made.rows[-1]
    name = "test/scene_p2_11.tif"
    made.files[name] = made.files.pop(row["optical_path"])
    row["optical_path"] = name
    made.open()
    assert "dfc2020: 9 tiles for training and validation are held out too, or of an image" in caplog.text


def test_an_archive_of_something_else_is_told(eurosat):
    eurosat.members = lambda: {"Euro/metadata.csv": b"x", "Euro/a.tif": b"y"}
    with pytest.raises(DataError, match=r"no EuroSAT/metadata\.csv or split lists inside, it holds Euro/a\.tif"):
        eurosat.open()


def test_the_index_is_kept_and_follows_the_data(dfc2020, monkeypatch):
    dfc2020.open()
    (kept,) = (dfc2020.root / "dfc2020" / ".cache").iterdir()
    assert re.fullmatch(r"index-[0-9a-f]{16}\.csv", kept.name)
    with monkeypatch.context() as patch:
        patch.setattr(task_index, "read_index", None)
        again = open_task(dfc2020.card, dfc2020.root)
    assert (len(again.train), len(again.validation), len(again.test)) == (4, 3, 3)
    dfc2020.rows = dfc2020.rows[1:]
    assert len(dfc2020.open().train) == 3


def test_a_folder_that_cannot_be_written_is_no_obstacle(dfc2020, monkeypatch, caplog):
    def refuse(*arguments):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(task_index, "write_csv", refuse)
    assert len(dfc2020.open().train) == 4
    assert "dfc2020: index not kept ([Errno 30] Read-only file system)" in caplog.text


def test_validation_may_be_written_out(eurosat):
    expected = eurosat.open().validation.images.tolist()
    for row in eurosat.rows:
        row["split"] = SPLITS[row["split"]]
    assert eurosat.open().validation.images.tolist() == expected


def test_whatever_the_card_says_of_files_and_labels_makes_other_samples(dfc2020):
    task, card = dfc2020.open(), dfc2020.card
    changes = (
        {"kind": "multilabel"}, {"folder": "other"}, {"layouts": ("eurosat_lists",)}, {"bands": card.bands[::-1]},
        {"radar": card.radar[::-1]}, {"side": 9}, {"classes": card.classes[::-1]}, {"ignore": card.ignore[1:]},
    )  # fmt: skip
    found = [digest(one, task.train.store) for one in (card, *(dataclasses.replace(card, **c) for c in changes))]
    assert len(set(found)) == len(found)
    coarser = dataclasses.replace(dfc2020.card, gsd=20.0)
    assert open_task(coarser, dfc2020.root).fingerprint != task.fingerprint
    assert open_task(coarser, dfc2020.root).test.fingerprint != task.test.fingerprint


def test_other_sizes_than_the_cards_are_logged(dfc2020, caplog):
    dfc2020.open()
    assert "dfc2020: 4 train samples, the card says 41537" in caplog.text


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


def test_grouped_comes_as_near_to_the_old_sizes_as_groups_allow():
    card = load_task_card("dfc2020")
    rows = [Row(f"x/scene{group}_{number}.tif", "") for group in range(4) for number in range(5)]
    for wanted, held in ((1, 5), (7, 5), (8, 10), (9, 10), (12, 10), (13, 15), (19, 15)):
        found = regroup(card, {"train": rows[wanted:], "validation": rows[:wanted], "test": []}, 0)
        assert (len(found["train"]), len(found["validation"])) == (20 - held, held)


def test_a_group_fits_whole_names_only():
    card = load_task_card("dfc2020")
    assert group_of(card, Row("x/scene_p1_3.tif", "")) == "scene_p1"
    assert group_of(card, Row("x/scene_p1_3_old.tif", "")) is None


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
        order = [whole.train.images.tolist().index(name) for name in task.train.images]
        assert order == sorted(order)
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
