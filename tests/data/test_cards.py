import copy
import dataclasses
import re
from typing import get_args, get_type_hints

import numpy as np
import pytest
from tensorly.datasets import load_indian_pines

from vision_lowrank.data.cards import DatasetCard, list_cards, load_card
from vision_lowrank.errors import DataError

# labelled pixels, shape and classes as the literature counts them
KNOWN = {
    "indian_pines": (10249, (145, 145, 200), 16),
    "pavia_university": (42776, (610, 340, 103), 9),
    "salinas": (None, (512, 217, 204), 16),
    "whu_hanchuan": (None, (1217, 303, 274), 16),
    "whu_honghu": (None, (940, 475, 270), 22),
    "whu_longkou": (204542, (550, 400, 270), 9),
}


def test_no_card_is_untested():
    assert list_cards() == sorted(KNOWN)


@pytest.mark.parametrize("name", list_cards())
def test_card_is_complete(name):
    card = load_card(name)
    pixels, shape, classes = KNOWN[name]
    assert card.name == name
    assert (card.shape.height, card.shape.width, card.shape.channels) == shape
    assert len(card.classes) == classes
    assert card.bands.on_card(name).wavelengths.shape == (shape[2],)
    assert card.source.page.startswith("http")
    assert card.source.hub or card.source.package
    assert card.files.labels
    counts = [entry.pixels for entry in card.classes]
    assert (None in counts) == (pixels is None)
    if pixels is not None:
        assert sum(counts) == pixels
    # two classes must also look different on a map
    colours = np.array([[int(entry.colour[start : start + 2], 16) for start in (1, 3, 5)] for entry in card.classes])
    distance = np.abs(colours[:, None] - colours[None]).sum(-1) + 999 * np.eye(classes)
    assert distance.min() > 30


def test_indian_pines_card_has_the_wavelengths_of_the_package():
    wavelengths = load_card("indian_pines").bands.on_card("").wavelengths
    assert np.array_equal(wavelengths, np.asarray(load_indian_pines()["ticks"][1], np.float32))
    assert np.flatnonzero(np.diff(wavelengths) < 0).tolist() == [30, 93, 171]


def test_excluded_bands_leave_gaps(tiny):
    tiny.card["bands"] = {"start": 400, "stop": 1300, "count": 10, "excluded": [0, "4-6"]}
    bands = load_card(tiny.write()).bands.on_card("")
    assert bands.wavelengths.tolist() == [500, 600, 700, 1100, 1200, 1300]


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("sensr",), "x", "unknown key sensr, did you mean sensor?"),
        (("shape", "widht"), 3, "unknown key shape.widht, did you mean width?"),
        (("files", "image", 0), {"pth": "a.npy"}, r"unknown key files.image\[0\].pth, did you mean path?"),
        (("name",), "../up", r"name '\.\./up' is also a folder's"),
        (("gsd",), None, "gsd is None, which is not a number"),
        (("gsd",), "2 m", "gsd is '2 m', which is not a number"),
        (("gsd",), 0, "gsd is 0.0; give the pixel size"),
        (("gsd",), float("nan"), "gsd is nan; give the pixel size"),
        (("shape", "height"), 24.5, "shape.height is 24.5, which is not a whole number"),
        (("files",), "image.npy", "files is 'image.npy', which is not a mapping"),
        (("files", "image"), [], "files.image is empty"),
        (("files", "image"), "image.npy", "files.image is 'image.npy', which is not a list"),
        (("bands",), {"start": 400, "stop": 500}, "bands need"),
        (("bands",), {}, "bands need"),
        (("bands", "count"), -6, "bands.count is -6; give the number"),
        (("bands", "excluded"), ["a-b"], "bands.excluded has 'a-b'"),
        (("bands", "excluded"), ["3-1"], "bands.excluded has '3-1'; indices go up, from 0 to 5"),
        (("bands", "excluded"), [6], "bands.excluded has 6; indices go up, from 0 to 5"),
        (("bands",), {"wavelengths": [450] * 6, "excluded": [0]}, "bands.excluded are those of `start`"),
        (("bands",), {"from_file": True, "excluded": [0]}, "bands.excluded are those of `start`"),
        (("bands", "widths"), [10] * 6, "bands.widths go with bands.wavelengths"),
        (("bands",), {"wavelengths": [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]}, "bands.wavelengths.*look like micrometres"),
        (("bands",), {"wavelengths": [400, 500]}, "2 wavelengths for 6 shape.channels"),
        (("classes", 1, "colour"), "#00FF00", "class colours must differ, found twice: #00ff00"),
        (("classes", 1, "colour"), "brown", "colour 'brown' of class soil"),
        (("classes", 1, "colour"), "aa5500", "colour 'aa5500' of class soil; write it as '#rrggbb'"),
        (("classes", 1, "name"), "grass", "class names must differ"),
        (("classes", 1, "value"), 0, "class and ignored values must differ, found twice: 0"),
        (("classes",), [], "files.labels without classes"),
        (("files", "image", 0), {"path": "*.tif", "size": 3}, r"\*.tif is a pattern"),
        (("files", "image", 0), "../../etc/passwd", "must be relative to the data folder"),
    ],
)
def test_wrong_field_is_named(tiny, where, value, message):
    card = copy.deepcopy(tiny.card)
    place = card
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    tiny.card = card
    with pytest.raises(DataError, match=message) as caught:
        load_card(tiny.write())
    assert "tiny.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["name", "files", "shape", "bands", "licence", "citation"])
def test_missing_field_is_named(tiny, field):
    del tiny.card[field]
    with pytest.raises(DataError, match=f"{field} is missing"):
        load_card(tiny.write())


def test_misspelt_name_gets_a_hint():
    with pytest.raises(DataError, match=r"indian_pine: not found, did you mean indian_pines\?"):
        load_card("indian_pine")


@pytest.mark.parametrize("text", ["a: [1, 2", "!!python/object/apply:os.system ['touch canary']", "- 1\n- 2", "a: \0"])
def test_text_that_is_no_card(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=r"broken\.yaml") as caught:
        load_card(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "canary").exists()


def test_files_are_found_below_the_scene_folder_first(tiny, tmp_path):
    card = load_card(tiny.write())
    assert card.missing(tmp_path) == []
    below = tmp_path / "tiny"
    below.mkdir()
    np.save(below / "image.npy", tiny.image)
    assert card.find(card.files.image[0], tmp_path) == [below / "image.npy"]


def field_names(kind):
    """Names of the fields of a card and of everything in it."""
    for item in dataclasses.fields(kind):
        yield item.name
        hint = get_type_hints(kind)[item.name]
        for inner in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(inner):
                yield from field_names(inner)


def test_the_manual_explains_every_field(repository):
    text = (repository / "datasets" / "README.md").read_text()
    names = set(field_names(DatasetCard))
    assert {"gsd", "excluded", "axes", "revision", "value", "train"} <= names
    assert not [name for name in names if f"`{name}`" not in text and f"{name}: " not in text]


@pytest.mark.parametrize("document", ["datasets/README.md", "docs/own_scene.md"])
def test_cards_in_the_manuals_are_valid(repository, tmp_path, document):
    text = (repository / document).read_text()
    (card,) = re.findall(r"^```yaml\n(name: .*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "card.yaml").write_text(card)
    assert load_card(tmp_path / "card.yaml").classes
