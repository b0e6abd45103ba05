"""Files inside archives, read without unpacking where the format allows; hostile and damaged archives are refused.

A `Store` is a set of named files. Zip archives have an index at their end, so single members are read in place, also
out of an archive that was cut into parts. Tar archives have none: they are unpacked once, into a folder beside.
"""

import hashlib
import io
import logging
import lzma
import os
import posixpath
import re
import shutil
import stat
import tarfile
import uuid
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from vision_lowrank.errors import DataError

logger = logging.getLogger(__name__)

# what the readers of zip, tar and their compressions raise on damaged or truncated files
DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
)
# deflate cannot pack tighter than 1 : 1032, real images stay below 1 : 20; constant label maps are small enough to pass
LARGEST_RATIO = 200
SMALL_BYTES = 64 << 20
COPY_BYTES = 1 << 20
# long names and other text about a member of a tar archive, which `tarfile` reads into memory whole
LONGEST_TEXT = 1 << 20
TEXT_TYPES = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip


class Store(ABC):
    """Named files that can be read in any order and from several processes.

    Attributes:
        where: archive or folder, for messages.
        names: paths of the files, with "/" between folders.
        fingerprint: hexadecimal digest that changes with the files.
        contents: likewise of their names and sizes, and in a zip archive of their checksums; the same for a copy.
    """

    where: str
    names: frozenset[str]
    fingerprint: str
    contents: str

    def open(self, name: str) -> IO[bytes]:
        """Opens a file for reading from any place in it.

        Raises:
            DataError: there is no such file, or the archive is damaged at it.
        """
        if name not in self.names:
            raise DataError(f"{self.where}: no file {name}")
        try:
            return self._open(name)
        except DAMAGED as error:
            raise self._damaged(name, error) from error

    def read(self, name: str) -> bytes:
        """Returns the content of a file.

        Raises:
            DataError: there is no such file, or it is damaged.
        """
        try:
            with self.open(name) as file:
                return file.read()
        except DAMAGED as error:
            raise self._damaged(name, error) from error

    @abstractmethod
    def _open(self, name: str) -> IO[bytes]:
        """Opens one of `names`."""

    def _damaged(self, name: str, error: BaseException) -> DataError:
        return DataError(f"{self.where}: {name} cannot be read ({error or type(error).__name__}); get the file again")


def open_store(paths: Path | Sequence[Path]) -> Store:
    """Opens a folder, an archive, or the parts of one in their order.

    Args:
        paths: a folder, one .zip, .tar or .tar.gz file, or its parts. The format is told by the content.

    Raises:
        DataError: a part is missing, the archive is damaged, truncated or of another format, a member is unsafe (leaves
            the folder, is a link or a device, expands beyond reason), or a disk is too small to unpack it.
    """
    parts = [paths] if isinstance(paths, Path) else list(paths)
    if len(parts) == 1 and parts[0].is_dir():
        return FolderStore(parts[0])
    if absent := [part.name for part in parts if not part.is_file()]:
        raise DataError(f"{parts[0].parent}: {', '.join(absent)} missing of {len(parts)} files; get the rest of them")
    with JoinedFile(parts) as file:
        start = file.read(4)
    # the second is the mark of a zip archive without members
    if start in (b"PK\x03\x04", b"PK\x05\x06"):
        return ZipStore(parts)
    return FolderStore(unpack_tar(parts))


class JoinedFile(io.RawIOBase):
    """Parts of a file as one that can be read from any place.

    Every process opens the parts itself: handles from before a fork would share their position with the parent.

    Args:
        paths: the parts in order.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        sizes = [path.stat().st_size for path in self._paths]
        self._starts = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
        self._position = 0
        self._process = os.getpid()
        self._files: dict[int, IO[bytes]] = {}

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def tell(self) -> int:
        """Returns the position in bytes from the start of the first part."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a position, also beyond the end, and returns it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._starts[-1]}[whence]
        if base + offset < 0:
            raise OSError(f"seek to {base + offset}, before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer across the borders of parts; returns how many bytes it got, fewer only at the end."""
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view) and self._position < self._starts[-1]:
            index = next(i for i, start in enumerate(self._starts[1:]) if self._position < start)
            file = self._part(index)
            file.seek(self._position - self._starts[index])
            chunk = file.read(min(len(view) - done, self._starts[index + 1] - self._position))
            if not chunk:
                raise OSError(f"{self._paths[index]} became shorter while it was read")
            view[done : done + len(chunk)] = chunk
            done += len(chunk)
            self._position += len(chunk)
        return done

    def close(self) -> None:
        """Closes the parts that were opened."""
        for file in getattr(self, "_files", {}).values():
            file.close()
        super().close()

    def _part(self, index: int) -> IO[bytes]:
        if self._process != os.getpid():
            self._files, self._process = {}, os.getpid()
        if index not in self._files:
            self._files[index] = self._paths[index].open("rb", buffering=0)
        return self._files[index]


