"""Tasks like those of GFM-Bench, cut from one labelled scene: tiles with a class, or with a map of classes.

Tiles do not overlap, and whole blocks of them train, validate or test, so that no test tile has a training tile for a
neighbour but at the borders of blocks.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vision_lowrank.argument_types import check_least
from vision_lowrank.data.image_tasks import TaskData
from vision_lowrank.data.scene import IGNORE, Scene, open_scene
from vision_lowrank.data.task_index import SUBSETS
from vision_lowrank.errors import ConfigError, DataError

# layouts drawn before a scene counts as too small
ATTEMPTS = 1000
# classes that training, validation and test must share at least
SHARED = 5
METRICS = {"classification": "accuracy", "segmentation": "macro_miou"}

logger = logging.getLogger(__name__)


class TileDataset(Dataset[dict[str, Tensor]]):
    """Tiles of a scene: "image" (channels, side, side), "wavelengths", "gsd", and "label" () or "mask" (side, side).

    Args:
        image: float32 (channels, height, width), normalised.
        truth: class of each tile (tiles,), or class of each pixel (height, width) with `IGNORE`.
        corners: row and column of each tile's upper left pixel (tiles, 2).
        side: pixels along a side of a tile.
        wavelengths: nanometres (channels,).
        gsd: metres.
        groups: block of each tile (tiles,).
        fingerprint: digest of what the samples are made of.
    """

    def __init__(
        self,
        image: np.ndarray,
        truth: np.ndarray,
        corners: np.ndarray,
        side: int,
        wavelengths: np.ndarray,
        gsd: float,
        groups: np.ndarray,
        fingerprint: str,
    ) -> None:
        self.image = torch.from_numpy(image)
        self.truth = torch.from_numpy(truth)
        self.corners = corners
        self.side = side
        self.shared = {"wavelengths": torch.from_numpy(wavelengths), "gsd": torch.tensor(gsd, dtype=torch.float32)}
        self.groups = groups
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row, column = self.corners[index]
        place = (slice(row, row + self.side), slice(column, column + self.side))
        known = {"label": self.truth[index]} if self.truth.ndim == 1 else {"mask": self.truth[place]}
        return {"image": self.image[:, place[0], place[1]], **self.shared, **known}


def scene_task(
    card: str,
    root: str,
    kind: Literal["classification", "segmentation"],
    side: int,
    seed: int,
    block: int = 16,
    shares: Sequence[float] = (0.5, 0.15),
    every: int = 1,
) -> TaskData:
    """Cuts a task from a scene.

    A tile's class is the most frequent one of its pixels; tiles of which less than half has a label are left out. In a
    segmentation task a tile needs one labelled pixel. Classes that training lacks do not count elsewhere.

    Args:
        card: name of a scene's card, or its path.
        root: data folder.
        kind: classification of tiles or segmentation.
        side: pixels along a side of a tile; divides `block`.
        seed: of which block goes where.
        block: pixels along a side of what goes to one subset as a whole.
        shares: of the tiles, to training and validation; the rest is the test set.
        every: takes each so many-th channel only.

    Raises:
        ConfigError: an option is out of range.
        DataError: the scene cannot be read, or is too small to be divided so.
    """
    if kind not in METRICS or side < 1 or block % side or every < 1:
        raise ConfigError(
            f"scene task: kind={kind!r}, side={side}, block={block}, every={every}; kind is classification or "
            "segmentation, side divides block, every is 1 or more"
        )
    check_least(0, seed=seed)
    if len(shares) != 2 or min(shares) <= 0 or sum(shares) >= 1:
        raise ConfigError(f"scene task: shares={list(shares)} leave nothing for one of training, validation and test")
    train, validation = shares
    scene = open_scene(card, root)
    corners, truth = _tiles(scene, kind, side)
    owner = corners // block @ np.array([10**6, 1])
    subsets = _divide(scene, owner, _classes(scene, corners, truth, side), train, validation, seed)
    labels = scene.labels.copy()
    trained = np.unique(_classes(scene, corners[subsets[0]], None if truth is None else truth[subsets[0]], side))
    labels[~np.isin(labels, trained)] = IGNORE
    known = np.array(
        [
            bool(np.isin(value, trained)) if truth is not None else bool((_cut(labels, corner, side) != IGNORE).any())
            for corner, value in zip(corners, corners[:, 0] if truth is None else truth, strict=True)
        ]
    )
    image = _normalise(scene, corners[subsets[0]], side)[::every]
    wavelengths = scene.bands.wavelengths[::every].astype(np.float32)
    # what the card says of the files counts too: cached features would else go with other labels or pixels
    read = hashlib.sha256(scene.labels.tobytes() + image.tobytes()).hexdigest()
    card_facts = [read, [entry.name for entry in scene.classes], wavelengths.tolist(), scene.gsd]
    facts = [scene.hashes, card_facts, kind, side, seed, block, list(shares), every]
    about = json.dumps(facts, sort_keys=True)
    fingerprint = hashlib.sha256(about.encode()).hexdigest()
    parts = []
    for name, subset in zip(SUBSETS, subsets, strict=True):
        indices = subset[known[subset]]
        target = labels if truth is None else truth[indices]
        told = (side, wavelengths, scene.gsd, owner[indices], f"{fingerprint} {name}")
        parts.append(TileDataset(image, target, corners[indices], *told))
    logger.info("%s %s: %d training, %d validation, %d test tiles", scene.name, kind, *(len(part) for part in parts))
    return TaskData(
        name=f"{scene.name}_{kind}",
        kind=kind,
        classes=tuple(entry.name for entry in scene.classes),
        metric=METRICS[kind],
        wavelengths=wavelengths,
        gsd=scene.gsd,
        fingerprint=fingerprint,
        train=parts[0],
        validation=parts[1],
        test=parts[2],
        files=dict(scene.hashes),
    )


def _cut(plane: np.ndarray, corner: np.ndarray, side: int) -> np.ndarray:
    return plane[corner[0] : corner[0] + side, corner[1] : corner[1] + side]


def _tiles(scene: Scene, kind: str, side: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the corners of usable tiles (tiles, 2), and their classes (tiles,) if a tile has one."""
    height, width = scene.labels.shape
    grid = [(row, column) for row in range(0, height - side + 1, side) for column in range(0, width - side + 1, side)]
    corners, classes = [], []
    for corner in np.array(grid):
        found = _cut(scene.labels, corner, side)
        found = found[found != IGNORE]
        if found.size * 2 >= side * side or (kind == "segmentation" and found.size):
            corners.append(corner)
            classes.append(np.bincount(found).argmax())
    if not corners:
        raise DataError(f"scene {scene.name} has no labelled tile of {side} x {side} pixels; take a smaller side")
    return np.array(corners), None if kind == "segmentation" else np.array(classes, np.int64)


