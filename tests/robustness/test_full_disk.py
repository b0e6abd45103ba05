"""A full disk and a folder that cannot be written: what was there stays, the command fails and names the path."""

import os
import shutil
import subprocess

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vision_lowrank.checkpoints import WholeFiles
from vision_lowrank.runs import atomic_folder, atomic_path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MB in memory, where the tests may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def trained(forks, root, overrides):
    """A finished run of one epoch, and the overrides that would go on with it for two more."""
    found = forks.run(kind="train", overrides=[*overrides, f"runs_root={root}", "trainer.max_epochs=1"])
    assert found["status"] == 0, found["output"]
    (folder,) = root.glob("*/*-seed0")
    return folder, [*overrides, f"runs_root={root}", f"ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"]


def assert_failed_for(found, folder, reason):
    assert found["status"] == 2, found["output"]
    message = found["output"].splitlines()[-1]
    assert message.startswith("error: ")
    assert reason in message
    assert str(folder) in message
    assert "Traceback" not in found["output"]


def test_files_that_cannot_grow_leave_the_old_ones(forks, scene, tmp_path):
    folder, more = trained(forks, tmp_path, scene)
    before = contents(tmp_path)
    found = forks.run(kind="train", overrides=more, file_limit=20_000)
    assert_failed_for(found, folder / "checkpoints", "File too large")
    assert contents(tmp_path) == before


def test_a_full_disk_leaves_the_old_files(forks, scene, disk):
    folder, more = trained(forks, disk, scene)
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(bytes(free - 40_000))
    before = contents(folder)
    found = forks.run(kind="train", overrides=more)
    assert_failed_for(found, folder / "checkpoints", "No space left")
    assert contents(folder) == before


def test_a_read_only_folder_is_named(forks, scene, disk):
    folder, more = trained(forks, disk, scene)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    before = contents(folder)
    found = forks.run(kind="train", overrides=more)
    assert_failed_for(found, folder / "checkpoints", "Read-only")
    found = forks.run(kind="train", overrides=[*scene, f"runs_root={disk}"])
    assert_failed_for(found, disk, "Read-only")
    assert contents(folder) == before


def test_a_checkpoint_that_fails_midway_names_its_path(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"state_dict": {"a": torch.ones(3)}}, path)
    before = path.read_bytes()

    def fail(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        WholeFiles().save_checkpoint({"state_dict": {}}, path)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_of_weights_changes_only_when_all_of_it_is_written(tmp_path):
    folder = tmp_path / "model"
    with atomic_folder(folder) as temporary:
        (temporary / "unet").mkdir()
        (temporary / "config.json").write_text("old")
        (temporary / "unet" / "model.safetensors").write_text("old")
    assert contents(tmp_path) == {"model/config.json": b"old", "model/unet/model.safetensors": b"old"}

    def write(error):
        with atomic_folder(folder) as temporary:
            (temporary / "config.json").write_text("new")
            raise error

    with pytest.raises(RuntimeError, match="stopped"):
        write(RuntimeError("stopped"))
    with pytest.raises(OSError, match="No space left") as caught:
        write(OSError(28, "No space left on device"))
    assert caught.value.filename == str(folder)
    assert contents(tmp_path) == {"model/config.json": b"old", "model/unet/model.safetensors": b"old"}


def test_safetensors_that_do_not_fit_a_disk_leave_the_old_ones_and_name_the_path(disk):
    path, folder = disk / "a.safetensors", disk / "model"
    small, large = {"a": torch.ones(3)}, {"a": torch.ones(4_000_000)}

    def write(tensors):
        with atomic_path(path) as temporary:
            save_file(tensors, temporary)

    def write_folder(tensors):
        with atomic_folder(folder) as temporary:
            save_file(tensors, temporary / "model.safetensors")

    write(small)
    write_folder(small)
    before = contents(disk)
    for attempt, place in ((write, path), (write_folder, folder)):
        with pytest.raises(OSError, match="No space left") as caught:
            attempt(large)
        assert caught.value.filename == str(place)
    assert contents(disk) == before


def test_what_else_safetensors_refuses_is_told_in_its_words(tmp_path):
    (tmp_path / "damaged").write_bytes(b"9" * 40)
    with pytest.raises(SafetensorError, match=r"[Hh]eader"), atomic_path(tmp_path / "a"):
        load_file(tmp_path / "damaged")
