"""Which samples a benchmark task has: its index, in every layout that the archives come in, and shares of it."""

import ast
import csv
import hashlib
import io
import json
import logging
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vision_lowrank.data.archives import Store
from vision_lowrank.data.scene import IGNORE
from vision_lowrank.data.task_cards import TaskCard
from vision_lowrank.errors import DataError, SplitError
from vision_lowrank.runs import write_csv

logger = logging.getLogger(__name__)

SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
SUBSETS = ("train", "validation", "test")


@dataclass(frozen=True)
class Row:
    """One sample in the index.

    Attributes:
        image: TIFF file in the store, or folder with one TIFF a band.
        label: class index; class indices with blanks between; or the file of the label map.
        radar: as `image`, of the radar tile; empty where there is none.
    """

    image: str
    label: str
    radar: str = ""


def band_files(folder: str, bands: Sequence[str]) -> list[str]:
    """Returns the names of the TIFF files, one a band, of a tile that is a folder."""
    return [f"{folder}/{posixpath.basename(folder)}_{band}.tif" for band in bands]


def digest(card: TaskCard, store: Store, *further: Any) -> str:
    """Returns what tells samples from others, hexadecimal: the files, what the card says of them, and `further`."""
    facts = (card.kind, card.folder, card.layouts, card.bands, card.radar, card.side, card.classes, card.ignore)
    return hashlib.sha256(repr((store.fingerprint, facts, *further)).encode()).hexdigest()


def index_digest(subsets: Mapping[str, Sequence[Row]]) -> str:
    """Returns the sha256 of which samples there are and of their labels, in the order of the index."""
    lines = (f"{name}\0{row.image}\0{row.label}\0{row.radar}\n" for name in SUBSETS for row in subsets[name])
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def group_of(card: TaskCard, row: Row) -> str | None:
    """Returns what the card's `group` finds in the name of a tile, None where it does not fit or there is none."""
    match = card.group and re.fullmatch(card.group, posixpath.splitext(posixpath.basename(row.image))[0])
    return match[1] if match else None


def load_index(card: TaskCard, store: Store, cache: Path) -> dict[str, list[Row]]:
    """Reads the index, or the copy of it that an earlier call left in the folder `cache`; errors of `read_index`."""
    path = cache / f"index-{digest(card, store)[:16]}.csv"
    if path.is_file():
        subsets: dict[str, list[Row]] = {name: [] for name in SUBSETS}
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                subsets[line["split"]].append(Row(line["image"], line["label"], line["radar"]))
        return subsets
    subsets = read_index(card, store)
    for name in SUBSETS:
        stated, found = getattr(card.splits, name), len(subsets[name])
        if stated not in (None, found):
            logger.warning("%s: %d %s samples, the card says %d", card.name, found, name, stated)
    rows = [{"split": name, **vars(row)} for name in SUBSETS for row in subsets[name]]
    try:
        write_csv(path, rows)
    except OSError as error:
        logger.warning("%s: index not kept (%s), it is read anew each time", card.name, error)
    return subsets


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
        image, path = (_inside(card, line[column]) for column in ("optical_path", target))
        if card.kind == "segmentation":
            label = path
        elif target == "label_path":
            label = _class_text(card, _names_in_json(store, path), f"{store.where}: {path}")
        else:
            label = _class_text(card, _parse_label(line[target]), f"{store.where}: {place}")
        radar = line.get("radar_path") if card.radar else None
        yield place, line["split"] or "", Row(image, label, _inside(card, radar) if radar else "")


def _inside(card: TaskCard, path: str) -> str:
    return posixpath.normpath(posixpath.join(card.folder, path))


def _find_lists(store: Store, start: str, end: str) -> dict[str, str]:
    """Returns the file of each split list by split, where all three are there."""
    wanted = {f"{start}{split}{end}": split for split in ("train", "val", "test")}
    files = _by_ending(store, tuple(wanted))
    found = {split: files[base] for base, split in wanted.items() if base in files}
    return found if len(found) == len(wanted) else {}


