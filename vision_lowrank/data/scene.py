"""A scene: an image cube, its label map and what is known about both, checked against its card."""

import hashlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vision_lowrank.data.bands import Bands
from vision_lowrank.data.cards import DatasetCard, FileEntry, load_card
from vision_lowrank.data.readers import Georeference, Raster, read_raster
from vision_lowrank.data.readers.geo import check_envi, pixel_size, same_crs
from vision_lowrank.data.readers.raster import has_values
from vision_lowrank.errors import DataError

logger = logging.getLogger(__name__)

IGNORE = 255


@dataclass(frozen=True)
class ClassInfo:
    """Name and display colour ("#rrggbb") of a class."""

    name: str
    colour: str


@dataclass(frozen=True)
class Scene:
    """An opened scene.

    Attributes:
        name: the card's name.
        image: float32 (channels, height, width), in the units of the files; 0 where not `valid`.
        labels: int64 (height, width), class indices from 0, `IGNORE` for unlabelled pixels.
        valid: bool (height, width); False where a used band is NaN, infinite or nodata.
        bands: wavelengths in nanometres of the channels of `image`.
        gsd: pixel size in metres.
        classes: by class index.
        georeference: place on the ground where the files have it.
        hashes: sha256 by path below the data folder.
        dropped_bands: indices, in the file, of bands left out because they carry nothing.
    """

    name: str
    image: np.ndarray
    labels: np.ndarray
    valid: np.ndarray
    bands: Bands
    gsd: float
    classes: tuple[ClassInfo, ...]
    georeference: Georeference | None
    hashes: dict[str, str]
    dropped_bands: tuple[int, ...]


def open_scene(card: DatasetCard | str | Path, root: str | Path) -> Scene:
    """Reads the files of a card and checks them against it.

    Bands that are nodata everywhere, constant, or of no use by the file's own word are dropped; pixels with NaN,
    infinite or nodata values in the remaining bands become invalid and lose their label. All is logged as warnings.

    Raises:
        DataError: a file is missing, damaged, or contradicts the card.
    """
    if not isinstance(card, DatasetCard):
        card = load_card(card)
    missing = card.missing(root)
    if missing:
        raise DataError(f"scene {card.name}: {len(missing)} files not found; {card.how_to_get(missing, root)}")
    folders = card.folders(root)
    hashes = {
        # tiles of image and labels often share their names, so the folder belongs to the key
        next(path.relative_to(folder) for folder in folders if path.is_relative_to(folder)).as_posix(): digest
        for entry in card.files.all()
        for path, digest in _digests(card, entry, root)
    }
    raster = read_role(card, card.files.image, root)
    _check_image(card, raster)
    bands = _find_bands(card, raster)
    labels = read_labels(card, card.files.labels, root, raster.georeference) if card.files.labels else None
    if labels is not None:
        _check_counts(card, labels)
    nodata = card.nodata if card.nodata is not None else raster.nodata
    kept, valid = _mask(raster.values, nodata, raster.bad_bands, card.name)
    image = raster.values[: len(kept)]
    if labels is None:
        labels = np.full(valid.shape, IGNORE, dtype=np.int64)
    if not valid.all():
        empty, lost = int((~valid).sum()), int((labels[~valid] != IGNORE).sum())
        logger.warning("%s: %d of %d pixels lack values, %d labelled; left out", card.name, empty, valid.size, lost)
        labels[~valid] = IGNORE
    return Scene(
        name=card.name,
        image=image,
        labels=labels,
        valid=valid,
        bands=bands.select(kept),
        gsd=card.gsd,
        classes=tuple(ClassInfo(entry.name, entry.colour) for entry in card.classes),
        georeference=raster.georeference,
        hashes=hashes,
        dropped_bands=tuple(np.setdiff1d(np.arange(card.shape.channels), kept).tolist()),
    )


def _digests(card: DatasetCard, entry: FileEntry, root: str | Path) -> Iterator[tuple[Path, str]]:
    """Yields the files of an entry with their sha256; with the header of an ENVI raster the binary that it is of."""
    for path in card.find(entry, root):
        yield path, check_file(path, entry)
        if path.suffix.lower() == ".hdr" and entry not in card.files.extra:
            binary = check_envi(path)[1]
            yield binary, check_file(binary, FileEntry(entry.path))


def check_file(path: Path, entry: FileEntry) -> str:
    """Returns the sha256 of a file after comparing size and sha256 with the card.

    Raises:
        DataError: they differ.
    """
    size = path.stat().st_size
    if entry.size is not None and size != entry.size:
        raise DataError(f"{path}: {size} bytes, the card says {entry.size}; delete the file and fetch it again")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if entry.sha256 is not None and digest != entry.sha256.lower():
        raise DataError(f"{path}: sha256 {digest}, the card says {entry.sha256}; delete the file and fetch it again")
    return digest


def read_role(card: DatasetCard, entries: tuple[FileEntry, ...], root: str | Path) -> Raster:
    """Reads the file or tiles of one role, such as `card.files.image`.

    Raises:
        DataError: see `read_raster`.
    """
    paths = [path for entry in entries for path in card.find(entry, root)]
    if not paths:
        raise DataError(f"scene {card.name}: file not found; {card.how_to_get(list(entries), root)}")
    shape = card.shape
    return read_raster(paths, entries[0].key, entries[0].axes, shape.height, shape.width, shape.channels)


