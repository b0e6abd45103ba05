"""Dataset cards: one YAML file that says all there is to know about a scene.

The folder `datasets/` of the repository holds the cards that come with the project; any other path to a `.yaml` file is
a user's own. Fields and their meaning: `datasets/README.md`.
"""

import importlib.util
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vision_lowrank.data.bands import Bands, check_wavelengths
from vision_lowrank.errors import DataError
from vision_lowrank.records import nearest, read_record
from vision_lowrank.shipped import CARDS_FOLDER

# maps are uint8, and 255 is for pixels without a class
MOST_CLASSES = 255


@dataclass(frozen=True)
class Source:
    """Where the files come from: a Python package, a hub repository, or (by hand) a web page."""

    package: str | None = None
    folder: str = ""
    hub: str | None = None
    revision: str = "main"
    page: str | None = None


@dataclass(frozen=True)
class FileEntry:
    """One file: path below the data folder, checks, and how to read an array out of it.

    `axes` is the left side of an einops pattern over channels, height and width, such as "channels (width height)".
    """

    path: str
    sha256: str | None = None
    size: int | None = None
    key: str | None = None
    axes: str | None = None


@dataclass(frozen=True)
class Files:
    """Files by role; several images or label maps are tiles; `extra` files are only fetched (ENVI headers)."""

    image: tuple[FileEntry, ...]
    labels: tuple[FileEntry, ...] = ()
    extra: tuple[FileEntry, ...] = ()

    def all(self) -> tuple[FileEntry, ...]:
        """Returns the entries of every role."""
        return self.image + self.labels + self.extra


@dataclass(frozen=True)
class Shape:
    """Size of the image as the files hold it, before unusable bands are dropped."""

    height: int
    width: int
    channels: int


@dataclass(frozen=True)
class BandsEntry:
    """Centre wavelengths in nanometres: listed, evenly spaced (`start`, `stop`, `count`), or read from the image file.

    `excluded`: indices of the evenly spaced bands that the files lack, numbers or inclusive ranges such as "103-107".
    """

    wavelengths: tuple[float, ...] | None = None
    widths: tuple[float, ...] | None = None
    start: float | None = None
    stop: float | None = None
    count: int | None = None
    excluded: tuple[int | str, ...] = ()
    from_file: bool = False

    def on_card(self, where: str) -> Bands | None:
        """Returns the bands that the card itself states, None where it leaves them to the file.

        Raises:
            DataError: they are incomplete, contradict each other or are no nanometres.
        """
        spacing = (self.start, self.stop, self.count)
        if self.widths is not None and self.wavelengths is None:
            raise DataError(f"{where}: bands.widths go with bands.wavelengths; list these too, or leave the widths out")
        if self.excluded and (self.count is None or self.wavelengths is not None):
            raise DataError(
                f"{where}: bands.excluded are those of `start`, `stop` and `count` that the file lacks; leave it out: "
                "listed wavelengths are one for each band of the file, useful or not"
            )
        if self.wavelengths is not None:
            widths = None if self.widths is None else np.asarray(self.widths, dtype=np.float32)
            return Bands(check_wavelengths(self.wavelengths, f"{where}: bands.wavelengths"), widths)
        if self.start is not None and self.stop is not None and self.count is not None:
            if self.count < 1:
                raise DataError(f"{where}: bands.count is {self.count}; give the number of evenly spaced bands")
            grid = np.linspace(self.start, self.stop, self.count)
            keep = np.setdiff1d(np.arange(self.count), self._excluded(where, self.count))
            return Bands(check_wavelengths(grid[keep], f"{where}: bands.start/stop"))
        if any(value is not None for value in spacing) or not self.from_file:
            raise DataError(f"{where}: bands need `wavelengths`, or `start`, `stop` and `count`, or `from_file: true`")
        return None

    def _excluded(self, where: str, count: int) -> list[int]:
        indices: list[int] = []
        for item in self.excluded:
            first, _, last = str(item).partition("-")
            if not first.isdigit() or not (last or first).isdigit():
                raise DataError(f"{where}: bands.excluded has {item!r}; give an index or a range such as 103-107")
            found = range(int(first), int(last or first) + 1)
            if not found or found[-1] >= count:
                raise DataError(f"{where}: bands.excluded has {item!r}; indices go up, from 0 to {count - 1}")
            indices.extend(found)
        return indices


@dataclass(frozen=True)
class ClassEntry:
    """One class: its value in the label map is its place in the list counted from 1, unless `value` says otherwise."""

    name: str
    colour: str
    pixels: int | None = None
    value: int | None = None


@dataclass(frozen=True)
class PublishedSplit:
    """Label maps that hold the training and the test pixels of a published experiment."""

    train: FileEntry
    test: FileEntry | None = None


