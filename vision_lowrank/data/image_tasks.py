"""Benchmark tasks as datasets: tiles and labels read out of the archive of a task card."""

import json
import logging
import posixpath
import warnings
from collections.abc import Iterator, Sequence
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
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from vision_lowrank.data.archives import Store, open_store
from vision_lowrank.data.task_cards import TaskCard, load_task_card
from vision_lowrank.data.task_index import SUBSETS, Row, digest, group_of, load_index, regroup, share
from vision_lowrank.errors import ConfigError, DataError
from vision_lowrank.records import nearest
from vision_lowrank.runs import write_json

logger = logging.getLogger(__name__)

# tiles that a process reads for one message to the caller
READ_AT_ONCE = 16

Kind = Literal["classification", "multilabel", "segmentation"]


class TaskSamples(Dataset[dict[str, Tensor]]):
    """Tiles of one split with their labels, read when they are asked for.

    A sample has `image` float32 (channels, height, width) normalised by the mean and standard deviation of each band, 0
    where a value is missing; `wavelengths` in nanometres float32 (channels,); `gsd` in metres float32 (); and `label`
    int64 (), `labels` float32 (classes,), or `mask` int64 (height, width) with `IGNORE`.

    Attributes:
        groups: what each sample belongs to, text (len,); crops of one image share it.
        fingerprint: hexadecimal digest of what the samples are made of.

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
        self.fingerprint = digest(card, store, mean.tolist(), std.tolist(), card.gsd, rows)
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
        train: samples to train on; like the next two a map-style dataset with `groups` and `fingerprint`, see
            `TaskSamples`.
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
    subsets = load_index(card, store, cache)
    if split == "grouped":
        subsets = regroup(card, subsets, seed)
    elif card.group is not None and any(group_of(card, row) is None for row in subsets["train"]):
        logger.warning("%s: names of tiles are not as group %r expects; each is its own group", card.name, card.group)
    mean, std = card.statistics() or _measure(card, store, subsets["train"], cache)
    subsets["train"] = share(card, subsets["train"], fraction, seed)
    return TaskData(
        name=card.name,
        kind=cast(Kind, card.kind),
        classes=tuple(entry.name for entry in card.classes),
        metric=card.metric,
        wavelengths=card.wavelengths,
        gsd=card.gsd,
        fingerprint=digest(card, store, mean.tolist(), std.tolist(), card.gsd, subsets),
        **{name: TaskSamples(card, store, subsets[name], mean, std) for name in SUBSETS},
    )


def read_through(card: TaskCard, root: str | Path, num_workers: int) -> None:
    """Reads every tile and label of a task, so that damage is known before anything is built on them.

    A note beside the data keeps a second call from reading them again.

    Args:
        card: of the task.
        root: see `open_task`.
        num_workers: processes that read.

    Raises:
        DataError: see `open_task`; or a tile or label map is damaged or contradicts the card, the first that was met.
    """
    task = open_task(card, root)
    note = card.folders(root)[0] / ".cache" / f"read-{task.fingerprint[:16]}.json"
    if note.is_file():
        return
    found: Dataset[str | None] = ConcatDataset([_Damage(getattr(task, name)) for name in SUBSETS])
    loader = DataLoader(found, READ_AT_ONCE, num_workers=num_workers, collate_fn=list)
    for told in track(loader, f"{card.name}: reading every tile", transient=True):
        if damage := [text for text in told if text is not None]:
            raise DataError(damage[0])
    _keep(card, note, {"samples": sum(len(getattr(task, name)) for name in SUBSETS)}, "that all tiles can be read is")


class _Damage(Dataset[str | None]):
    """What is wrong with each sample; as text, since errors of a worker process reach the caller as tracebacks."""

    def __init__(self, samples: TaskSamples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> str | None:
        try:
            self.samples[index]
        except DataError as error:
            return str(error)
        return None


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


def _measure(card: TaskCard, store: Store, rows: Sequence[Row], cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of the bands over tiles, float32 (channels,); measured once, then kept."""
    path = cache / f"statistics-{digest(card, store, rows)[:16]}.json"
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
    _keep(card, path, {"mean": mean, "std": std}, "statistics are")
    return mean.astype(np.float32), std.astype(np.float32)


def _keep(card: TaskCard, path: Path, content: Any, what: str) -> None:
    try:
        write_json(path, content)
    except OSError as error:
        logger.warning("%s: %s not kept (%s), but found anew each time", card.name, what, error)


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
