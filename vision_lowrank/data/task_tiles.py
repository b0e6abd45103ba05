"""Tiles and label maps of benchmark tasks: TIFF files in whichever axis order, checked against the card."""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import rasterio
from einops import rearrange
from rasterio.enums import Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader, MemoryFile

from vision_lowrank.data.archives import Store
from vision_lowrank.data.plain_tiff import read_plain_pages
from vision_lowrank.data.task_cards import TaskCard
from vision_lowrank.data.task_index import band_files
from vision_lowrank.errors import DataError


def read_image(card: TaskCard, store: Store, name: str) -> np.ndarray:
    """Returns the optical tile as float32 (channels, height, width) in the files' units, NaN where one is missing.

    Args:
        card: says which bands there are, and the side of a tile where it is known.
        store: of the files.
        name: a TIFF file, or a folder with one TIFF a band, brought to the card's side.

    Raises:
        DataError: the file is damaged, or has other bands or another size than the card says.
    """
    return _read_bands(card, store, name, [band.name for band in card.bands])


def read_radar(card: TaskCard, store: Store, name: str) -> np.ndarray:
    """Returns the radar tile as float32 (channels, height, width); arguments and errors as for `read_image`."""
    return _read_bands(card, store, name, [band.name for band in card.radar])


def _read_bands(card: TaskCard, store: Store, name: str, bands: Sequence[str]) -> np.ndarray:
    if name in store.names:
        image = read_tiff(store.read(name), len(bands), f"{store.where}: {name}", blank=True)
    else:
        files = band_files(name, bands)
        parts = [read_tiff(store.read(file), 1, f"{store.where}: {file}", card.side, blank=True) for file in files]
        image = np.concatenate(parts)
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


def read_tiff(content: bytes, channels: int, where: str, side: int | None = None, blank: bool = False) -> np.ndarray:
    """Returns a square TIFF as (channels, height, width) in the type of the file.

    Bands may be the samples of one page, pages of their own, or the columns of pages that hold one row of the image
    each, which is how an array of height x width x channels is often written. Which, is told by the number of bands.

    Args:
        content: the file.
        channels: number of bands.
        where: file, for messages.
        side: rows and columns to resample to, bilinearly; None for those of the file.
        blank: put NaN where the file has the value that it declares to mean none, which makes it float32.

    Raises:
        DataError: the file is damaged, has another number of bands, or its axes cannot be told apart.
    """
    damaged = DataError(f"{where}: no TIFF, or damaged; get the file again")
    # rasterio takes an empty memory file for one to be written
    if not content:
        raise damaged
    plain = None if side is not None else read_plain_pages(content)
    if plain is not None:
        return rearrange(plain, f"{_axes(plain.shape, channels, where)} -> channels height width")
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
                    return rearrange(_read_page(first, side, blank), f"{axes} -> channels height width")
            return rearrange(np.concatenate(list(_read_pages(pages, side, blank))), f"{axes} -> channels height width")
    except (RasterioError, OSError, ValueError) as error:
        raise damaged from error


def _axes(shape: Sequence[int], channels: int, where: str) -> str:
    first = shape[0] == channels and shape[1] == shape[2]
    last = shape[2] == channels and shape[0] == shape[1]
    if first == last:
        text = " x ".join(map(str, shape))
        problem = "cannot tell bands from rows" if first else "neither bands x side x side nor side x side x bands"
        raise DataError(f"{where}: {text}, {problem} with {channels} bands; correct the card's bands or the file")
    return "channels height width" if first else "height width channels"


def _read_pages(names: Sequence[str], side: int | None, blank: bool) -> Iterator[np.ndarray]:
    for name in names:
        with rasterio.open(name, driver="GTiff") as page:
            yield _read_page(page, side, blank)


def _read_page(page: DatasetReader, side: int | None, blank: bool) -> np.ndarray:
    if side is None:
        values = page.read()
    else:
        values = page.read(out_shape=(page.count, side, side), resampling=Resampling.bilinear)
    if not blank or page.nodata is None:
        return values
    return np.where(values == page.nodata, np.float32(np.nan), values.astype(np.float32))