def read_labels(
    card: DatasetCard, entries: tuple[FileEntry, ...], root: str | Path, place: Georeference | None = None
) -> np.ndarray:
    """Reads a label map as class indices.

    Args:
        card: says which value is which class.
        entries: the file or tiles of the map.
        root: data folder.
        place: where the image lies; compared with the map's place if both are known.

    Returns:
        int64 (height, width), `IGNORE` where the file has a value of `card.ignore`, nodata or NaN.

    Raises:
        DataError: the map has another shape than the card, lies elsewhere than the image, or has a value that is
            neither a class nor ignored.
    """
    raster = read_role(card, entries, root)
    where = f"label map {entries[0].path}"
    expected = (1, card.shape.height, card.shape.width)
    if raster.values.shape != expected:
        found = " x ".join(map(str, raster.values.shape[1:] if raster.values.shape[0] == 1 else raster.values.shape))
        raise DataError(f"{where}: shape {found}, the image has {expected[1]} x {expected[2]}; take its own map")
    if raster.georeference is not None and place is not None:
        _check_place(card, where, raster.georeference, place)
    values = raster.values[0]
    empty = np.isnan(values)
    if raster.nodata is not None:
        empty |= values == raster.nodata
        # tiles have it as NaN already
        if raster.nodata in card.class_values() and empty.any():
            raise DataError(
                f"{where}: {raster.nodata:g} is its nodata and a class of the card; take it off the file (gdal_edit.py "
                "-unsetnodata), or give the class another value"
            )
    labels = np.full(values.shape, IGNORE, dtype=np.int64)
    known = empty | np.isin(values, card.ignore)
    for index, value in enumerate(card.class_values()):
        members = (values == value) & ~empty
        labels[members] = index
        known |= members
    if not known.all():
        strange = np.unique(values[~known])[:5]
        raise DataError(
            f"{where}: value {', '.join(f'{value:g}' for value in strange)} is neither one of the {len(card.classes)} "
            "classes nor ignored; add it to `classes` or `ignore` of the card"
        )
    return labels


def _find_bands(card: DatasetCard, raster: Raster) -> Bands:
    """Returns the file's bands where the card asks for them, else the card's."""
    where = f"card {card.name}"
    stated = card.bands.on_card(where)
    if card.bands.from_file and raster.bands is not None:
        return raster.bands
    if stated is None:
        raise DataError(f"{where}: {card.files.image[0].path} has no wavelengths; list them in `bands` of the card")
    if card.bands.from_file:
        logger.warning("%s: the image file has no wavelengths; using the evenly spaced ones of the card", card.name)
    return stated


def _check_image(card: DatasetCard, raster: Raster) -> None:
    name = card.files.image[0].path
    stated = (card.shape.height, card.shape.width, card.shape.channels)
    channels, height, width = raster.values.shape
    if (height, width, channels) != stated:
        found = f"{height} x {width} x {channels}"
        wanted = " x ".join(map(str, stated))
        raise DataError(f"{name}: {found} (rows, columns, channels), the card says {wanted}; correct one of them")
    metres = None if raster.georeference is None else pixel_size(raster.georeference)
    if metres is not None and abs(metres / card.gsd - 1) > 0.01:
        raise DataError(f"{name}: pixels of {metres:g} m, the card says gsd {card.gsd:g}; correct it")


def _check_place(card: DatasetCard, where: str, found: Georeference, image: Georeference) -> None:
    if not same_crs(found, image):
        # two texts for the same system may not be known as such, so that this is no error
        logger.warning("%s: has the crs %s, the image %s; taken to be the same", where, found.crs, image.crs)
    extent = np.array([card.shape.width, card.shape.height, 1] * 2)
    drift = np.abs(np.subtract(found.transform, image.transform)) * extent
    # programs that take a pixel's centre for its corner are half a pixel off; a whole one would shift every label
    # rows and columns of a rotated grid go along both axes
    if drift.max() > 0.6 * math.hypot(image.transform[0], image.transform[3]):
        raise DataError(
            f"{where}: lies at {found.transform}, the image at {image.transform} (column and row to coordinates); "
            "take the map that covers the image"
        )


def _check_counts(card: DatasetCard, labels: np.ndarray) -> None:
    counts = class_counts(labels, len(card.classes))
    for entry, count in zip(card.classes, counts, strict=True):
        if entry.pixels is not None and entry.pixels != count:
            raise DataError(
                f"label map of {card.name}: class {entry.name} has {count} pixels, the card says {entry.pixels}; "
                "use the right map or correct `pixels`"
            )


def class_counts(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the number of labelled pixels of each class, int64 (num_classes,)."""
    return np.bincount(labels[labels != IGNORE], minlength=num_classes)


def _mask(image: np.ndarray, nodata: float | None, bad: tuple[int, ...], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Moves the useful bands of `image` to its front, in place, and zeroes pixels that lack values in them.

    In place because a second cube would break the bound on memory.

    Returns:
        Indices of the useful bands, and the valid pixels, bool (height, width).
    """
    some, valid = [], np.ones(image.shape[1:], dtype=bool)
    given_up = []
    for index, band in enumerate(image):
        present = has_values(band, nodata)
        if present.any() and index in bad:
            given_up.append(index)
        elif present.any():
            some.append(index)
            valid &= present
    if not some or not valid.any():
        raise DataError(f"scene {name}: no pixel has a value in every band; check `nodata` ({nodata}) and the image")
    everywhere = bool(valid.all())
    kept = [index for index in some if np.ptp(image[index] if everywhere else image[index][valid]) > 0]
    dropped = sorted(set(range(len(image))) - set(kept) - set(given_up))
    if not kept:
        raise DataError(f"scene {name}: every band is constant; check the image")
    if given_up:
        logger.warning("%s: %d bands that the file calls bad dropped, indices %s", name, len(given_up), given_up)
    if dropped:
        logger.warning("%s: %d bands without values or variation dropped, indices %s", name, len(dropped), dropped)
    for target, origin in enumerate(kept):
        if target != origin:
            image[target] = image[origin]
        if not everywhere:
            image[target][~valid] = 0
    return np.asarray(kept), valid