@dataclass(frozen=True)
class DatasetCard:
    """Everything the code knows about a scene; see the fields in `datasets/README.md`."""

    name: str
    title: str
    sensor: str
    files: Files
    shape: Shape
    bands: BandsEntry
    gsd: float
    licence: str
    citation: str
    task: str = "scene_classification"
    source: Source = Source()
    classes: tuple[ClassEntry, ...] = ()
    ignore: tuple[int, ...] = (0,)
    nodata: float | None = None
    splits: dict[str, PublishedSplit] = field(default_factory=dict)
    notes: str = ""

    def class_values(self) -> list[int]:
        """Returns the value of each class in the label map."""
        return [index + 1 if entry.value is None else entry.value for index, entry in enumerate(self.classes)]

    def folders(self, root: str | Path) -> list[Path]:
        """Returns the folders where files of this card are looked for, one after the other.

        Downloads go to the first, but for a card of a package, which has none.

        Raises:
            DataError: the Python package that holds them is not installed.
        """
        own = [Path(root) / self.name, Path(root)]
        if self.source.package is None:
            return own
        found = importlib.util.find_spec(self.source.package)
        if found is None or found.origin is None:
            raise DataError(f"card {self.name}: package {self.source.package!r} is not installed; pip install it")
        # published training pixels are a user's own
        return [Path(found.origin).parent / self.source.folder, *own]

    def find(self, entry: FileEntry, root: str | Path) -> list[Path]:
        """Returns the file of `entry`, or several where its path is a pattern such as `images/*.tif`; or none."""
        for folder in self.folders(root):
            found = sorted(folder.glob(entry.path)) if "*" in entry.path else [folder / entry.path]
            if found and all(path.is_file() for path in found):
                return found
        return []

    def missing(self, root: str | Path) -> list[FileEntry]:
        """Returns the entries without a file."""
        return [entry for entry in self.files.all() if not self.find(entry, root)]

    def how_to_get(self, entries: list[FileEntry], root: str | Path) -> str:
        """Returns one line that names files, the page that has them and the folder where they belong."""
        names = ", ".join(entry.path for entry in entries)
        pages = [f"https://huggingface.co/datasets/{self.source.hub}"] if self.source.hub else []
        pages += [self.source.page] if self.source.page else []
        origin = f"get {names} from {' or '.join(pages)} and put them" if pages else f"put {names}"
        return f"{origin} under these names into {(Path(root) / self.name).absolute()}"


def list_cards() -> list[str]:
    """Returns the names of the cards that come with the project."""
    return sorted(path.stem for path in CARDS_FOLDER.glob("*.yaml"))


def load_card(name_or_path: str | Path) -> DatasetCard:
    """Reads a card by name, or by the path of a `.yaml` file.

    Raises:
        DataError: no such card, or one with an unknown, missing or wrong field.
    """
    text = str(name_or_path)
    path = Path(text) if text.endswith((".yaml", ".yml")) else CARDS_FOLDER / f"{text}.yaml"
    if not path.is_file():
        known = list_cards()
        hint = nearest(text, known)
        raise DataError(f"dataset card {text}: not found{hint}; cards: {', '.join(known)}, or the path of a .yaml file")
    card = read_record(DatasetCard, path, "card", DataError)
    _check(card, f"card {path}")
    return card


def _check(card: DatasetCard, where: str) -> None:
    bands = card.bands.on_card(where)
    if bands is not None and len(bands) != card.shape.channels:
        raise DataError(f"{where}: {len(bands)} wavelengths for {card.shape.channels} shape.channels; give one each")
    if not re.fullmatch(r"\w[\w.-]*", card.name):
        raise DataError(f"{where}: name {card.name!r} is also a folder's; use letters, digits, '_', '-' and '.' only")
    if not card.files.image:
        raise DataError(f"{where}: files.image is empty; list the file, or the tiles, of the image")
    if not 0 < card.gsd < math.inf:
        raise DataError(f"{where}: gsd is {card.gsd}; give the pixel size in metres")
    for entry in card.classes:
        if not re.fullmatch("#[0-9a-fA-F]{6}", entry.colour):
            raise DataError(f"{where}: colour {entry.colour!r} of class {entry.name}; write it as '#rrggbb'")
    groups: tuple[tuple[str, list[Any]], ...] = (
        ("class names", [entry.name for entry in card.classes]),
        ("class colours", [entry.colour.lower() for entry in card.classes]),
        ("class values", card.class_values()),
        ("class and ignored values", [*card.class_values(), *card.ignore]),
    )
    for what, values in groups:
        twice = {value for value in values if values.count(value) > 1}
        if twice:
            raise DataError(f"{where}: {what} must differ, found twice: {', '.join(map(str, sorted(twice, key=str)))}")
    if len(card.classes) > MOST_CLASSES:
        raise DataError(f"{where}: {len(card.classes)} classes; maps hold {MOST_CLASSES} at most, merge some")
    if card.files.labels and not card.classes:
        raise DataError(f"{where}: files.labels without classes; list the classes")
    if card.source.package is not None:
        # a dotted name would be imported, and with it whatever package lies in the working folder
        if not re.fullmatch(r"[A-Za-z_]\w*", card.source.package):
            raise DataError(
                f"{where}: source.package is {card.source.package!r}; give the name of a package, no module"
            )
        if card.source.hub is not None:
            raise DataError(
                f"{where}: source has a package and a hub; files are in the one or are fetched from the other"
            )
    published = [file for split in card.splits.values() for file in (split.train, split.test) if file is not None]
    for path in [card.source.folder, *(file.path for file in published)]:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise DataError(f"{where}: path {path} must be relative to the data folder, without '..'")
    for file in card.files.all():
        if "*" in file.path and (file.sha256 or file.size is not None):
            raise DataError(f"{where}: {file.path} is a pattern without sha256 or size; list the files instead")
        if Path(file.path).is_absolute() or ".." in Path(file.path).parts:
            raise DataError(f"{where}: path {file.path} must be relative to the data folder, without '..'")
