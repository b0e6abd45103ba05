"""Cards of benchmark tasks: one YAML file that says all there is to know about a set of labelled image tiles.

The folders below `datasets/` hold the cards that come with the project, one folder a benchmark; any other path to a
`.yaml` file is a user's own. Fields and their meaning: `datasets/README.md`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from vision_lowrank.data.bands import check_wavelengths
from vision_lowrank.data.cards import CARDS_FOLDER, FileEntry, Source
from vision_lowrank.data.scene import IGNORE
from vision_lowrank.errors import ConfigError, DataError
from vision_lowrank.records import nearest, read_record

# what ranks the models of each kind of task
METRICS = {"classification": "accuracy", "multilabel": "micro_map", "segmentation": "macro_miou"}
SENSORS = ("optical", "radar")
HEADS = ("linear", "upernet")
LAYOUTS = ("metadata_csv", "eurosat_lists", "bigearthnet_lists")


@dataclass(frozen=True)
class ArchiveEntry:
    """The archive: path below the data folder and checks.

    Where it was cut, `parts` are the first and the last suffix, such as "aa-az", in place of the "*" of the path.
    """

    path: str
    sha256: str | None = None
    size: int | None = None
    parts: str | None = None

    def files(self) -> tuple[FileEntry, ...]:
        """Returns the file, or its parts in order."""
        if self.parts is None:
            return (FileEntry(self.path, self.sha256, self.size),)
        first, _, last = self.parts.partition("-")
        numbers = range(_suffix_number(first), _suffix_number(last) + 1)
        return tuple(FileEntry(self.path.replace("*", _suffix(number))) for number in numbers)


@dataclass(frozen=True)
class TaskBand:
    """One channel of the optical images, in the order of the files.

    `wavelength` is in nanometres; `mean` and `std` are in the units of the files, left out where nobody published them.
    """

    name: str
    wavelength: float
    mean: float | None = None
    std: float | None = None


@dataclass(frozen=True)
class RadarBand:
    """One channel of the radar images, in the order of the files.

    `code` is what LESS ViT tells polarisations apart by in place of a wavelength; `mean` and `std` are in decibels.
    """

    name: str
    code: float
    mean: float
    std: float


@dataclass(frozen=True)
class TaskClass:
    """One class; `values` are the numbers or names that mean it in the files: its place from 0 unless given."""

    name: str
    colour: str | None = None
    values: tuple[int | str, ...] = ()


@dataclass(frozen=True)
class SplitSizes:
    """Published numbers of samples, left out where unknown."""

    train: int | None = None
    validation: int | None = None
    test: int | None = None


@dataclass(frozen=True)
class PublishedProtocol:
    """What the benchmark's authors fine-tune on.

    Attributes:
        crop: side of the training crop in pixels of the file.
        scale: factor by which tiles are enlarged before they enter the model; pixels become as much smaller.
        train_fraction: share of the training tiles that is used.
        validation_fraction: likewise.
        head: what is trained on the encoder; upernet for segmentation only.
    """

    crop: int
    scale: int = 1
    train_fraction: float = 1.0
    validation_fraction: float = 1.0
    head: str = "linear"


@dataclass(frozen=True)
class TaskCard:
    """Everything the code knows about a task; see the fields in `datasets/README.md`."""

    name: str
    title: str
    kind: str
    metric: str
    sensor: str
    source: Source
    archive: ArchiveEntry
    disk: int
    folder: str
    layouts: tuple[str, ...]
    values: str
    bands: tuple[TaskBand, ...]
    gsd: float
    classes: tuple[TaskClass, ...]
    protocol: PublishedProtocol
    licence: str
    citation: str
    side: int | None = None
    radar: tuple[RadarBand, ...] = ()
    ignore: tuple[int | str, ...] = ()
    splits: SplitSizes = SplitSizes()
    group: str | None = None
    notes: str = ""

    @property
    def wavelengths(self) -> np.ndarray:
        """Centre wavelengths in nanometres, float32 (channels,)."""
        return check_wavelengths([band.wavelength for band in self.bands], f"card {self.name}: bands")

    def channels(self, sensors: Sequence[str]) -> np.ndarray:
        """Returns the wavelengths of the channels of sensors, codes for radar, which comes last, float32 (channels,).

        Raises:
            ConfigError: a sensor is unknown, or the task has none of its images.
        """
        if not sensors or set(sensors) - set(SENSORS) or len(set(sensors)) < len(sensors):
            raise ConfigError(f"sensors={list(sensors)}: give {' or '.join(SENSORS)}, or both, none twice")
        if "radar" in sensors and not self.radar:
            raise ConfigError(f"sensors={list(sensors)}: task {self.name} has no radar images; use sensors=[optical]")
        radar = [band.code for band in self.radar] if "radar" in sensors else []
        return np.concatenate([self.wavelengths if "optical" in sensors else [], radar], dtype=np.float32)

    @cached_property
    def class_values(self) -> dict[int | str, int]:
        """Class index of each number and name in the files, `IGNORE` for what counts as no class."""
        found: dict[int | str, int] = dict.fromkeys(self.ignore, IGNORE)
        for index, entry in enumerate(self.classes):
            found |= dict.fromkeys(_class_values(index, entry), index)
        return found

    def statistics(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns mean and standard deviation of the bands, float32 (channels,), or None where they are unknown."""
        means = [band.mean for band in self.bands if band.mean is not None]
        stds = [band.std for band in self.bands if band.std is not None]
        return (np.asarray(means, np.float32), np.asarray(stds, np.float32)) if means else None

    def folders(self, root: str | Path) -> list[Path]:
        """Returns the folders where the archive is looked for, the one that downloads go to first."""
        return [Path(root) / self.name, Path(root)]

    def unpacked(self, root: str | Path) -> Path | None:
        """Returns the folder `root/NAME` if the archive's folder lies in it unpacked."""
        base = self.folders(root)[0]
        return base if (base / self.folder).is_dir() else None

    def find(self, entry: FileEntry, root: str | Path) -> list[Path]:
        """Returns the path of a file in a list, or an empty one."""
        return [path for folder in self.folders(root) if (path := folder / entry.path).is_file()][:1]

    def missing(self, root: str | Path) -> list[FileEntry]:
        """Returns the files of the archive that are not on disk; none where it is unpacked."""
        if self.unpacked(root) is not None:
            return []
        return [entry for entry in self.archive.files() if not self.find(entry, root)]

    def how_to_get(self, entries: list[FileEntry], root: str | Path) -> str:
        """Returns one line that names files, the page that has them and the folder where they belong."""
        names = ", ".join(entry.path for entry in entries)
        pages = [f"https://huggingface.co/datasets/{self.source.hub}"] if self.source.hub else []
        pages += [self.source.page] if self.source.page else []
        target = self.folders(root)[0].absolute()
        origin = f"get {names} from {' or '.join(pages)} and put them" if pages else f"put {names}"
        return f"{origin} under these names into {target}, or the unpacked folder {self.folder} there"


