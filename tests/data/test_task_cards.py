"""Task cards: what the seven of the benchmark say, what a wrong one is told, and how their archives are fetched."""

import re
import shutil

import numpy as np
import pytest
import yaml

from vision_lowrank.data.__main__ import main
from vision_lowrank.data.cards import list_cards
from vision_lowrank.data.download import fetch
from vision_lowrank.data.task_cards import TaskCard, is_task_card, list_task_cards, load_task_card
from vision_lowrank.errors import DataError, DownloadError

NAMES = ["bigearthnet", "dfc2020", "eurosat", "marida", "nlcd_l", "segmunich", "so2sat"]


@pytest.fixture
def make_card(tmp_path):
    """Writes a small valid card after a change; returns its path."""

    def make(**changes):
        card = {
            "name": "tiny",
            "title": "Tiny task",
            "kind": "classification",
            "metric": "accuracy",
            "sensor": "a random generator",
            "source": {"hub": "someone/tiny"},
            "archive": "tiny.zip",
            "disk": 1000,
            "folder": "tiny",
            "layouts": ["metadata_csv"],
            "values": "anything",
            "bands": [{"name": "red", "wavelength": 650, "mean": 1.0, "std": 2.0}, {"name": "nir", "wavelength": 850}],
            "gsd": 10,
            "classes": ["grass", "soil"],
            "protocol": {"crop": 8},
            "licence": "CC0",
            "citation": "nobody",
        }
        card["bands"][1] |= {"mean": 3.0, "std": 4.0}
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({**card, **changes}))
        return path

    return make


def test_the_seven_cards_open():
    assert list_task_cards() == NAMES
    assert not set(NAMES) & set(list_cards())
    for name in NAMES:
        card = load_task_card(name)
        assert isinstance(card, TaskCard)
        assert card.name == name
        assert card.source.hub.startswith("GFM-Bench/")
        assert card.wavelengths.dtype == np.float32
        assert (card.statistics() is None) == (name == "nlcd_l")
        assert "known" in card.notes or "Leak" in card.notes


@pytest.mark.parametrize(
    ("name", "kind", "metric", "bands", "classes", "gsd", "side", "crop", "scale", "fraction"),
    [
        ("eurosat", "classification", "accuracy", 13, 10, 10, 64, 64, 2, 1),
        ("bigearthnet", "multilabel", "micro_map", 12, 19, 10, 120, 112, 1, 0.1),
        ("so2sat", "classification", "accuracy", 10, 17, 10, 32, 32, 4, 0.1),
        ("segmunich", "segmentation", "macro_miou", 10, 13, 10, 128, 128, 1, 1),
        ("dfc2020", "segmentation", "macro_miou", 13, 8, 10, 96, 96, 1, 1),
        ("marida", "segmentation", "macro_miou", 11, 11, 10, 96, 96, 1, 1),
        ("nlcd_l", "segmentation", "macro_miou", 20, 21, 30, None, 128, 1, 1),
    ],
)
def test_cards_agree_with_the_published_numbers(name, kind, metric, bands, classes, gsd, side, crop, scale, fraction):
    card = load_task_card(name)
    assert (card.kind, card.metric, len(card.bands), len(card.classes)) == (kind, metric, bands, classes)
    assert (card.gsd, card.side) == (gsd, side)
    protocol = card.protocol
    assert (protocol.crop, protocol.scale, protocol.train_fraction, protocol.validation_fraction) == (
        crop,
        scale,
        fraction,
        fraction,
    )
    assert protocol.head == ("upernet" if kind == "segmentation" else "linear")


def numbers(text):
    return [float(number) for number in text.replace("−", "-").split(",")]


