"""Archives of every kind read by name: whole, in parts, from several processes, hostile, damaged."""

import io
import multiprocessing
import pickle
import shutil
import stat
import tarfile
import zipfile

import numpy as np
import pytest

from vision_lowrank.data import archives
from vision_lowrank.data.archives import JoinedFile, open_store
from vision_lowrank.errors import DataError

CONTENT = {
    "set/metadata.csv": b"a,b\n1,2\n",
    "set/images/one.tif": np.random.default_rng(1).bytes(20_000),
    "set/images/two.tif": np.random.default_rng(2).bytes(3_000),
    "set/empty.txt": b"",
}


def zip_bytes(content=CONTENT, compression=zipfile.ZIP_DEFLATED, change=lambda member: None):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.mkdir("set")
        for name, data in content.items():
            member = zipfile.ZipInfo(name)
            member.compress_type = compression
            change(member)
            archive.writestr(member, data)
    return buffer.getvalue()


def tar_bytes(mode="w", content=CONTENT, change=lambda member: None):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        folder = tarfile.TarInfo("./set")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in content.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            change(member)
            archive.addfile(member, io.BytesIO(data) if member.isreg() else None)
    return buffer.getvalue()


def cut(data, parts):
    return [bytes(part) for part in np.array_split(np.frombuffer(data, np.uint8), parts)]


def write(folder, data, parts=1):
    paths = [folder / f"set_part_a{letter}" for letter in "abcdefgh"[:parts]]
    for path, piece in zip(paths, cut(data, parts), strict=True):
        path.write_bytes(piece)
    return paths


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_joined_parts_read_like_the_whole(tmp_path, parts):
    data = np.random.default_rng(0).bytes(1_003)
    with JoinedFile(write(tmp_path, data, parts)) as file:
        assert file.read() == data
        assert file.seek(-10, io.SEEK_END) == 993
        assert file.read(100) == data[-10:]
        assert file.read(5) == b""
        generator = np.random.default_rng(1)
        for _ in range(50):
            start, length = (int(number) for number in generator.integers(0, 1_100, 2))
            file.seek(start)
            assert file.read(length) == data[start : start + length]
            assert file.tell() == max(start, min(start + length, len(data)))
        with pytest.raises(OSError, match="before the start"):
            file.seek(-1)


