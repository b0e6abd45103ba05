"""Benchmark tasks as datasets: tiles and labels read out of the archive of a task card."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vision_lowrank.data.archives import Store, open_store
from vision_lowrank.data.scene import IGNORE
from vision_lowrank.data.task_cards import SENSORS, TaskCard, load_task_card
from vision_lowrank.data.task_index import SUBSETS, Row, digest, group_of, index_digest, load_index, regroup, share
from vision_lowrank.data.task_tiles import read_image, read_mask, read_radar
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
    where a value is missing; `wavelengths` in nanometres float32 (channels,), of radar channels their codes; `gsd` in
    metres float32 (); and `label` int64 (), `labels` float32 (classes,), or `mask` int64 (height, width) with `IGNORE`.

    Attributes:
        images: file of each tile, text (len,).
        groups: what each sample belongs to, text (len,); crops of one image share it.
        fingerprint: hexadecimal digest of what the samples are made of.

    Args:
        card: of the task.
        store: of its files.
        rows: the samples.
        mean: of the channels, float32 (channels,).
        std: likewise.
        sensors: optical, radar, or both; radar channels come last.
    """

    def __init__(
        self,
        card: TaskCard,
        store: Store,
        rows: Sequence[Row],
        mean: np.ndarray,
        std: np.ndarray,
        sensors: Sequence[str] = SENSORS[:1],
    ) -> None:
        self.card = card
        self.store = store
        self.sensors = tuple(sensors)
        # arrays and not lists: worker processes would copy these as soon as they count references
        self.images = np.asarray([row.image for row in rows])
        self._labels = np.asarray([row.label for row in rows])
        self._radar = np.asarray([row.radar for row in rows])
        self.groups = np.asarray([group_of(card, row) or row.image for row in rows])
        self.fingerprint = digest(card, store, mean.tolist(), std.tolist(), card.gsd, rows)
        self._mean, self._std = mean[:, None, None], std[:, None, None]
        self._shared = {"wavelengths": torch.from_numpy(card.channels(sensors)), "gsd": torch.tensor(card.gsd)}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = Row(str(self.images[index]), str(self._labels[index]), str(self._radar[index]))
        parts = [read_image(self.card, self.store, row.image)] if "optical" in self.sensors else []
        parts += [read_radar(self.card, self.store, row.radar)] if "radar" in self.sensors else []
        if len({part.shape[1:] for part in parts}) > 1:
            sizes = f"{parts[0].shape[1:]}, {row.radar} {parts[1].shape[1:]}"
            raise DataError(f"{self.store.where}: {row.image} is {sizes}; pair other files")
        image = np.concatenate(parts) if len(parts) > 1 else parts[0]
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
        wavelengths: centres of the channels in nanometres, of radar channels their codes, float32 (channels,).
        gsd: pixel size in metres.
        fingerprint: hexadecimal digest of what the samples are made of.
        train: samples to train on; like the next two a map-style dataset with `groups` and `fingerprint`, see
            `TaskSamples`.
        validation: samples to choose hyper-parameters on.
        test: samples to report on.
        radar: how many channels, the last ones, are radar.
        files: for the record of a run, what the data lie in: sizes and hashes by name, as JSON holds them.
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
    radar: int = 0
    files: Mapping[str, Any] = field(default_factory=dict)