def list_task_cards() -> list[str]:
    """Returns the names of the task cards that come with the project."""
    return sorted(_card_paths())


def is_task_card(name_or_path: str | Path) -> bool:
    """Returns whether this is the name of a task card, or the path of a file that looks like one."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        return path.is_file() and bool(re.search(r"^archive:", path.read_text("utf-8", "replace"), re.MULTILINE))
    return str(name_or_path) in _card_paths()


def load_task_card(name_or_path: str | Path) -> TaskCard:
    """Reads a task card by name, or by the path of a `.yaml` file.

    Raises:
        DataError: no such card, or one with an unknown, missing or wrong field.
    """
    text = str(name_or_path)
    known = _card_paths()
    path = Path(text) if text.endswith((".yaml", ".yml")) else known.get(text)
    if path is None or not path.is_file():
        hint = nearest(text, known)
        raise DataError(f"task card {text}: not found{hint}; cards: {', '.join(known)}, or the path of a .yaml file")
    card = read_record(TaskCard, path, "card", DataError)
    _check(card, f"card {path}")
    return card


def _card_paths() -> dict[str, Path]:
    return {path.stem: path for path in sorted(CARDS_FOLDER.glob("*/*.yaml"))}


def _class_values(index: int, entry: TaskClass) -> list[int | str]:
    numbers = [] if any(isinstance(value, int) for value in entry.values) else [index]
    return list(dict.fromkeys([entry.name, *numbers, *entry.values]))


def _suffix_number(suffix: str) -> int:
    number = 0
    for letter in suffix:
        number = number * 26 + ord(letter) - ord("a")
    return number


def _suffix(number: int) -> str:
    return "".join(chr(ord("a") + digit) for digit in divmod(number, 26))


def _check(card: TaskCard, where: str) -> None:
    heads = HEADS if card.kind == "segmentation" else HEADS[:1]
    choices = [
        ("kind", card.kind, tuple(METRICS)),
        ("metric", card.metric, (METRICS.get(card.kind, ""),)),
        ("head", card.protocol.head, heads),
    ]
    for field, value, known in [*choices, *(("layouts", layout, LAYOUTS) for layout in card.layouts)]:
        if value not in known:
            raise DataError(f"{where}: {field} is {value!r}{nearest(value, known)}; it can be {', '.join(known)}")
    if not re.fullmatch(r"\w[\w.-]*", card.name):
        raise DataError(f"{where}: name {card.name!r} is also a folder's; use letters, digits, '_', '-' and '.' only")
    for path in (card.archive.path, card.folder):
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise DataError(f"{where}: path {path} must be relative to the data folder, without '..'")
    if card.archive.parts is not None:
        if not re.fullmatch("[a-z]{2}-[a-z]{2}", card.archive.parts) or card.archive.path.count("*") != 1:
            raise DataError(f"{where}: archive.parts is {card.archive.parts!r}; write 'aa-az' and one '*' in the path")
        if card.archive.sha256 or card.archive.size is not None:
            raise DataError(f"{where}: archive in parts with sha256 or size, which are of one file; remove them")
    if card.gsd <= 0 or card.disk <= 0 or not card.bands or not card.classes or not card.layouts:
        raise DataError(f"{where}: gsd and disk must be above 0, bands, classes and layouts lists that are not empty")
    check_wavelengths([band.wavelength for band in card.bands], f"{where}: bands")
    stated = [(band.mean is not None, band.std is not None) for band in card.bands]
    if not all(pair == stated[0] for pair in stated) or stated[0][0] != stated[0][1]:
        raise DataError(f"{where}: mean and std of some bands only; state both of all bands, or none to measure them")
    spreads = [(band.name, band.std) for band in card.bands] + [(band.name, band.std) for band in card.radar]
    if narrow := next((name for name, std in spreads if std is not None and std <= 0), None):
        raise DataError(f"{where}: std of band {narrow} is not above 0; correct it")
    for entry in card.classes:
        if entry.colour is not None and not re.fullmatch("#[0-9a-fA-F]{6}", entry.colour):
            raise DataError(f"{where}: colour {entry.colour!r} of class {entry.name}; write it as '#rrggbb'")
    named = [value for index, entry in enumerate(card.classes) for value in _class_values(index, entry)]
    repeats: tuple[tuple[str, Sequence[int | float | str]], ...] = (
        ("band names", [band.name for band in card.bands]),
        ("radar codes", [band.code for band in card.radar]),
        ("class names, values and ignored values", [*named, *card.ignore]),
    )
    for what, values in repeats:
        if twice := {value for value in values if values.count(value) > 1}:
            raise DataError(f"{where}: {what} must differ, found twice: {', '.join(map(str, sorted(twice, key=str)))}")
    if card.group is not None:
        try:
            groups = re.compile(card.group).groups
        except re.error as error:
            raise DataError(f"{where}: group {card.group!r} is no regular expression ({error})") from error
        if groups != 1:
            raise DataError(f"{where}: group {card.group!r} needs one pair of brackets around what crops share")
