"""Benchmark tasks as datasets: tiles and labels read out of the archive of a task card."""

import ast
import csv
import hashlib
import io
import json
import logging
import posixpath
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import rasterio
import torch
from einops import rearrange
from rasterio.enums import Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader, MemoryFile
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from vision_lowrank.data.archives import Store, open_store
from vision_lowrank.data.scene import IGNORE
from vision_lowrank.data.task_cards import TaskCard, load_task_card
from vision_lowrank.errors import ConfigError, DataError, SplitError
from vision_lowrank.records import nearest
from vision_lowrank.runs import write_csv, write_json

logger = logging.getLogger(__name__)

SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
SUBSETS = ("train", "validation", "test")
Kind = Literal["classification", "multilabel", "segmentation"]


@dataclass(frozen=True)
class Row:
    """One sample in the index.

    Attributes:
        image: TIFF file in the store, or folder with one TIFF a band.
        label: class index; class indices with blanks between; or the file of the label map.
    """

    image: str
    label: str


class TaskSamples(Dataset[dict[str, Tensor]]):
    """Tiles of one split with their labels, read when they are asked for.

    A sample has `image` float32 (channels, height, width) normalised by the mean and standard deviation of each band, 0
    where a value is missing; `wavelengths` in nanometres float32 (channels,); `gsd` in metres float32 (); and `label`
    int64 (), `labels` float32 (classes,), or `mask` int64 (height, width) with `IGNORE`.

    Attributes:
        groups: what each sample belongs to, text (len,); crops of one image share it.

    Args:
        card: of the task.
        store: of its files.
        rows: the samples.
        mean: of the bands, float32 (channels,).
        std: likewise.
    """

    def __init__(self, card: TaskCard, store: Store, rows: Sequence[Row], mean: np.ndarray, std: np.ndarray) -> None:
        self.card = card
        self.store = store
        # arrays and not lists: worker processes would copy these as soon as they count references
        self._images = np.asarray([row.image for row in rows])
        self._labels = np.asarray([row.label for row in rows])
        self.groups = np.asarray([group_of(card, row) or row.image for row in rows])
        self._mean, self._std = mean[:, None, None], std[:, None, None]
        self._shared = {"wavelengths": torch.from_numpy(card.wavelengths), "gsd": torch.tensor(card.gsd)}

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = Row(str(self._images[index]), str(self._labels[index]))
        image = read_image(self.card, self.store, row.image)
        scaled = np.nan_to_num((image - self._mean) / self._std, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        return {"image": torch.from_numpy(scaled), **self._shared, **self._target(row, image.shape[1:])}

    def _target(self, row: Row, shape: tuple[int, ...]) -> dict[str, Tensor]:
        if self.card.kind == "classification":
            return {"label": torch.tensor(int(row.label))}
        if self.card.kind == "multilabel":
            labels = torch.zeros(len(self.card.classes))
            labels[[int(index) for index in row.label.split()]] = 1
            return {"labels": labels}
        mask = read_mask(self.card, self.store, row.label)
        if mask.shape != shape:
            raise DataError(f"{self.store.where}: {row.label} is {mask.shape}, {row.image} {shape}; pair other files")
        return {"mask": torch.from_numpy(mask)}


@dataclass(frozen=True)
class TaskData:
    """An opened task.

    Attributes:
        name: the card's name.
        kind: "classification", "multilabel" or "segmentation".
        classes: names by class index.
        metric: "accuracy", "micro_map" or "macro_miou".
        wavelengths: centres of the channels in nanometres, float32 (channels,).
        gsd: pixel size in metres.
        fingerprint: hexadecimal digest of what the samples are made of.
        train: samples to train on; like the next two a map-style dataset with `groups`, see `TaskSamples`.
        validation: samples to choose hyper-parameters on.
        test: samples to report on.
    """

    name: str
    kind: Kind
    classes: tuple[str, ...]
    metric: str
    wavelengths: np.ndarray
    gsd: float
    fingerprint: str
    train: Any
    validation: Any
    test: Any


def open_task(
    card: TaskCard | str | Path, root: str | Path, split: str = "published", fraction: float = 1.0, seed: int = 0
) -> TaskData:
    """Opens the archive or the unpacked folder of a task and checks its index.

    Args:
        card: a card, its name, or the path of its file.
        root: data folder; the archive is looked for in `root/NAME` and in `root`, an unpacked one in `root/NAME`.
        split: "published", or "grouped": training and validation are drawn anew so that crops of one image stay
            together, in sizes as near to the published ones as whole groups allow. The test set stays.
        fraction: share of the training samples, above 0 and up to 1; of each class in a classification, at least one.
            Crops of one image stay together. A smaller share of one seed is part of a larger one.
        seed: of "grouped" and of `fraction`.

    Raises:
        DataError: a file is missing, damaged, or contradicts the card.
        SplitError: the groups of "grouped" are unknown or too few.
        ConfigError: an option is out of range.
    """
    if not isinstance(card, TaskCard):
        card = load_task_card(card)
    if split not in ("published", "grouped"):
        raise ConfigError(f"split is {split!r}{nearest(split, ('published', 'grouped'))}; give published or grouped")
    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction is {fraction}; give a share of the training samples above 0 and up to 1")
    if missing := card.missing(root):
        raise DataError(f"task {card.name}: {len(missing)} files not found; {card.how_to_get(missing, root)}")
    parts = [path for entry in card.archive.files() for path in card.find(entry, root)]
    store = open_store(card.unpacked(root) or parts)
    cache = card.folders(root)[0] / ".cache"
    subsets = _load_index(card, store, cache)
    if split == "grouped":
        subsets = _regroup(card, subsets, seed)
    elif card.group is not None and any(group_of(card, row) is None for row in subsets["train"]):
        logger.warning("%s: names of tiles are not as group %r expects; each is its own group", card.name, card.group)
    mean, std = card.statistics() or _measure(card, store, subsets["train"], cache)
    subsets["train"] = _share(card, subsets["train"], fraction, seed)
    facts = (store.fingerprint, _card_facts(card), mean.tolist(), std.tolist(), card.gsd, subsets)
    return TaskData(
        name=card.name,
        kind=cast(Kind, card.kind),
        classes=tuple(entry.name for entry in card.classes),
        metric=card.metric,
        wavelengths=card.wavelengths,
        gsd=card.gsd,
        fingerprint=_digest(facts),
        **{name: TaskSamples(card, store, subsets[name], mean, std) for name in SUBSETS},
    )


def read_image(card: TaskCard, store: Store, name: str) -> np.ndarray:
    """Returns the optical tile as float32 (channels, height, width) in the units of the files.

    Args:
        card: says how many bands there are, and the side of a tile where it is known.
        store: of the files.
        name: a TIFF file, or a folder with one TIFF a band, brought to the card's side.

    Raises:
        DataError: the file is damaged, or has other bands or another size than the card says.
    """
    if name in store.names:
        image = read_tiff(store.read(name), len(card.bands), f"{store.where}: {name}")
    else:
        files = [f"{name}/{posixpath.basename(name)}_{band.name}.tif" for band in card.bands]
        bands = [read_tiff(store.read(file), 1, f"{store.where}: {file}", card.side) for file in files]
        image = np.concatenate(bands)
    if card.side is not None and image.shape[1] != card.side:
        raise DataError(f"{store.where}: {name} has a side of {image.shape[1]} pixels, the card says {card.side}")
    return np.ascontiguousarray(image, np.float32)


def read_mask(card: TaskCard, store: Store, name: str) -> np.ndarray:
    """Returns a label map as class indices, int64 (height, width), `IGNORE` where it counts as no class.

    Raises:
        DataError: the file is damaged, has several bands, or a value that the card does not know.
    """
    where = f"{store.where}: {name}"
    values, inverse = np.unique(read_tiff(store.read(name), 1, where)[0], return_inverse=True)
    known = card.class_values
    strange = [value for value in values.tolist() if value not in known]
    if strange:
        shown = ", ".join(f"{value:g}" for value in strange[:5])
        raise DataError(
            f"{where}: value {shown} is neither a class nor ignored; add it to the card's classes or ignore"
        )
    return np.asarray([known[value] for value in values.tolist()], np.int64)[inverse]


def read_tiff(content: bytes, channels: int, where: str, side: int | None = None) -> np.ndarray:
    """Returns a square TIFF as (channels, height, width) in the type of the file.

    Bands may be the samples of one page, pages of their own, or the columns of pages that hold one row of the image
    each, which is how an array of height x width x channels is often written. Which, is told by the number of bands.

    Args:
        content: the file.
        channels: number of bands.
        where: file, for messages.
        side: rows and columns to resample to, bilinearly; None for those of the file.

    Raises:
        DataError: the file is damaged, has another number of bands, or its axes cannot be told apart.
    """
    damaged = DataError(f"{where}: no TIFF, or damaged; get the file again")
    # rasterio takes an empty memory file for one to be written
    if not content:
        raise damaged
    try:
        with warnings.catch_warnings(), MemoryFile(content) as memory:
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            # named, so that no other of the many formats can hide behind the suffix
            with memory.open(driver="GTiff") as first:
                # numbered here: the list of subdatasets has page 10 before page 2
                pages = [f"GTIFF_DIR:{number + 1}:{memory.name}" for number in range(len(first.subdatasets))]
                shape = (len(pages) or first.count, first.height, first.width)
                axes = _axes(shape, channels, where)
                if not pages:
                    return rearrange(_read_page(first, side), f"{axes} -> channels height width")
            return rearrange(np.concatenate(list(_read_pages(pages, side))), f"{axes} -> channels height width")
    except (RasterioError, OSError, ValueError) as error:
        raise damaged from error


def group_of(card: TaskCard, row: Row) -> str | None:
    """Returns what the card's `group` finds in the name of a tile, None where it does not fit or there is none."""
    match = card.group and re.fullmatch(card.group, posixpath.splitext(posixpath.basename(row.image))[0])
    return match[1] if match else None


def read_index(card: TaskCard, store: Store) -> dict[str, list[Row]]:
    """Reads which samples a task has, in whichever of the card's layouts the store has.

    Returns:
        The samples of `SUBSETS`.

    Raises:
        DataError: no layout fits, a column is missing, a split or label is unknown, a file that is named does not
            exist, or a split has no samples.
    """
    metadata = f"{card.folder}/metadata.csv"
    for layout in card.layouts:
        entries: Iterable[tuple[str, str, Row]]
        if layout == "metadata_csv" and metadata in store.names:
            entries = _read_metadata(card, store, metadata)
        elif layout != "metadata_csv" and (lists := _find_lists(store, *LISTS[layout][:2])):
            entries = LISTS[layout][2](card, store, lists)
        else:
            continue
        subsets: dict[str, list[Row]] = {name: [] for name in SUBSETS}
        for place, subset, row in entries:
            if subset not in SPLITS:
                raise DataError(f"{store.where}: {place}: split {subset!r}; it can be {', '.join(SPLITS)}")
            subsets[SPLITS[subset]].append(row)
        if empty := [name for name in SUBSETS if not subsets[name]]:
            raise DataError(f"{store.where}: no {' and no '.join(empty)} samples; get the archive again")
        _check_files(card, store, subsets, layout)
        return subsets
    found = ", ".join(sorted(store.names)[:3]) or "nothing"
    raise DataError(
        f"{store.where}: no {metadata} or split lists inside, it holds {found}, …; correct the card's folder"
    )


def _read_metadata(card: TaskCard, store: Store, name: str) -> Iterator[tuple[str, str, Row]]:
    reader = csv.DictReader(io.StringIO(store.read(name).decode("utf-8-sig"), newline=""))
    columns = reader.fieldnames or []
    wanted = ["label_path"] if card.kind == "segmentation" else ["label", "label_path"]
    target = next((column for column in wanted if column in columns), None)
    if lacking := [column for column in ("optical_path", "split") if column not in columns]:
        raise DataError(f"{store.where}: {name} has no column {', '.join(lacking)}, only {', '.join(columns)}")
    if target is None:
        raise DataError(f"{store.where}: {name} has no column {' or '.join(wanted)}, only {', '.join(columns)}")
    for line in reader:
        place = f"{name} line {reader.line_num}"
        if not line["optical_path"] or not line[target]:
            raise DataError(f"{store.where}: {place}: optical_path or {target} is empty; correct the line")
        image, path = (
            posixpath.normpath(posixpath.join(card.folder, line[column])) for column in ("optical_path", target)
        )
        if card.kind == "segmentation":
            label = path
        elif target == "label_path":
            label = _class_text(card, _names_in_json(store, path), f"{store.where}: {path}")
        else:
            label = _class_text(card, _parse_label(line[target]), f"{store.where}: {place}")
        yield place, line["split"] or "", Row(image, label)


def _find_lists(store: Store, start: str, end: str) -> dict[str, str]:
    """Returns the file of each split list by split, where all three are there."""
    wanted = {f"{start}{split}{end}": split for split in ("train", "val", "test")}
    found = {wanted[base]: name for name in store.names if (base := posixpath.basename(name)) in wanted}
    return found if len(found) == len(wanted) else {}


def _lines(store: Store, lists: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for split, name in lists.items():
        for number, line in enumerate(store.read(name).decode("utf-8-sig").splitlines(), start=1):
            if line.strip():
                yield f"{name} line {number}", split, line.strip()


def _read_eurosat_lists(card: TaskCard, store: Store, lists: Mapping[str, str]) -> Iterator[tuple[str, str, Row]]:
    """Reads lines such as `River_12.jpg`, which mean the file `River_12.tif` wherever it lies."""
    images = {posixpath.basename(name): name for name in store.names if name.endswith(".tif")}
    for place, split, line in _lines(store, lists):
        stem = posixpath.splitext(posixpath.basename(line))[0]
        label = _class_text(card, [stem.rpartition("_")[0]], f"{store.where}: {place}")
        yield place, split, Row(images.get(f"{stem}.tif", f"{stem}.tif"), label)


def _read_bigearthnet_lists(card: TaskCard, store: Store, lists: Mapping[str, str]) -> Iterator[tuple[str, str, Row]]:
    """Reads lines that begin with the name of a folder, which holds a TIFF a band and a JSON file of class names."""
    ending = "_labels_metadata.json"
    files = {posixpath.basename(name).removesuffix(ending): name for name in store.names if name.endswith(ending)}
    for place, split, line in _lines(store, lists):
        patch = line.partition(",")[0]
        if patch not in files:
            raise DataError(f"{store.where}: {place}: {patch}{ending} is not there; get the archive again")
        names = _names_in_json(store, files[patch])
        yield place, split, Row(posixpath.dirname(files[patch]), _class_text(card, names, f"{store.where}: {place}"))


LISTS = {
    "eurosat_lists": ("eurosat-", ".txt", _read_eurosat_lists),
    "bigearthnet_lists": ("bigearthnet-", ".csv", _read_bigearthnet_lists),
}


def _check_files(card: TaskCard, store: Store, subsets: Mapping[str, Sequence[Row]], layout: str) -> None:
    needed = [row.image for rows in subsets.values() for row in rows]
    if layout == "bigearthnet_lists":
        needed = [f"{name}/{posixpath.basename(name)}_{band.name}.tif" for name in needed for band in card.bands]
    if card.kind == "segmentation":
        needed += [row.label for rows in subsets.values() for row in rows]
    if absent := [name for name in needed if name not in store.names]:
        raise DataError(f"{store.where}: {len(absent)} files of the index are not there, first {absent[0]}; get them")


def _names_in_json(store: Store, name: str) -> list[Any]:
    try:
        return list(json.loads(store.read(name))["labels"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{store.where}: {name} is no JSON with a list of labels ({error}); get it again") from error


def _parse_label(text: str) -> list[Any]:
    """Returns the classes in a cell: one number or name, or a list of them in brackets."""
    if text.startswith("["):
        try:
            return list(ast.literal_eval(text))
        except (ValueError, SyntaxError):
            return [text]
    return [text]


def _class_text(card: TaskCard, found: Iterable[Any], where: str) -> str:
    """Returns class indices with blanks between; a classification has exactly one."""
    known = card.class_values
    indices = []
    for value in found:
        key = int(value) if isinstance(value, str) and re.fullmatch(r"-?\d+", value) else value
        if not isinstance(key, int | str) or key not in known:
            raise DataError(f"{where}: label {value!r} is neither a class nor ignored; correct the card or the file")
        indices.append(known[key])
    indices = sorted({index for index in indices if index != IGNORE})
    if card.kind == "classification" and len(indices) != 1:
        raise DataError(f"{where}: {len(indices)} classes; a classification needs one for each sample")
    return " ".join(map(str, indices))


def _load_index(card: TaskCard, store: Store, cache: Path) -> dict[str, list[Row]]:
    """Reads the index, or the copy of it that an earlier call left beside the data."""
    path = cache / f"index-{_digest((store.fingerprint, _card_facts(card)))[:16]}.csv"
    if path.is_file():
        subsets: dict[str, list[Row]] = {name: [] for name in SUBSETS}
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                subsets[line["split"]].append(Row(line["image"], line["label"]))
        return subsets
    subsets = read_index(card, store)
    for name in SUBSETS:
        stated, found = getattr(card.splits, name), len(subsets[name])
        if stated not in (None, found):
            logger.warning("%s: %d %s samples, the card says %d", card.name, found, name, stated)
    rows = [{"split": name, "image": row.image, "label": row.label} for name in SUBSETS for row in subsets[name]]
    try:
        write_csv(path, rows)
    except OSError as error:
        logger.warning("%s: index not kept (%s), it is read anew each time", card.name, error)
    return subsets


def _measure(card: TaskCard, store: Store, rows: Sequence[Row], cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of the bands over tiles, float32 (channels,); measured once, then kept."""
    path = cache / f"statistics-{_digest((store.fingerprint, _card_facts(card), rows))[:16]}.json"
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        return np.asarray(kept["mean"], np.float32), np.asarray(kept["std"], np.float32)
    count, total, squares = np.zeros((3, len(card.bands)))
    for row in track(rows, f"{card.name}: mean and deviation of the bands", transient=True):
        image = read_image(card, store, row.image).astype(np.float64)
        present = np.isfinite(image)
        values = np.where(present, image, 0)
        count += present.sum((1, 2))
        total += values.sum((1, 2))
        squares += (values**2).sum((1, 2))
    mean = total / np.maximum(count, 1)
    std = np.sqrt(np.maximum(squares / np.maximum(count, 1) - mean**2, 0))
    # what rounding leaves of a constant is not exactly zero
    if flat := [band.name for band, value in zip(card.bands, std > 1e-6 * np.abs(mean), strict=True) if not value]:
        raise DataError(
            f"{store.where}: bands {', '.join(flat)} are constant in training; put mean and std on the card"
        )
    try:
        write_json(path, {"mean": mean, "std": std})
    except OSError as error:
        logger.warning("%s: statistics not kept (%s), they are measured anew each time", card.name, error)
    return mean.astype(np.float32), std.astype(np.float32)


def _regroup(card: TaskCard, subsets: Mapping[str, list[Row]], seed: int) -> dict[str, list[Row]]:
    """Draws training and validation anew, whole groups each."""
    pool = [*subsets["train"], *subsets["validation"]]
    groups: dict[str, list[Row]] = {}
    for row in pool:
        group = group_of(card, row)
        if group is None:
            reason = f"group {card.group!r} does not fit {row.image}" if card.group else "the card has no `group`"
            raise SplitError(f"task {card.name}: split grouped: {reason}; correct the card or use split published")
        groups.setdefault(group, []).append(row)
    if len(groups) < 2:
        raise SplitError(f"task {card.name}: split grouped: one group in all, {next(iter(groups))}; correct `group`")
    names = sorted(groups)
    order = [names[index] for index in np.random.default_rng(seed).permutation(len(names))]
    wanted, held = len(subsets["validation"]), 0
    chosen: set[str] = set()
    for name in order:
        size = len(groups[name])
        if len(chosen) < len(names) - 1 and abs(held + size - wanted) < abs(held - wanted):
            chosen.add(name)
            held += size
    chosen = chosen or {min(order, key=lambda name: len(groups[name]))}
    train = [row for name in names if name not in chosen for row in groups[name]]
    validation = [row for name in names if name in chosen for row in groups[name]]
    return {"train": train, "validation": validation, "test": subsets["test"]}


def _share(card: TaskCard, rows: list[Row], fraction: float, seed: int) -> list[Row]:
    """Draws a share of the rows by whole groups, of each class if a sample has one class; order is kept."""
    if fraction == 1:
        return rows
    units: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        units.setdefault(group_of(card, row) or row.image, []).append(index)
    strata: dict[str, list[list[int]]] = {}
    for members in units.values():
        stratum = rows[members[0]].label if card.kind == "classification" else ""
        strata.setdefault(stratum, []).append(members)
    generator = np.random.default_rng(seed)
    kept: list[int] = []
    for stratum in sorted(strata):
        order = [strata[stratum][index] for index in generator.permutation(len(strata[stratum]))]
        sizes = np.cumsum([len(members) for members in order])
        # the whole groups that come nearest to the share, at least one
        count = int(np.abs(sizes - fraction * sizes[-1]).argmin()) + 1
        kept += [index for members in order[:count] for index in members]
    return [rows[index] for index in sorted(kept)]


def _axes(shape: tuple[int, int, int], channels: int, where: str) -> str:
    first = shape[0] == channels and shape[1] == shape[2]
    last = shape[2] == channels and shape[0] == shape[1]
    if first == last:
        text = " x ".join(map(str, shape))
        problem = "cannot tell bands from rows" if first else "neither bands x side x side nor side x side x bands"
        raise DataError(f"{where}: {text}, {problem} with {channels} bands; correct the card's bands or the file")
    return "channels height width" if first else "height width channels"


def _read_pages(names: Sequence[str], side: int | None) -> Iterator[np.ndarray]:
    for name in names:
        with rasterio.open(name, driver="GTiff") as page:
            yield _read_page(page, side)


def _read_page(page: DatasetReader, side: int | None) -> np.ndarray:
    if side is None:
        return page.read()
    return page.read(out_shape=(page.count, side, side), resampling=Resampling.bilinear)


def _card_facts(card: TaskCard) -> tuple[Any, ...]:
    """Returns what of a card the samples depend on."""
    return card.kind, card.folder, card.layouts, card.bands, card.side, card.classes, card.ignore


def _digest(facts: Any) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()