def _by_ending(store: Store, ending: str | tuple[str, ...]) -> dict[str, str]:
    """Returns the files whose names end so by these names, without their folders.

    Raises:
        DataError: two files have one name, so that nothing tells which is meant.
    """
    found: dict[str, str] = {}
    for name in sorted(name for name in store.names if name.endswith(ending)):
        other = found.setdefault(posixpath.basename(name), name)
        if other != name:
            raise DataError(f"{store.where}: {other} and {name} have one name, which tells samples apart; keep one")
    return found


def _lines(store: Store, lists: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for split, name in lists.items():
        for number, line in enumerate(store.read(name).decode("utf-8-sig").splitlines(), start=1):
            if line.strip():
                yield f"{name} line {number}", split, line.strip()


def _read_eurosat_lists(card: TaskCard, store: Store, lists: Mapping[str, str]) -> Iterator[tuple[str, str, Row]]:
    """Reads lines such as `River_12.jpg`, which mean the file `River_12.tif` wherever it lies."""
    images = _by_ending(store, ".tif")
    for place, split, line in _lines(store, lists):
        stem = posixpath.splitext(posixpath.basename(line))[0]
        label = _class_text(card, [stem.rpartition("_")[0]], f"{store.where}: {place}")
        yield place, split, Row(images.get(f"{stem}.tif", f"{stem}.tif"), label)


def _read_bigearthnet_lists(card: TaskCard, store: Store, lists: Mapping[str, str]) -> Iterator[tuple[str, str, Row]]:
    """Reads lines with the folder of a tile, which holds a TIFF a band and a JSON file of class names, and radar's."""
    ending = "_labels_metadata.json"
    files = _by_ending(store, ending)
    first = f"_{card.radar[0].name}.tif" if card.radar else ""
    radar = _by_ending(store, first) if first else {}
    for place, split, line in _lines(store, lists):
        patch, _, other = line.partition(",")
        if (file := files.get(f"{patch}{ending}")) is None:
            raise DataError(f"{store.where}: {place}: {patch}{ending} is not there; get the archive again")
        label = _class_text(card, _names_in_json(store, file), f"{store.where}: {place}")
        tile = posixpath.dirname(radar.get(f"{other.strip()}{first}", ""))
        yield place, split, Row(posixpath.dirname(file), label, tile)


LISTS = {
    "eurosat_lists": ("eurosat-", ".txt", _read_eurosat_lists),
    "bigearthnet_lists": ("bigearthnet-", ".csv", _read_bigearthnet_lists),
}


def _check_files(card: TaskCard, store: Store, subsets: Mapping[str, Sequence[Row]], layout: str) -> None:
    rows = [row for subset in subsets.values() for row in subset]
    needed = [row.image for row in rows]
    radar = [row.radar for row in rows if row.radar]
    if layout == "bigearthnet_lists":
        needed = [file for name in needed for file in band_files(name, [band.name for band in card.bands])]
        radar = [file for name in radar for file in band_files(name, [band.name for band in card.radar])]
    needed += radar
    if card.kind == "segmentation":
        needed += [row.label for row in rows]
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
    found = list(found)
    # a vector of 0 and 1, one a class, would pass for the classes 0 and 1
    if twice := [value for value in found if found.count(value) > 1]:
        raise DataError(f"{where}: label {twice[0]!r} is there twice; list each class once, by its index or name")
    for value in found:
        key = int(value) if isinstance(value, str) and re.fullmatch(r"-?\d+", value) else value
        if not isinstance(key, int | str) or key not in known:
            raise DataError(f"{where}: label {value!r} is neither a class nor ignored; correct the card or the file")
        indices.append(known[key])
    indices = sorted({index for index in indices if index != IGNORE})
    if card.kind == "classification" and len(indices) != 1:
        raise DataError(f"{where}: {len(indices)} classes; a classification needs one for each sample")
    return " ".join(map(str, indices))


def regroup(card: TaskCard, subsets: Mapping[str, list[Row]], seed: int) -> dict[str, list[Row]]:
    """Draws training and validation anew, whole groups each, in sizes as near to the old ones as groups allow.

    Raises:
        SplitError: the groups are unknown or too few.
    """
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


def share(card: TaskCard, rows: list[Row], fraction: float, seed: int) -> list[Row]:
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