def test_statistics_are_those_of_the_specification(shared_path):
    text = shared_path("design", "less_vit.md").read_text()
    for name, start in (
        ("eurosat", r"\* EuroSAT"),
        ("bigearthnet", r"\* BigEarthNet S2"),
        ("so2sat", r"\* So2Sat"),
        ("dfc2020", r"\* DFC2020 S2"),
        ("marida", r"\* MARIDA"),
    ):
        mean, std = (numbers(found) for found in re.search(start + r" μ \[(.*?)\] σ \[(.*?)\]", text).groups())
        card = load_task_card(name)
        assert [band.mean for band in card.bands] == mean
        assert [band.std for band in card.bands] == std
    big, munich = (load_task_card(name).bands for name in ("bigearthnet", "segmunich"))
    kept = [(band.wavelength, band.mean, band.std) for band in big if band.name not in ("B08", "B09")]
    assert [(band.wavelength, band.mean, band.std) for band in munich] == kept


def test_wavelengths_follow_the_names_of_the_bands(shared_path):
    line = re.search(
        r"λ \[(442.7,.*?)\], bands B1…B8,B8A,B9,B10,B11,B12", shared_path("design", "less_vit.md").read_text()
    )
    names = [*(f"B{number}" for number in range(1, 9)), "B8A", *(f"B{number}" for number in range(9, 13))]
    centre = dict(zip(names, numbers(line[1]), strict=True))
    for name in set(NAMES) - {"nlcd_l"}:
        for band in load_task_card(name).bands:
            assert band.wavelength == centre[band.name.replace("B0", "B")], (name, band.name)
    assert [band.name for band in load_task_card("eurosat").bands][8:] == ["B9", "B10", "B11", "B12", "B8A"]


def test_landsat_wavelengths_lie_in_the_sensors_bands():
    # micrometres, by the handbooks of Landsat 7 and 8
    limits = {
        "ETM_B1": (0.45, 0.52), "ETM_B2": (0.52, 0.60), "ETM_B3": (0.63, 0.69), "ETM_B4": (0.77, 0.90),
        "ETM_B5": (1.55, 1.75), "ETM_B6_VCID_1": (10.4, 12.5), "ETM_B6_VCID_2": (10.4, 12.5), "ETM_B7": (2.09, 2.35),
        "ETM_B8": (0.52, 0.90), "OLI_B1": (0.43, 0.45), "OLI_B2": (0.45, 0.51), "OLI_B3": (0.53, 0.59),
        "OLI_B4": (0.64, 0.67), "OLI_B5": (0.85, 0.88), "OLI_B6": (1.57, 1.65), "OLI_B7": (2.11, 2.29),
        "OLI_B8": (0.50, 0.68), "OLI_B9": (1.36, 1.38), "TIRS_B10": (10.6, 11.19), "TIRS_B11": (11.5, 12.51),
    }  # fmt: skip
    bands = load_task_card("nlcd_l").bands
    assert [band.name for band in bands] == list(limits)
    for band in bands:
        low, high = limits[band.name]
        # in the middle half, so that no neighbour's centre passes
        assert abs(band.wavelength / 1000 - (low + high) / 2) <= (high - low) / 4


def test_label_values_are_those_of_the_specification():
    dfc = [255, *[0] * 5, *[1] * 2, 255, 255, 2, 3, 4, 5, 4, 255, 6, 7]
    marida = [255, *range(11), *[6] * 4]
    munich = {21: 1, 22: 2, 23: 3, 31: 4, 32: 6, 33: 7, 41: 8, 13: 9, 14: 10}
    for name, expected in (("dfc2020", dict(enumerate(dfc))), ("marida", dict(enumerate(marida)))):
        found = load_task_card(name).class_values
        assert {value: index for value, index in found.items() if isinstance(value, int)} == expected
    found = load_task_card("segmunich").class_values
    assert {value: index for value, index in found.items() if isinstance(value, int)} == munich | {
        n: n for n in range(13)
    }


def test_bigearthnet_unites_43_names_in_19():
    found = load_task_card("bigearthnet").class_values
    names = [entry.name for entry in load_task_card("bigearthnet").classes]
    original = {name for name in found if isinstance(name, str)} - (set(names) - {"Pastures", "Agro-forestry areas"})
    # these are the same in both, like pastures and agro-forestry
    same = {"Industrial or commercial units", "Complex cultivation patterns", "Broad-leaved forest",
            "Coniferous forest", "Mixed forest", "Beaches, dunes, sands",
            "Land principally occupied by agriculture, with significant areas of natural vegetation"}  # fmt: skip
    assert len(original | same) == 43
    assert names[found["Rice fields"]] == "Arable land"
    assert names[found["Peatbogs"]] == "Inland wetlands"
    assert names[found["Sclerophyllous vegetation"]] == "Moors, heathland and sclerophyllous vegetation"
    assert names[found["Coastal lagoons"]] == "Marine waters"
    assert found["Airports"] == 255