def _classes(scene: Scene, corners: np.ndarray, truth: np.ndarray | None, side: int) -> np.ndarray:
    """Returns for each tile which classes it holds, int64 (tiles, most); rows are filled up by repetition."""
    if truth is not None:
        return truth[:, None]
    held = [np.unique(tile[tile != IGNORE]) for tile in (_cut(scene.labels, corner, side) for corner in corners)]
    most = max(map(len, held))
    return np.array([np.resize(classes, most) for classes in held], np.int64)


def _divide(
    scene: Scene, owner: np.ndarray, classes: np.ndarray, train: float, validation: float, seed: int
) -> list[np.ndarray]:
    """Returns the indices of the tiles that train, validate and test; whole blocks, drawn until classes are shared."""
    generator = np.random.default_rng([seed, 5])
    blocks = np.unique(owner)
    for _ in range(ATTEMPTS):
        rank = np.empty(len(blocks), int)
        rank[generator.permutation(len(blocks))] = np.arange(len(blocks))
        position = rank[np.searchsorted(blocks, owner)]
        order = np.argsort(position, kind="stable")
        # a block goes where its first tile falls
        first = np.searchsorted(position[order], position, side="left") / len(owner)
        subset = (first >= train).astype(int) + (first >= train + validation)
        found = [set(np.unique(classes[subset == index])) for index in range(3)]
        if len(set.intersection(*found)) >= min(SHARED, len(np.unique(classes))):
            return [np.flatnonzero(subset == index) for index in range(3)]
    raise DataError(
        f"scene {scene.name}: none of {ATTEMPTS} divisions of {len(blocks)} blocks has {SHARED} classes in training, "
        "validation and test; take smaller blocks"
    )


def _normalise(scene: Scene, corners: np.ndarray, side: int) -> np.ndarray:
    """Returns the image with mean 0 and deviation 1 of each band over the valid pixels of the training tiles."""
    trains = np.zeros_like(scene.valid)
    for row, column in corners:
        trains[row : row + side, column : column + side] = True
    pixels = scene.image[:, trains & scene.valid]
    mean, deviation = pixels.mean(1), pixels.std(1)
    if (deviation == 0).any():
        raise DataError(f"scene {scene.name}: a band is constant in the training tiles; leave it out")
    image = (scene.image - mean[:, None, None]) / deviation[:, None, None]
    return np.where(scene.valid, image, 0).astype(np.float32)
