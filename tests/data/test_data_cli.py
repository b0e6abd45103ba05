"""The data command line: what it prints and how it ends."""

import hashlib
import re

import numpy as np
import pytest

from vision_lowrank.data.__main__ import main
from vision_lowrank.data.cards import list_cards


@pytest.fixture
def run(capsys):
    """Runs a command; returns its exit status, the lines it printed without outer blanks, and its errors."""

    def command(*arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, [line.strip() for line in captured.out.splitlines()], captured.err

    return command


def words(lines):
    return [line.split() for line in lines]


def test_list_names_every_card_and_which_are_on_disk(run, tmp_path):
    status, lines, errors = run("list", "--root", tmp_path)
    assert (status, errors) == (0, "")
    assert [line.split()[0] for line in lines[1:]] == list_cards()
    assert re.fullmatch(r"indian_pines +Indian Pines +145 x 145 x 200 +16 +on disk", lines[1])
    assert re.fullmatch(r"salinas +Salinas +512 x 217 x 204 +16 +missing", lines[3])


def test_show_prints_the_card(run, tiny, tmp_path):
    tiny.card["classes"][1]["pixels"] = 1234
    tiny.card["notes"] = "Some [markup] that is text."
    (tmp_path / "image.npy").touch()
    card = tiny.write()
    (tmp_path / "labels.npy").unlink()
    status, lines, errors = run("show", card, "--root", tmp_path)
    assert (status, errors) == (0, "")
    for expected in (
        "title Tiny scene (tiny), scene_classification",
        "sensor a random generator; pixels of 2 m; 6 bands, 450 to 950 nm",
        "size 24 rows x 20 columns",
        "source your own files",
        "files image.npy",
        "labels.npy (missing)",
        "licence CC0",
        "notes Some [markup] that is text.",
        "1 grass",
        "2 soil 1,234",
        "3 water",
    ):
        assert expected.split() in words(lines)
    assert lines[-1] == f"1 files missing: put labels.npy under these names into {tmp_path / 'tiny'}"


def test_show_says_how_missing_files_can_be_fetched(run, tiny, tmp_path):
    tiny.card["source"] = {"hub": "someone/tiny"}
    card = tiny.write()
    lines = run("show", card, "--root", tmp_path / "elsewhere")[1]
    assert lines[-1] == "2 files missing: repeat the command with fetch in place of show"


def test_fetch_tells_what_it_loaded_and_loads_nothing_twice(run, tiny, hub, tmp_path):
    tiny.card["source"] = {"hub": "someone/tiny"}
    card = tiny.write()
    hub.files = {name: (tmp_path / name).read_bytes() for name in ("image.npy", "labels.npy")}
    root = tmp_path / "elsewhere"
    status, lines, errors = run("fetch", card, "--root", root)
    assert (status, errors) == (0, "")
    assert [line for line in lines if line] == [f"fetched {root / 'tiny' / name}" for name in hub.files]
    assert run("fetch", card, "--root", root) == (0, ["tiny: every file is on disk"], "")
    assert len(hub.requests) == 2
    assert run("check", card, "--root", root)[0] == 0


def test_check_counts_classes_and_hashes_files(run, tiny, tmp_path):
    tiny.image[..., 3] = 7
    tiny.image[0, :2, 0] = np.nan
    tiny.labels[0, :2] = 0
    card = tiny.write()
    status, lines, _ = run("check", card, "--root", tmp_path)
    assert status == 0
    assert lines[0] == "Tiny scene: 24 rows x 20 columns x 5 bands, 450 to 950 nm"
    assert lines[1] == "478 of 480 pixels have values in every band"
    assert lines[2] == "1 bands left out, indices 3"
    for value, name in enumerate(("grass", "soil", "water"), start=1):
        assert [str(value), name, str((tiny.labels == value).sum())] in words(lines)
    for name in ("image.npy", "labels.npy"):
        assert f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}" in lines
    assert lines[-1] == "tiny: files and card agree"


def test_the_manual_for_an_own_scene_says_what_happens(run, repository, shared_path, tmp_path, caplog):
    text = (repository / "docs" / "own_scene.md").read_text()
    (card,) = re.findall(r"^```yaml\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    (promised,) = re.findall(r"^```\n(WARNING.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    path = tmp_path / "enmap_potsdam.yaml"
    path.write_text(card)
    status, lines, _ = run("check", path, "--root", shared_path("data"))
    printed = [f"WARNING: {message}" for message in caplog.messages] + lines
    assert status == 0
    assert words(printed)[:13] == words(promised.splitlines())
    assert sum(len(line.split()[0]) == 64 for line in lines) == 36
    assert lines[-1] == "enmap_potsdam: files and card agree"


@pytest.mark.parametrize("command", ["show", "fetch", "check"])
def test_an_unknown_card_is_one_line_and_status_2(run, command):
    status, lines, errors = run(command, "indian_pine")
    assert (status, lines) == (2, [])
    assert errors.startswith("error: dataset card indian_pine: not found, did you mean indian_pines?")
    assert errors.count("\n") == 1


def test_missing_files_without_network_are_one_line_and_status_2(run, no_network, tmp_path):
    for command, found in (("fetch", f"{no_network}/datasets/danaroth/salinas"), ("check", "2 files not found")):
        status, lines, errors = run(command, "salinas", "--root", tmp_path)
        assert status == 2
        assert not any(lines)
        assert errors.startswith(f"error: scene salinas: {found}")
        assert "Salinas_corrected.mat, Salinas_gt.mat from https://huggingface.co/datasets/danaroth/salinas" in errors
        assert errors.endswith(f"into {tmp_path / 'salinas'}\n")
        assert errors.count("\n") == 1


def test_a_file_that_contradicts_its_card_is_status_2(run, tiny, tmp_path):
    tiny.card["classes"][0]["pixels"] = 1
    status, _, errors = run("check", tiny.write(), "--root", tmp_path)
    assert status == 2
    assert errors.startswith("error: label map of tiny: class grass has ")


@pytest.mark.parametrize("arguments", [[], ["list", "--rot", "x"], ["show"], ["remove", "salinas"]])
def test_a_misspelt_command_shows_its_use(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m vision_lowrank.data" in capsys.readouterr().err