def test_parts_of_an_archive_are_in_order():
    files = [entry.path for entry in load_task_card("bigearthnet").archive.files()]
    assert len(files) == 26
    assert files[0] == "data/bigearthnet_part_aa"
    assert files[1] == "data/bigearthnet_part_ab"
    assert files[-1] == "data/bigearthnet_part_az"


def test_parts_go_on_after_z(make_card):
    card = load_task_card(make_card(archive={"path": "tiny_*", "parts": "ay-bb"}))
    assert [entry.path for entry in card.archive.files()] == ["tiny_ay", "tiny_az", "tiny_ba", "tiny_bb"]


def test_missing_knows_archives_parts_and_unpacked_folders(make_card, tmp_path):
    card = load_task_card(make_card(archive={"path": "part_*", "parts": "aa-ac"}))
    root = tmp_path / "data"
    (root / "tiny").mkdir(parents=True)
    (root / "tiny" / "part_aa").touch()
    (root / "part_ac").touch()
    assert [entry.path for entry in card.missing(root)] == ["part_ab"]
    assert card.how_to_get(card.missing(root), root) == (
        "get part_ab from https://huggingface.co/datasets/someone/tiny and put them under these names into "
        f"{root / 'tiny'}, or the unpacked folder tiny there"
    )
    (root / "tiny" / "tiny").mkdir()
    assert card.missing(root) == []
    assert card.unpacked(root) == root / "tiny"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "classificaton"}, "kind is 'classificaton', did you mean classification?; it can be classification"),
        ({"metric": "miou"}, "metric is 'miou'"),
        ({"metric": "macro_miou"}, "metric is 'macro_miou'; it can be accuracy"),
        ({"layouts": ["csv"]}, "layouts is 'csv'"),
        ({"layouts": []}, "layouts lists that are not empty"),
        ({"name": "a/b"}, "name 'a/b' is also a folder's"),
        ({"archive": "../tiny.zip"}, "path ../tiny.zip must be relative"),
        ({"folder": "/tiny"}, "path /tiny must be relative"),
        ({"archive": {"path": "tiny_*", "parts": "1-3"}}, "archive.parts is '1-3'; write 'aa-az'"),
        ({"archive": {"path": "tiny_*", "parts": "aa-ab", "size": 3}}, "archive in parts with sha256 or size"),
        ({"gsd": 0}, "gsd and disk must be above 0"),
        ({"bands": [{"name": "red", "wavelength": 0.65}]}, "look like micrometres"),
        ({"bands": [{"name": "red", "wavelength": 650, "mean": 1}]}, "mean and std of some bands only"),
        ({"bands": [{"name": "red", "wavelength": 650, "mean": 1, "std": 0}]}, "std of band red is not above 0"),
        ({"bands": [{"name": "red", "wavelength": 650}] * 2}, "band names must differ, found twice: red"),
        ({"classes": ["grass", {"name": "soil", "values": [0]}]}, "found twice: 0"),
        ({"classes": ["grass", "soil"], "ignore": [1]}, "ignored values must differ, found twice: 1"),
        ({"classes": [{"name": "grass", "colour": "green"}]}, "colour 'green' of class grass"),
        ({"group": "("}, "group '(' is no regular expression"),
        ({"group": "a+"}, "group 'a+' needs one pair of brackets"),
        ({"disc": 4}, "unknown key disc, did you mean disk?"),
        ({"radar": [{"name": "VV", "code": 5500, "mean": -12, "std": 0}]}, "std of band VV is not above 0"),
        ({"radar": [{"name": one, "code": 1, "mean": 0, "std": 1} for one in "ab"]}, "radar codes must differ"),
        ({"protocol": {}}, "protocol.crop is missing"),
        ({"protocol": {"crop": 8, "head": "uppernet"}}, "head is 'uppernet'"),
        ({"kind": "classification", "protocol": {"crop": 8, "head": "upernet"}}, "head is 'upernet'; it can be linear"),
    ],
)
def test_a_wrong_card_is_told_what_to_mend(make_card, changes, message):
    path = make_card(**changes)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load_task_card(path)
    assert str(caught.value).startswith(f"card {path}: ")


