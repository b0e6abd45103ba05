"""Fetching the files of a card from its hub repository: resumable, and checked before a file gets its name."""

import logging
import os
import shutil
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

from filelock import FileLock
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from vision_lowrank.data.cards import DatasetCard, FileEntry
from vision_lowrank.data.scene import check_file
from vision_lowrank.data.task_cards import TaskCard
from vision_lowrank.errors import DataError, DownloadError

logger = logging.getLogger(__name__)

HUB = "https://huggingface.co"
TIMEOUT_SECONDS = 30
CHUNK_BYTES = 1 << 18
# a server may cut a long transfer; each attempt goes on where the last one ended
ATTEMPTS = 3


def fetch(card: DatasetCard | TaskCard, root: str | Path) -> list[Path]:
    """Makes sure that every file of a card is on disk, downloading what is missing into `root/NAME`.

    A file being loaded is called `FILE.part`; what is there already is not loaded again. Size and sha256 are compared
    with the card where it states them, the size with the server's always. The disk that a task needs is logged, and
    compared with what is free, before its download starts.

    Returns:
        The files that were downloaded.

    Raises:
        DownloadError: a file cannot be had; says which, from which page, and into which folder to put it by hand. Or
            the disk is too small for the task.
    """
    missing = card.missing(root)
    if not missing:
        return []
    help_text = card.how_to_get(missing, root)
    what = f"{'task' if isinstance(card, TaskCard) else 'scene'} {card.name}"
    if card.source.hub is None:
        raise DownloadError(f"{what}: {len(missing)} files not found and none to download; {help_text}")
    folder = card.folders(root)[0]
    if isinstance(card, TaskCard):
        _check_disk(card, folder)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    fetched = []
    with Progress(*columns, transient=True) as progress:
        for entry in missing:
            url = hub_url(card, entry)
            try:
                fetched.append(_fetch_file(url, folder / entry.path, entry, progress))
            except (OSError, HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                raise DownloadError(f"{what}: {url} cannot be loaded ({reason}); {help_text}") from error
    return fetched


def hub_url(card: DatasetCard | TaskCard, entry: FileEntry) -> str:
    """Returns the address of a file in the card's hub repository; the variable HF_ENDPOINT may name a mirror."""
    endpoint = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    return f"{endpoint}/datasets/{card.source.hub}/resolve/{card.source.revision}/{urllib.parse.quote(entry.path)}"


def _check_disk(card: TaskCard, folder: Path) -> None:
    """Compares what a task needs on disk, less what is there already, with what is free."""
    there = [folder / f"{entry.path}{suffix}" for entry in card.archive.files() for suffix in ("", ".part")]
    need = max(0, card.disk - sum(_size(path) for path in there))
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    logger.info("task %s: about %.1f GB to load into %s, %.1f GB free", card.name, need / 1e9, folder, free / 1e9)
    if need > free:
        raise DownloadError(
            f"task {card.name}: needs {need} bytes, {free} free in {folder}; make room or move the root"
        )


def _fetch_file(url: str, target: Path, entry: FileEntry, progress: Progress) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    # several processes may want the file at once, and would append to one another's part
    lock = target.with_name(f".{target.name}.lock")
    try:
        with FileLock(lock):
            return target if target.is_file() else _fetch_alone(url, target, entry, progress)
    finally:
        # who waited for it finds the file, or makes another one
        lock.unlink(missing_ok=True)
        with suppress(OSError):
            # nothing came, and nothing is left
            target.parent.rmdir()


def _fetch_alone(url: str, target: Path, entry: FileEntry, progress: Progress) -> Path:
    part = target.with_name(target.name + ".part")
    task = progress.add_task(target.name, total=entry.size)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _load(url, part, entry, progress, task)
            break
        except urllib.error.HTTPError:
            raise
        except (OSError, HTTPException) as error:
            # no answer at all will not turn into one within seconds, but a cut transfer goes on
            if attempt == ATTEMPTS or isinstance(error, urllib.error.URLError):
                raise
            logger.warning("%s: transfer cut (%s), going on at %d bytes", target.name, error, _size(part))
    try:
        check_file(part, entry)
    except DataError as error:
        part.unlink()
        raise DownloadError(f"{url}: what arrived is not what the card promises, deleted it: {error}") from error
    os.replace(part, target)
    return target


def _load(url: str, part: Path, entry: FileEntry, progress: Progress, task: TaskID) -> None:
    """Appends to `part` what it lacks of `url`."""
    start = _size(part)
    if entry.size is not None and start >= entry.size:
        return
    # what is compressed on the way could neither be counted nor resumed
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        # "range not satisfiable": the part is whole already, or longer than the file, which the check finds out
        if error.code == 416 and start:
            _check_whole(url, part, start, error.headers.get("Content-Range", "").rpartition("/")[2])
            return
        raise
    with response:
        if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
            raise urllib.error.URLError("the server sent a web page in place of the file, look at it in a browser")
        if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
            raise urllib.error.URLError(f"the server sent the file as {encoding}, which was not asked for")
        if response.status != 206:
            start = 0
        elif not response.headers.get("Content-Range", f"bytes {start}-").startswith(f"bytes {start}-"):
            raise urllib.error.URLError("the server sent another part of the file than was asked for")
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isdigit() else None
        if total is None and entry.size is None and entry.sha256 is None:
            raise urllib.error.URLError(
                "neither the server nor the card tells the file's size, so that it may end early"
            )
        if total is not None and entry.size not in (None, total):
            raise DownloadError(f"{url}: the server offers {total} bytes, the card says {entry.size}; correct the card")
        part.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - start > free:
            raise DownloadError(f"{url}: {total - start} bytes to load, {free} free in {part.parent}; make room")
        progress.update(task, total=total, completed=start)
        with part.open("ab" if start else "wb") as file:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                progress.advance(task, len(chunk))
    if total is not None and part.stat().st_size != total:
        raise ConnectionResetError(f"{part.stat().st_size} of {total} bytes arrived")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _check_whole(url: str, part: Path, size: int, total: str) -> None:
    if total.isdigit() and int(total) != size:
        part.unlink()
        raise DownloadError(f"{url}: the part on disk had {size} bytes, the file has {total}; deleted it, fetch again")