KINDS = {
    "zip": (zip_bytes(), 1),
    "stored zip in parts": (zip_bytes(compression=zipfile.ZIP_STORED), 3),
    "deflated zip in parts": (zip_bytes(), 5),
    "tar": (tar_bytes(), 1),
    "tar.gz": (tar_bytes("w:gz"), 1),
    "tar.xz in parts": (tar_bytes("w:xz"), 4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_files(tmp_path, kind):
    data, parts = KINDS[kind]
    paths = write(tmp_path, data, parts)
    store = open_store(paths)
    assert store.names == set(CONTENT)
    assert {name: store.read(name) for name in CONTENT} == CONTENT
    with store.open("set/images/one.tif") as file:
        file.seek(15_000)
        assert file.read(10) == CONTENT["set/images/one.tif"][15_000:15_010]
    with pytest.raises(DataError, match=r"set_part_aa.*: no file set/three\.tif|unpacked-.*: no file set/three\.tif"):
        store.read("set/three.tif")
    added = [name for name in listing(tmp_path) if not name.startswith("set_part")]
    assert bool(added) == kind.startswith("tar")


def test_a_folder_is_a_store_without_its_hidden_files(tmp_path):
    for name, data in {**CONTENT, ".cache/index.csv": b"x", "set/.hidden": b"x"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    store = open_store(tmp_path)
    assert store.names == set(CONTENT)
    assert {name: store.read(name) for name in CONTENT} == CONTENT
    assert open_store([tmp_path]).fingerprint == store.fingerprint
    (tmp_path / "set/metadata.csv").write_bytes(b"a,b\n1,2\n3,4\n")
    assert open_store(tmp_path).fingerprint != store.fingerprint


def test_the_fingerprint_of_a_zip_is_of_its_content(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = open_store(write(tmp_path / "one", zip_bytes()))
    two = open_store(write(tmp_path / "two", zip_bytes(compression=zipfile.ZIP_STORED), 4))
    assert one.fingerprint == two.fingerprint
    changed = {**CONTENT, "set/metadata.csv": b"a,b\n1,3\n"}
    assert open_store(write(tmp_path / "two", zip_bytes(changed), 4)).fingerprint != one.fingerprint


def test_a_tar_is_unpacked_once_and_again_after_a_change(tmp_path):
    paths = write(tmp_path, tar_bytes("w:gz"), 2)
    open_store(paths)
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert folder.name.startswith(".unpacked-")
    (folder / "set/metadata.csv").write_bytes(b"changed by hand")
    assert open_store(paths).read("set/metadata.csv") == b"changed by hand"
    store = open_store(write(tmp_path, tar_bytes("w:gz", {"set/metadata.csv": b"new"}), 2))
    assert (store.names, store.read("set/metadata.csv")) == ({"set/metadata.csv"}, b"new")


def test_what_a_killed_unpacking_left_is_removed(tmp_path, monkeypatch):
    paths = write(tmp_path, tar_bytes("w:gz"), 2)

    class Killed(BaseException):
        pass

    def kill(source, target, length):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfileobj", kill)
        # as a signal would have it, nothing cleans up
        patched.setattr(shutil, "rmtree", lambda folder, ignore_errors: None)
        with pytest.raises(Killed):
            open_store(paths)
    (left,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert open_store(paths).read("set/metadata.csv") == CONTENT["set/metadata.csv"]
    assert not left.exists()
    folders = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert len(folders) == 1
    assert not folders[0].endswith(".part")
    # nor the lock
    assert len(list(tmp_path.iterdir())) == 3


def test_a_fork_does_not_move_its_parent(tmp_path):
    with JoinedFile(write(tmp_path, bytes(1_000), 2)) as file:
        file.read(100)
        worker = multiprocessing.get_context("fork").Process(target=lambda: (file.seek(300), file.read(10)))
        worker.start()
        worker.join()
        assert worker.exitcode == 0
        # the place in the operating system's file, which a shared handle would have moved to 310
        assert file._part(0).tell() == 100


def _read_many(store, seed, wrong):
    names = sorted(CONTENT)
    for index in np.random.default_rng(seed).integers(0, len(names), 60):
        if store.read(names[index]) != CONTENT[names[index]]:
            wrong.put(names[index])


@pytest.mark.parametrize("method", ["fork", "pickle"])
def test_processes_do_not_disturb_each_other(tmp_path, method):
    store = open_store(write(tmp_path, zip_bytes(compression=zipfile.ZIP_STORED), 3))
    store.read("set/images/one.tif")
    if method == "pickle":
        # what a spawned worker gets
        assert {name: pickle.loads(pickle.dumps(store)).read(name) for name in CONTENT} == CONTENT
        return
    context = multiprocessing.get_context("fork")
    wrong = context.Queue()
    workers = [context.Process(target=_read_many, args=(store, seed, wrong)) for seed in range(3)]
    for worker in workers:
        worker.start()
    _read_many(store, 9, wrong)
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert wrong.empty()


def link(member):
    if member.filename.endswith("two.tif"):
        member.external_attr = (stat.S_IFLNK | 0o777) << 16


def device(member):
    if member.filename.endswith("two.tif"):
        member.external_attr = (stat.S_IFCHR | 0o666) << 16


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (zip_bytes({**CONTENT, "../evil.txt": b"x"}), r"member '\.\./evil\.txt' would leave the folder"),
        (zip_bytes({**CONTENT, "set/../../evil.txt": b"x"}), "would leave the folder"),
        (zip_bytes({**CONTENT, "/etc/evil": b"x"}), "member '/etc/evil' would leave the folder"),
        (zip_bytes({**CONTENT, "C:/evil": b"x"}), "member 'C:/evil' would leave the folder"),
        (zip_bytes({**CONTENT, "set\\..\\evil": b"x"}), "would leave the folder"),
        (zip_bytes(change=link), r"set/images/two\.tif is a link or a device"),
        (zip_bytes(change=device), r"set/images/two\.tif is a link or a device"),
        (zip_bytes({**CONTENT, "bomb.tif": bytes(100_000)}), r"bomb\.tif grows from \d+ to over 99999 bytes"),
    ],
)
def test_hostile_zip_members_are_refused_at_opening(tmp_path, data, message, monkeypatch):
    monkeypatch.setattr(archives, "SMALL_BYTES", 50_000)
    with pytest.raises(DataError, match=message):
        open_store(write(tmp_path, data))
    assert listing(tmp_path) == ["set_part_aa"]


def test_encrypted_and_repeated_zip_members_are_refused(tmp_path):
    data = bytearray(zip_bytes())
    # the flags of the first entry of the directory, eight bytes behind its mark
    data[data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1) + 8] |= 1
    with pytest.raises(DataError, match=r"metadata\.csv is encrypted"):
        open_store(write(tmp_path, bytes(data)))
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("set/a.tif", b"1")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("set/a.tif", b"2")
    with pytest.raises(DataError, match=r"twice\.zip: set/a\.tif is in it twice"):
        open_store(tmp_path / "twice.zip")


def tar_type(kind, target="/etc/passwd"):
    def change(member):
        if member.name.endswith("two.tif"):
            member.type, member.linkname, member.size = kind, target, 0

    return change


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tar_bytes(content={**CONTENT, "../../evil.txt": b"x"}), "would leave the folder"),
        (tar_bytes("w:gz", change=lambda m: setattr(m, "name", "/" + m.name)), "would leave the folder"),
        (tar_bytes(change=tar_type(tarfile.SYMTYPE)), r"two\.tif is a link"),
        (tar_bytes(change=tar_type(tarfile.SYMTYPE, "one.tif")), r"two\.tif is a link"),
        (tar_bytes(change=tar_type(tarfile.LNKTYPE, "set/images/one.tif")), r"two\.tif is a link"),
        (tar_bytes("w:gz", change=tar_type(tarfile.FIFOTYPE)), r"two\.tif is a link, a device"),
        (tar_bytes(change=tar_type(tarfile.CHRTYPE)), r"two\.tif is a link, a device"),
        (tar_bytes("w:xz", {"set/bomb.tif": bytes(100_000)}), r"the archive grows from \d+ to over 99999 bytes"),
        (tar_bytes(change=lambda m: setattr(m, "name", "set/same")), "set/same is in it twice"),
        # read into memory whole, whatever it grows to
        (tar_bytes("w:gz", change=lambda m: m.pax_headers.update(comment="x" * 2**21)), "bytes of text about a member"),
        (tar_bytes("w:xz", change=lambda m: setattr(m, "name", "x" * 2**21)), "bytes of text about a member"),
    ],
)
def test_hostile_tar_members_are_refused_before_anything_is_written(tmp_path, data, message, monkeypatch):
    monkeypatch.setattr(archives, "SMALL_BYTES", 50_000)
    with pytest.raises(DataError, match=message):
        open_store(write(tmp_path, data))
    assert listing(tmp_path) == ["set_part_aa"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (zip_bytes()[:-30], "set_part_aa: zip archive damaged or cut off"),
        (zip_bytes()[:5_000], "set_part_aa: zip archive damaged or cut off"),
        (tar_bytes("w:gz")[:-9_000], "tar archive damaged or cut off"),
        (tar_bytes()[:9_000], "tar archive damaged or cut off"),
        (b"<html>please log in</html>" * 40, "no zip, or tar archive damaged"),
        (b"", "no zip, or tar archive damaged"),
    ],
)
def test_cut_archives_are_named(tmp_path, data, message):
    with pytest.raises(DataError, match=message) as caught:
        open_store(write(tmp_path, data))
    assert str(tmp_path / "set_part_aa") in str(caught.value)
    assert listing(tmp_path) == ["set_part_aa"]