def test_an_unknown_name_gets_a_proposal(make_card):
    with pytest.raises(DataError, match=r"task card eurosta: not found, did you mean eurosat\?"):
        load_task_card("eurosta")
    assert is_task_card("eurosat")
    assert not is_task_card("salinas")
    assert is_task_card(make_card())
    assert not is_task_card("no_such_file.yaml")


def test_fetch_states_the_disk_and_joins_nothing(hub, make_card, tmp_path, caplog):
    card = load_task_card(make_card(archive={"path": "data/part_*", "parts": "aa-ac"}, disk=30_000))
    hub.files = {f"data/part_{suffix}": suffix.encode() * 5000 for suffix in ("aa", "ab", "ac")}
    root = tmp_path / "data"
    with caplog.at_level("INFO"):
        fetched = fetch(card, root)
    assert fetched == [root / "tiny" / "data" / f"part_{suffix}" for suffix in ("aa", "ab", "ac")]
    assert [path.read_bytes() for path in fetched] == list(hub.files.values())
    assert hub.requests[0][2] == "/datasets/someone/tiny/resolve/main/data/part_aa"
    assert f"task tiny: about 0.0 GB to load into {root / 'tiny'}" in caplog.text
    assert fetch(card, root) == []


def test_fetch_refuses_before_the_first_byte_if_the_disk_is_small(hub, make_card, tmp_path, monkeypatch):
    card = load_task_card(make_card(disk=20_000))
    hub.files = {"tiny.zip": bytes(15_000)}
    usage = shutil.disk_usage(tmp_path)._replace(free=16_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DownloadError, match=r"task tiny: needs 20000 bytes, 16000 free in .*tiny; make room"):
        fetch(card, tmp_path)
    assert hub.requests == []
    # what an earlier call left counts
    (tmp_path / "tiny" / "tiny.zip.part").write_bytes(bytes(5_000))
    assert fetch(card, tmp_path) == [tmp_path / "tiny" / "tiny.zip"]
    assert hub.ranges() == [("tiny.zip", "bytes=5000-")]


def test_without_network_the_way_by_hand_is_told(no_network, make_card, tmp_path):
    with pytest.raises(DownloadError, match=r"task tiny: http.*tiny\.zip cannot be loaded .*get tiny\.zip from https"):
        fetch(load_task_card(make_card()), tmp_path)


@pytest.fixture
def run(capsys):
    def command(*arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, [line.strip() for line in captured.out.splitlines()], captured.err

    return command


def test_the_command_line_lists_and_shows_tasks(run, make_card, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    status, lines, _ = run("list", "tasks", "--root", tmp_path)
    assert status == 0
    assert [line.split()[0] for line in lines[1:]] == NAMES
    assert re.fullmatch(r"dfc2020 +DFC2020 \(GFM-Bench\) +segmentation +13 +8 +10\.6 GB +missing", lines[2])
    status, lines, _ = run("show", make_card(ignore=[7]), "--root", tmp_path)
    text = [" ".join(line.split()) for line in lines]
    assert status == 0
    assert "title Tiny task (tiny), classification, measured by accuracy" in text
    assert "nir 850 3 4" in text
    assert "1 soil 1" in text
    assert text[-1] == "1 files missing: repeat the command with fetch in place of show"
    status, _, errors = run("show", "eurosta")
    assert status == 2
    assert errors.startswith("error: dataset card eurosta: not found")
    assert "tasks: bigearthnet, dfc2020, eurosat" in errors