def open_task(
    card: TaskCard | str | Path,
    root: str | Path,
    split: str = "published",
    fraction: float = 1.0,
    seed: int = 0,
    sensors: Sequence[str] = SENSORS[:1],
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
        sensors: optical, radar, or both.

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
    wavelengths = card.channels(sensors)
    if missing := card.missing(root):
        raise DataError(f"task {card.name}: {len(missing)} files not found; {card.how_to_get(missing, root)}")
    parts = [path for entry in card.archive.files() for path in card.find(entry, root)]
    store = open_store(card.unpacked(root) or parts)
    cache = card.folders(root)[0] / ".cache"
    subsets = load_index(card, store, cache)
    files = {
        # nothing for an unpacked folder
        "archive": {} if card.unpacked(root) else {path.name: path.stat().st_size for path in parts},
        "members": store.contents,
        "index": index_digest(subsets),
    }
    if split == "grouped":
        subsets = regroup(card, subsets, seed)
    elif card.group is not None and any(group_of(card, row) is None for row in subsets["train"]):
        logger.warning("%s: names of tiles are not as group %r expects; each is its own group", card.name, card.group)
    if "radar" in sensors and (lacking := sum(not row.radar for rows in subsets.values() for row in rows)):
        raise DataError(
            f"{store.where}: {lacking} samples without radar; use sensors=[optical], or get the archive again"
        )
    if leaks := _leaks(card, subsets):
        logger.warning(
            "%s: %d tiles for training and validation are held out too, or of an image of the test, first %s; scores "
            "are too good",
            *(card.name, len(leaks), leaks[0]),
        )
    mean, std = _statistics(card, store, subsets["train"], cache, sensors)
    subsets["train"] = share(card, subsets["train"], fraction, seed)
    return TaskData(
        name=card.name,
        kind=cast(Kind, card.kind),
        classes=tuple(entry.name for entry in card.classes),
        metric=card.metric,
        wavelengths=wavelengths,
        gsd=card.gsd,
        fingerprint=digest(card, store, mean.tolist(), std.tolist(), card.gsd, subsets),
        radar=len(card.radar) if "radar" in sensors else 0,
        files=files,
        **{name: TaskSamples(card, store, subsets[name], mean, std, sensors) for name in SUBSETS},
    )


def _leaks(card: TaskCard, subsets: Mapping[str, Sequence[Row]]) -> list[str]:
    """Returns the tiles to train or validate on that share an image with the test, or to train and validate on.

    Crops of one image in training and validation are not among them: the cards tell of these.
    """
    tested = {group_of(card, row) or row.image for row in subsets["test"]}
    validated = {row.image for row in subsets["validation"]}
    used = [*subsets["train"], *subsets["validation"]]
    return sorted(
        {row.image for row in used if (group_of(card, row) or row.image) in tested}
        | {row.image for row in subsets["train"] if row.image in validated}
    )


def read_through(card: TaskCard, root: str | Path, num_workers: int, sensors: Sequence[str] = SENSORS[:1]) -> None:
    """Reads every tile and label of a task, so that damage is known before anything is built on them.

    A note beside the data keeps a second call from reading them again.

    Args:
        card: of the task.
        root: see `open_task`.
        num_workers: processes that read.
        sensors: see `open_task`.

    Raises:
        DataError: see `open_task`; or a tile or label map is damaged or contradicts the card, the first that was met;
            or a tile is too small to be cropped, or none of a subset has a label.
    """
    task = open_task(card, root, sensors=sensors)
    what = digest(card, task.train.store, task.fingerprint, card.protocol.crop)
    note = card.folders(root)[0] / ".cache" / f"read-{what[:16]}.json"
    if note.is_file():
        return
    for name in SUBSETS:
        found = _Trial(getattr(task, name))
        loader = DataLoader(found, READ_AT_ONCE, num_workers=num_workers, collate_fn=list)
        labelled = False
        for told in track(loader, f"{card.name}: reading every {name} tile", transient=True):
            if damage := [text for text, _ in told if text is not None]:
                raise DataError(damage[0])
            labelled |= any(has_label for _, has_label in told)
        if not labelled:
            raise DataError(f"{found.samples.store.where}: no {name} sample has a label; correct the card or the files")
    _keep(card, note, {"samples": sum(len(getattr(task, name)) for name in SUBSETS)}, "that all tiles can be read is")


class _Trial(Dataset[tuple[str | None, bool]]):
    """What is wrong with each sample, and whether anything in it has a label.

    The first as text, since errors of a worker process reach the caller as tracebacks.
    """

    def __init__(self, samples: TaskSamples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[str | None, bool]:
        try:
            sample = self.samples[index]
        except DataError as error:
            return str(error), False
        card, side = self.samples.card, sample["image"].shape[-1]
        # tiles of a stated side are of that one
        if card.side is None and side < card.protocol.crop:
            image = f"{self.samples.store.where}: {self.samples.images[index]}"
            return f"{image} has a side of {side} pixels, below the card's crop of {card.protocol.crop}", False
        if card.kind == "segmentation":
            return None, bool((sample["mask"] != IGNORE).any())
        return None, card.kind == "classification" or bool(sample["labels"].any())


def _statistics(
    card: TaskCard, store: Store, rows: Sequence[Row], cache: Path, sensors: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of the channels of sensors, float32 (channels,)."""
    optical = card.statistics() or _measure(card, store, rows, cache) if "optical" in sensors else None
    radar = ([band.mean for band in card.radar], [band.std for band in card.radar]) if "radar" in sensors else None
    mean, std = (np.concatenate(parts) for parts in zip(*filter(None, (optical, radar)), strict=True))
    return mean.astype(np.float32), std.astype(np.float32)


def _measure(card: TaskCard, store: Store, rows: Sequence[Row], cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of the bands over tiles, float32 (channels,); measured once, then kept."""
    path = cache / f"moments-{digest(card, store, rows)[:16]}.json"
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
