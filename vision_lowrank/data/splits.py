"""Splits of a scene's labelled pixels into training, validation and test, with the leakage between them.

A random split of pixels is what most papers use; with patches around the pixels it lets a model see test pixels while
it trains. Block splits with guard bands do not. Every split tells its leakage.
"""

import hashlib
import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import maximum_filter

from vision_lowrank.data.scene import IGNORE, class_counts
from vision_lowrank.errors import SplitError
from vision_lowrank.runs import atomic_path

SUBSETS = ("train", "validation", "test")
# block layouts drawn before a scene counts as too small for the request
LAYOUT_ATTEMPTS = 2000
# training pixels may fall short of the request by 15 % and exceed it by 5 %: blocks are whole
LEAST_SHARE, MOST_SHARE = 0.85, 1.05


@dataclass(frozen=True)
class Split:
    """Which pixels train, validate and test.

    Attributes:
        kind: "random", "blocks" or "from_file".
        train: flat indices (row * width + column), int64, sorted.
        validation: likewise.
        test: likewise.
        shape: (height, width) of the label map.
        parameters: how it was made, as plain JSON values.
        seed: of every random choice in it.
    """

    kind: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    shape: tuple[int, int]
    seed: int
    parameters: dict[str, Any] = field(default_factory=dict)

    def subsets(self) -> dict[str, np.ndarray]:
        """Returns the indices by the name of the subset."""
        return {name: getattr(self, name) for name in SUBSETS}

    def digest(self) -> str:
        """Returns the sha256 of shape and indices; two splits are the same pixels if it is equal."""
        sha = hashlib.sha256(np.asarray(self.shape, dtype="<i8").tobytes())
        for indices in self.subsets().values():
            sha.update(np.asarray([indices.size], dtype="<i8").tobytes())
            sha.update(indices.astype("<i8").tobytes())
        return sha.hexdigest()

    def leakage(self, patch_size: int) -> float:
        """Returns the share of test pixels whose patch contains a training pixel.

        Exact. Patches that reach over the border are filled by reflection, which only repeats pixels that lie within
        the patch's reach anyway.
        """
        if self.test.size == 0:
            return 0.0
        trained = np.zeros(self.shape, dtype=np.uint8)
        trained.flat[self.train] = 1
        reached = maximum_filter(trained, size=patch_size, mode="constant", cval=0)
        return float(reached.flat[self.test].mean())

    def check(self, labels: np.ndarray) -> None:
        """Makes sure that the subsets are sorted and disjoint and hold labelled pixels of this map, of several classes.

        Raises:
            SplitError: they are not.
        """
        if labels.shape != self.shape:
            raise SplitError(f"split: made for {self.shape[0]} x {self.shape[1]} pixels, the scene has {labels.shape}")
        owner = np.full(labels.size, "", dtype="U10")
        for name, indices in self.subsets().items():
            if indices.size == 0:
                raise SplitError(f"split {self.kind}: no {name} pixels; ask for fewer of the others or more blocks")
            if (np.diff(indices) <= 0).any() or indices[0] < 0 or indices[-1] >= labels.size:
                raise SplitError(f"split {self.kind}: {name} indices are not sorted, distinct and within the scene")
            shared = indices[owner[indices] != ""]
            if shared.size:
                raise SplitError(f"split {self.kind}: {name} shares {shared.size} pixels with {owner[shared[0]]}")
            if (labels.flat[indices] == IGNORE).any():
                raise SplitError(f"split {self.kind}: {name} holds unlabelled pixels; was it made for this scene?")
            owner[indices] = name
        if np.ptp(labels.flat[self.train]) == 0:
            raise SplitError(f"split {self.kind}: all training pixels are of one class; nothing can be told apart")

    def save(self, path: str | Path) -> None:
        """Writes the split as .npz (plain arrays, no pickle) with its digest."""
        about = {"kind": self.kind, "seed": self.seed, "parameters": self.parameters, "sha256": self.digest()}
        with atomic_path(path) as temporary:
            arrays = {**self.subsets(), "shape": np.asarray(self.shape), "about": np.asarray(json.dumps(about))}
            np.savez_compressed(temporary, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Split":
        """Reads a split written by `save`.

        Raises:
            SplitError: the file is missing or damaged, or its pixels are not those of the stored digest.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                height, width = (int(length) for length in file["shape"])
                subsets = {name: file[name] for name in SUBSETS}
            split = cls(
                about["kind"], **subsets, shape=(height, width), seed=about["seed"], parameters=about["parameters"]
            )
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise SplitError(f"split file {path}: missing or damaged ({error}); make it anew") from error
        if split.digest() != about["sha256"]:
            raise SplitError(f"split file {path}: its pixels do not match its sha256 {about['sha256']}; make it anew")
        return split


def random_split(
    labels: np.ndarray,
    num_classes: int,
    train: float | int,
    validation: float | int,
    seed: int,
    names: Sequence[str] = (),
) -> Split:
    """Draws pixels at random within each class; the rest is the test set. The protocol of most papers: it leaks.

    Args:
        labels: class indices (height, width).
        num_classes: number of classes; one without pixels takes no part.
        train: share of each class's pixels, or a whole number of pixels a class.
        validation: likewise. With shares, a class gives round(n * (train + validation)) pixels to both together, and
            of these the rounded share to validation: classes of few pixels all to training, at least one.
        seed: of the draw.
        names: of the classes, for errors.

    Raises:
        SplitError: a class has too few pixels for training and test.
    """
    if isinstance(train, float) != isinstance(validation, float):
        raise SplitError(f"random split: train={train} and validation={validation}; give two shares or two counts")
    # so written that NaN is refused too
    if not (train > 0 and validation > 0) or (isinstance(train, float) and not train + validation < 1):
        raise SplitError(f"random split: train={train}, validation={validation} leave nothing for one of the subsets")
    generator = np.random.default_rng(seed)
    chosen: dict[str, list[np.ndarray]] = {name: [] for name in SUBSETS}
    for index in range(num_classes):
        pixels = generator.permutation(np.flatnonzero(labels == index))
        if pixels.size == 0:
            continue
        if isinstance(train, float):
            both = max(1, _round_half_up(pixels.size * (train + validation)))
            held = min(_round_half_up(both * validation / (train + validation)), both - 1)
        else:
            both, held = train + int(validation), int(validation)
        if both >= pixels.size:
            raise SplitError(
                f"random split: class {names[index] if names else index} has {pixels.size} labelled pixels; training "
                f"and validation take {both} and the test needs one: lower `train` or `validation`, or merge the class"
            )
        parts = np.split(pixels, [both - held, both])
        for name, part in zip(SUBSETS, parts, strict=True):
            chosen[name].append(part)
    subsets = {name: np.sort(np.concatenate(parts or [np.empty(0, np.int64)])) for name, parts in chosen.items()}
    return _checked(labels, "random", subsets, seed, {"train": train, "validation": validation})


def block_split(
    labels: np.ndarray,
    num_classes: int,
    guard: int,
    seed: int,
    block_size: int = 16,
    train_pixels: int = 1000,
    validation_pixels: int = 250,
    shared_classes: int = 6,
    validation_classes: int = 3,
    test_pixels: int = 500,
) -> Split:
    """Gives whole blocks of a grid to training, validation or test, with unused guard bands between the blocks.

    With `guard` >= patch size - 1 no patch of one subset shares a pixel with a patch of another. Place of the grid and
    order of the blocks are random; layouts are drawn until the counts below hold. Labels are looked at for these counts
    only. Classes that training lacks are taken out of validation and test; `parameters["absent_classes"]` lists them,
    `parameters["dropped_pixels"]` counts their pixels.

    Args:
        labels: class indices (height, width).
        num_classes: number of classes.
        guard: width in pixels of the bands between blocks.
        seed: of the layout.
        block_size: side of a block in pixels; blocks at the border of the scene may be cut.
        train_pixels: labelled pixels to train on; between 0.85 and 1.05 times this many, by whole blocks, a block that
            would exceed it is thinned out at random.
        validation_pixels: likewise.
        shared_classes: classes that training and test must share at least (all, where the scene has fewer).
        validation_classes: classes that validation must hold at least: an epoch chosen on one class is chosen badly.
        test_pixels: pixels the test must have at least.

    Raises:
        SplitError: no drawn layout has these counts.
    """
    if guard < 0 or min(block_size, train_pixels, validation_pixels) < 1:
        raise SplitError(
            f"block split: block_size={block_size}, guard={guard}, train_pixels={train_pixels}, "
            f"validation_pixels={validation_pixels}; give a guard of 0 or more, of the others 1 or more"
        )
    generator = np.random.default_rng(seed)
    present = int((class_counts(labels, num_classes) > 0).sum())
    best = "no layout reached the training and validation pixels"
    for attempt in range(LAYOUT_ATTEMPTS):
        blocks, origin = _draw_blocks(labels, block_size, guard, generator)
        train, blocks = _take_blocks(blocks, train_pixels, generator)
        if train is None:
            continue
        trained = class_counts(labels.flat[train], num_classes) > 0
        known = [block[trained[labels.flat[block]]] for block in blocks]
        validation, known = _take_blocks(known, validation_pixels, generator)
        if validation is None:
            continue
        test = np.concatenate([*known, np.empty(0, np.int64)])
        shared = int((trained & (class_counts(labels.flat[test], num_classes) > 0)).sum())
        held = np.unique(labels.flat[validation]).size
        if test.size < test_pixels or shared < min(shared_classes, present) or held < min(validation_classes, present):
            best = f"the last one had {shared} shared and {held} validation classes and {test.size} test pixels"
            continue
        others = np.concatenate(blocks)
        unknown = others[~trained[labels.flat[others]]]
        parameters = {
            "block_size": block_size,
            "guard": guard,
            "train_pixels": train_pixels,
            "validation_pixels": validation_pixels,
            "shared_classes": shared,
            "origin": list(origin),
            "layouts_drawn": attempt + 1,
            "absent_classes": np.unique(labels.flat[unknown]).tolist(),
            "dropped_pixels": int(unknown.size),
        }
        subsets = {"train": np.sort(train), "validation": np.sort(validation), "test": np.sort(test)}
        return _checked(labels, "blocks", subsets, seed, parameters)
    raise SplitError(
        f"block split: none of {LAYOUT_ATTEMPTS} layouts with blocks of {block_size} and guards of {guard} pixels gave "
        f"{train_pixels} training, {validation_pixels} validation and {test_pixels} test pixels with {shared_classes} "
        f"shared and {validation_classes} validation classes; {best}: ask for less, or take smaller blocks or patches"
    )


def file_split(
    labels: np.ndarray,
    train_map: np.ndarray,
    test_map: np.ndarray | None,
    validation: float,
    seed: int,
    source: str,
) -> Split:
    """Takes training and test pixels from published label maps; validation is drawn from the training pixels.

    Args:
        labels: class indices (height, width) of the scene.
        train_map: class indices (height, width) of the training pixels, `IGNORE` elsewhere.
        test_map: likewise of the test pixels; None for every labelled pixel that is not in `train_map`.
        validation: share of each class's training pixels that is held out for validation, at least one.
        seed: of the validation draw.
        source: file of the training map, named in errors and kept in `parameters`.

    Raises:
        SplitError: the share is none, the maps contradict the scene or each other, or a class has too few pixels.
    """
    if not 0 < validation < 1:
        raise SplitError(f"split from {source}: validation={validation}; give a share above 0 and below 1")
    for pixels in (train_map, labels if test_map is None else test_map):
        if pixels.shape != labels.shape:
            raise SplitError(
                f"split from {source}: shape {pixels.shape}, the scene has {labels.shape}; take its own file"
            )
        wrong = (pixels != IGNORE) & (pixels != labels)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise SplitError(
                f"split from {source}: {wrong.sum()} pixels have another class than in the scene, first at row {row}, "
                f"column {column}; take the file that belongs to this scene"
            )
    published = np.flatnonzero(train_map != IGNORE)
    test = np.flatnonzero(labels != IGNORE if test_map is None else test_map != IGNORE)
    test = np.setdiff1d(test, published) if test_map is None else test
    generator = np.random.default_rng(seed)
    held = []
    for index in np.unique(labels.flat[published]):
        pixels = published[labels.flat[published] == index]
        if pixels.size < 2:
            raise SplitError(f"split from {source}: class index {index} has 1 training pixel, validation needs one too")
        count = min(max(1, _round_half_up(pixels.size * validation)), pixels.size - 1)
        held.append(generator.choice(pixels, count, replace=False))
    chosen = np.sort(np.concatenate(held)) if held else published
    subsets = {"train": np.setdiff1d(published, chosen), "validation": chosen, "test": test}
    return _checked(labels, "from_file", subsets, seed, {"train_file": source, "validation": validation})


def _checked(
    labels: np.ndarray, kind: str, subsets: dict[str, np.ndarray], seed: int, parameters: dict[str, Any]
) -> Split:
    height, width = labels.shape
    subsets = {name: indices.astype(np.int64) for name, indices in subsets.items()}
    split = Split(kind, **subsets, shape=(height, width), seed=seed, parameters=parameters)
    split.check(labels)
    return split


def _round_half_up(value: float) -> int:
    # shares such as 0.09 + 0.01 fall short of 0.1 in binary
    return math.floor(value + 0.5 + 1e-9)


def _draw_blocks(
    labels: np.ndarray, block_size: int, guard: int, generator: np.random.Generator
) -> tuple[list[np.ndarray], tuple[int, int]]:
    """Returns the labelled pixels of each block of a randomly placed grid, in random order, and the grid's origin."""
    pitch = block_size + guard
    top, left = (int(offset) for offset in generator.integers(pitch, size=2))
    rows, columns = np.divmod(np.flatnonzero(labels != IGNORE), labels.shape[1])
    # the grid starts one pitch before its origin, so that blocks cut by the border count too
    block_rows, inner_rows = np.divmod(rows - top + pitch, pitch)
    block_columns, inner_columns = np.divmod(columns - left + pitch, pitch)
    inside = (inner_rows < block_size) & (inner_columns < block_size)
    flat = (rows * labels.shape[1] + columns)[inside]
    numbers = (block_rows * (labels.shape[1] // pitch + 2) + block_columns)[inside]
    order = np.argsort(numbers, kind="stable")
    blocks = np.split(flat[order], np.flatnonzero(np.diff(numbers[order])) + 1)
    return [blocks[index] for index in generator.permutation(len(blocks))], (top, left)


def _take_blocks(
    blocks: list[np.ndarray], pixels: int, generator: np.random.Generator
) -> tuple[np.ndarray | None, list[np.ndarray]]:
    """Returns the pixels of the first blocks up to about `pixels` (None if all are too few), and the other blocks."""
    sizes = np.cumsum([block.size for block in blocks])
    fitting = int((sizes <= MOST_SHARE * pixels).sum())
    if fitting and sizes[fitting - 1] >= LEAST_SHARE * pixels:
        return np.concatenate(blocks[:fitting]), blocks[fitting:]
    if fitting == len(blocks):
        return None, blocks
    taken = np.concatenate(blocks[: fitting + 1])
    return generator.choice(taken, pixels, replace=False), blocks[fitting + 1 :]
