"""Downloads from a hub on this machine that cuts, lies and disappears."""

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from vision_lowrank.data.cards import load_card
from vision_lowrank.data.download import fetch
from vision_lowrank.errors import DownloadError

IMAGE = np.random.default_rng(1).bytes(900_001)
LABELS = np.random.default_rng(2).bytes(1_000)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def repository_files(hub):
    hub.files = {"image.npy": IMAGE, "labels.npy": LABELS}
    return hub


@pytest.fixture
def make_card(tiny):
    def make(image="image.npy", **source):
        tiny.card["source"] = {"hub": "someone/tiny", "page": "https://example.org/tiny", **source}
        tiny.card["files"] = {"image": [image], "labels": ["labels.npy"]}
        return load_card(tiny.write())

    return make


def write_part(root, content):
    part = root / "tiny" / "image.npy.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(content)
    return part


def files_below(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_files_arrive_once(repository_files, make_card, root):
    card = make_card({"path": "image.npy", "size": len(IMAGE), "sha256": sha256(IMAGE)})
    assert fetch(card, root) == [root / "tiny" / "image.npy", root / "tiny" / "labels.npy"]
    assert (root / "tiny" / "image.npy").read_bytes() == IMAGE
    assert (root / "tiny" / "labels.npy").read_bytes() == LABELS
    assert repository_files.ranges() == [("image.npy", None), ("labels.npy", None)]
    assert fetch(card, root) == []
    assert len(repository_files.requests) == 2
    (root / "tiny" / "labels.npy").unlink()
    assert fetch(card, root) == [root / "tiny" / "labels.npy"]
    assert repository_files.ranges()[2:] == [("labels.npy", None)]
    assert files_below(root) == ["tiny/image.npy", "tiny/labels.npy"]


def test_address_has_repository_revision_and_quoted_path(hub, make_card, root):
    hub.files = {"a folder/cube 1.npy": IMAGE, "labels.npy": LABELS}
    fetch(make_card("a folder/cube 1.npy", revision="v1.2"), root)
    assert hub.requests[0][2] == "/datasets/someone/tiny/resolve/v1.2/a%20folder/cube%201.npy"
    assert (root / "tiny" / "a folder" / "cube 1.npy").read_bytes() == IMAGE


def test_a_part_is_continued_not_loaded_again(repository_files, make_card, root):
    # other bytes than the server's show that these are the ones kept
    write_part(root, b"?" * 300_000)
    fetch(make_card(), root)
    assert repository_files.ranges()[0] == ("image.npy", "bytes=300000-")
    assert (root / "tiny" / "image.npy").read_bytes() == b"?" * 300_000 + IMAGE[300_000:]


def test_a_server_without_ranges_starts_over(repository_files, make_card, root):
    repository_files.knows_ranges = False
    write_part(root, b"?" * 300_000)
    fetch(make_card(), root)
    assert (root / "tiny" / "image.npy").read_bytes() == IMAGE


@pytest.mark.parametrize("with_size", [True, False])
def test_a_part_that_is_whole_only_gets_its_name(repository_files, make_card, root, with_size):
    write_part(root, IMAGE)
    fetch(make_card({"path": "image.npy", "size": len(IMAGE)} if with_size else "image.npy"), root)
    assert (root / "tiny" / "image.npy").read_bytes() == IMAGE
    asked = [request for request in repository_files.ranges() if request[0] == "image.npy"]
    assert asked == ([] if with_size else [("image.npy", f"bytes={len(IMAGE)}-")])


def test_a_part_longer_than_the_file_is_deleted(repository_files, make_card, root):
    write_part(root, IMAGE + b"more")
    with pytest.raises(DownloadError, match="the part on disk had 900005 bytes, the file has 900001; deleted it"):
        fetch(make_card(), root)
    assert files_below(root) == []
    fetch(make_card(), root)
    assert (root / "tiny" / "image.npy").read_bytes() == IMAGE


def test_a_cut_transfer_goes_on_where_it_ended(repository_files, make_card, root, caplog):
    repository_files.cuts = {"image.npy": [400_000, 100_000]}
    fetch(make_card(), root)
    assert repository_files.ranges()[:3] == [
        ("image.npy", None),
        ("image.npy", "bytes=400000-"),
        ("image.npy", "bytes=500000-"),
    ]
    assert (root / "tiny" / "image.npy").read_bytes() == IMAGE
    assert "image.npy: transfer cut (400000 of 900001 bytes arrived), going on at 400000 bytes" in caplog.text


def test_a_server_that_hangs_up_is_asked_again(repository_files, make_card, root):
    repository_files.cuts = {"image.npy": [0]}
    fetch(make_card(), root)
    assert repository_files.ranges()[:2] == [("image.npy", None), ("image.npy", None)]
    assert (root / "tiny" / "image.npy").read_bytes() == IMAGE


def test_what_came_before_the_last_cut_is_kept_for_the_next_call(repository_files, make_card, root):
    repository_files.cuts = {"image.npy": [100_000] * 3}
    card = make_card()
    with pytest.raises(DownloadError, match=r"image\.npy cannot be loaded \(300000 of 900001 bytes arrived\)"):
        fetch(card, root)
    assert files_below(root) == ["tiny/image.npy.part"]
    fetch(card, root)
    assert repository_files.ranges()[3] == ("image.npy", "bytes=300000-")
    assert (root / "tiny" / "image.npy").read_bytes() == IMAGE


def offer_another_length(hub):
    hub.files["image.npy"] = IMAGE[:-1]


def send_less_without_saying(hub):
    hub.tells_length = False
    hub.files["image.npy"] = IMAGE[:-1]


def change_a_byte(hub):
    hub.files["image.npy"] = IMAGE[:-1] + bytes([IMAGE[-1] ^ 1])


def send_a_page(hub):
    hub.kind = "text/html; charset=utf-8"
    hub.files["image.npy"] = b"<!DOCTYPE html><html>please log in</html>"


def remove_file(hub):
    del hub.files["image.npy"]


@pytest.mark.parametrize(
    ("misbehave", "message"),
    [
        (offer_another_length, "the server offers 900000 bytes, the card says 900001"),
        (send_less_without_saying, "not what the card promises, deleted it: .*900000 bytes, the card says 900001"),
        (change_a_byte, f"not what the card promises, deleted it: .*the card says {sha256(IMAGE)}"),
        (
            send_a_page,
            r"sent a web page.*get image\.npy, labels\.npy from .*/someone/tiny or https://example\.org/tiny",
        ),
        (remove_file, r"\(Not Found\); get image\.npy, labels\.npy from .*/someone/tiny or https://example\.org/tiny"),
    ],
)
def test_a_wrong_answer_leaves_no_file_and_is_not_repeated(repository_files, make_card, root, misbehave, message):
    misbehave(repository_files)
    card = make_card({"path": "image.npy", "size": len(IMAGE), "sha256": sha256(IMAGE)})
    with pytest.raises(DownloadError, match=message) as caught:
        fetch(card, root)
    assert "/datasets/someone/tiny/resolve/main/image.npy" in str(caught.value)
    assert str(root / "tiny") in str(caught.value) or "the server offers" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert repository_files.ranges() == [("image.npy", None)]
    assert files_below(root) == []


@pytest.mark.parametrize(
    ("headers", "part", "tells_length", "message"),
    [
        ({"Content-Encoding": "gzip"}, b"", True, "sent the file as gzip"),
        ({"Content-Range": "bytes 0-900000/900001"}, IMAGE[:1000], True, "another part of the file than was asked for"),
        ({}, b"", False, "may end early"),
    ],
)
def test_what_could_be_another_file_gets_no_name(
    repository_files, make_card, root, headers, part, tells_length, message
):
    write_part(root, part)
    repository_files.more_headers, repository_files.tells_length = headers, tells_length
    with pytest.raises(DownloadError, match=message):
        fetch(make_card(), root)
    assert not (root / "tiny" / "image.npy").exists()


def test_two_at_once_load_a_file_once(repository_files, make_card, root):
    card = make_card({"path": "image.npy", "size": len(IMAGE), "sha256": sha256(IMAGE)})
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: fetch(card, root), range(4)))
    assert (root / "tiny" / "image.npy").read_bytes() == IMAGE
    assert repository_files.ranges().count(("image.npy", None)) == 1
    assert files_below(root) == ["tiny/image.npy", "tiny/labels.npy"]


def test_without_network_the_way_by_hand_is_told(no_network, make_card, root):
    with pytest.raises(DownloadError, match="scene tiny") as caught:
        fetch(make_card(), root)
    message = str(caught.value)
    assert f"{no_network}/datasets/someone/tiny/resolve/main/image.npy cannot be loaded" in message
    assert (
        "get image.npy, labels.npy from https://huggingface.co/datasets/someone/tiny or https://example.org" in message
    )
    assert message.endswith(f"into {root / 'tiny'}")
    assert files_below(root) == []


def test_files_without_a_hub_are_asked_for(tiny, root):
    tiny.card["source"] = {"page": "https://example.org/tiny"}
    with pytest.raises(DownloadError, match=r"2 files not found and none to download; get image\.npy, labels\.npy"):
        fetch(load_card(tiny.write()), root)


def test_a_full_disk_is_told_before_the_transfer(repository_files, make_card, root, monkeypatch):
    usage = shutil.disk_usage(root.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DownloadError, match=r"900001 bytes to load, 1000 free in .*tiny; make room"):
        fetch(make_card(), root)
    assert files_below(root) == []