def test_a_damaged_member_is_named_when_it_is_read(tmp_path):
    data = bytearray(zip_bytes(compression=zipfile.ZIP_STORED))
    data[data.index(CONTENT["set/images/one.tif"][:50]) + 7] ^= 255
    store = open_store(write(tmp_path, bytes(data)))
    assert store.read("set/images/two.tif") == CONTENT["set/images/two.tif"]
    with pytest.raises(DataError, match=r"set_part_aa: set/images/one\.tif cannot be read .*CRC-32"):
        store.read("set/images/one.tif")


def test_a_gap_between_parts_is_named(tmp_path):
    paths = write(tmp_path, zip_bytes(), 4)
    paths[1].unlink()
    paths[3].unlink()
    with pytest.raises(DataError, match="set_part_ab, set_part_ad missing of 4 files"):
        open_store(paths)


def test_a_part_in_the_wrong_place_is_noticed(tmp_path):
    first, second, third = write(tmp_path, zip_bytes(compression=zipfile.ZIP_STORED), 3)
    store = open_store([first, third])
    with pytest.raises(DataError, match=r"set/images/one\.tif cannot be read"):
        store.read("set/images/one.tif")
    assert second.is_file()


def test_a_full_disk_is_told_before_unpacking(tmp_path, monkeypatch):
    paths = write(tmp_path, tar_bytes("w:gz"))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DataError, match=r"23008 bytes to unpack, 1000 free in .*; make room"):
        open_store(paths)
    assert listing(tmp_path) == ["set_part_aa"]


def test_a_failed_unpacking_leaves_nothing(tmp_path, monkeypatch):
    paths = write(tmp_path, tar_bytes("w:gz"))
    copies, copy = [], shutil.copyfileobj

    def full(source, target, length):
        copies.append(target)
        if len(copies) == 3:
            raise OSError(28, "No space left on device")
        copy(source, target, length)

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        open_store(paths)
    assert len(copies) == 3
    assert listing(tmp_path) == ["set_part_aa"]
    monkeypatch.undo()
    assert open_store(paths).read("set/metadata.csv") == CONTENT["set/metadata.csv"]