class ZipStore(Store):
    """Members of a zip archive, read where they lie.

    Args:
        paths: the archive, or its parts in order.

    Raises:
        DataError: see `open_store`.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self.where = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more parts"
        try:
            self._archive = zipfile.ZipFile(io.BufferedReader(JoinedFile(paths)))
        except DAMAGED as error:
            raise DataError(f"{self.where}: zip archive damaged or cut off ({error}); get it again") from error
        members = [member for member in self._archive.infolist() if not member.is_dir()]
        for member in members:
            _check_zip_member(member, self.where)
        self.names = _unique((member.filename for member in members), self.where)
        entries = sorted(f"{member.filename}\0{member.CRC}\0{member.file_size}\n" for member in members)
        self.fingerprint = self.contents = _digest(entries)

    def __reduce__(self) -> tuple[Any, ...]:
        return ZipStore, (self._paths,)

    def _open(self, name: str) -> IO[bytes]:
        return self._archive.open(name)


class FolderStore(Store):
    """Files below a folder; hidden ones and links to folders are left out.

    The fingerprint is of names, sizes and times, since reading a large folder through would take hours.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.where = str(folder)
        entries = {}
        for parent, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                if not name.startswith("."):
                    path = Path(parent, name)
                    status = path.stat()
                    entries[path.relative_to(folder).as_posix()] = (status.st_size, status.st_mtime_ns)
        self.names = frozenset(entries)
        self.fingerprint = _digest(f"{name}\0{size}\0{time}\n" for name, (size, time) in sorted(entries.items()))
        self.contents = _digest(f"{name}\0{size}\n" for name, (size, _) in sorted(entries.items()))

    def _open(self, name: str) -> IO[bytes]:
        return (self._folder / name).open("rb")


class _Member(tarfile.TarInfo):
    """A member of a tar archive whose texts have bounds."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        """Reads a header.

        Raises:
            ValueError: it is of a text longer than `LONGEST_TEXT`.
        """
        header = super().frombuf(buf, encoding, errors)
        if header.type in TEXT_TYPES and header.size > LONGEST_TEXT:
            raise ValueError(f"{header.size} bytes of text about a member")
        return header


def unpack_tar(parts: Sequence[Path]) -> Path:
    """Unpacks a .tar, .tar.gz or .tar.xz archive beside itself, once, and returns the folder.

    All members are looked through before the first is written. The folder gets its name when it is complete.

    Raises:
        DataError: see `open_store`.
    """
    facts = [(part.name, part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    target = parts[0].parent / f".unpacked-{_digest([repr(facts)])[:16]}"
    if target.is_dir():
        return target
    where = str(parts[0])
    try:
        size = _check_tar(parts, where)
    except DAMAGED as error:
        raise DataError(f"{where}: no zip, or tar archive damaged or cut off ({error}); get it again") from error
    lock = target.with_name(f"{target.name}.lock")
    try:
        # several processes may want it at once, and each would need the room
        with FileLock(lock):
            if target.is_dir():
                return target
            for leftover in target.parent.glob(f"{target.name}.*.part"):
                # of an unpacking that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            free = shutil.disk_usage(target.parent).free
            if size > free:
                raise DataError(f"{where}: {size} bytes to unpack, {free} free in {target.parent}; make room")
            logger.info("unpacking %s, %.1f GB, into %s", where, size / 1e9, target)
            _unpack(parts, target)
    finally:
        lock.unlink(missing_ok=True)
    return target


def _unpack(parts: Sequence[Path], target: Path) -> None:
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        temporary.mkdir()
        with io.BufferedReader(JoinedFile(parts)) as file, tarfile.open(fileobj=file, tarinfo=_Member) as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is None:
                    continue
                path = temporary / posixpath.normpath(member.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as copy:
                    shutil.copyfileobj(content, copy, COPY_BYTES)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_tar(parts: Sequence[Path], where: str) -> int:
    """Returns the bytes of all files of a tar archive."""
    packed = sum(part.stat().st_size for part in parts)
    size = 0
    names = []
    with io.BufferedReader(JoinedFile(parts)) as file, tarfile.open(fileobj=file, tarinfo=_Member) as archive:
        for member in archive:
            _check_name(member.name, where)
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise DataError(f"{where}: {member.name} is a link, a device or sparse; not opened, make it anew")
            size += member.size
            _check_ratio(size, packed, where, "the archive")
            names.append(posixpath.normpath(member.name))
    _unique(names, where)
    return size


def _check_zip_member(member: zipfile.ZipInfo, where: str) -> None:
    _check_name(member.filename, where)
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise DataError(f"{where}: {member.filename} is a link or a device; not opened, make the archive anew")
    if member.flag_bits & 1:
        raise DataError(f"{where}: {member.filename} is encrypted; make the archive anew without a password")
    _check_ratio(member.file_size, member.compress_size, where, member.filename)


def _check_name(name: str, where: str) -> None:
    if name.startswith("/") or ".." in name.split("/") or "\\" in name or re.match("[A-Za-z]:", name):
        raise DataError(f"{where}: member {name!r} would leave the folder; the archive is not opened, do not trust it")


def _check_ratio(size: int, packed: int, where: str, what: str) -> None:
    if size > SMALL_BYTES and size > LARGEST_RATIO * packed:
        raise DataError(f"{where}: {what} grows from {packed} to over {size - 1} bytes; not opened, do not trust it")


def _unique(names: Iterable[str], where: str) -> frozenset[str]:
    counts = Counter(names)
    if twice := next((name for name, count in counts.items() if count > 1), None):
        raise DataError(f"{where}: {twice} is in it twice; make the archive anew")
    return frozenset(counts)


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
