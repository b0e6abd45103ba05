"""What every reader returns, whatever the format of the file."""

import math
from dataclasses import dataclass

import numpy as np
from einops import EinopsError, rearrange

from vision_lowrank.data.bands import Bands
from vision_lowrank.errors import DataError

# rows, columns and channels
CardShape = tuple[int, int, int]
# an array may be so many times as large as expected, or hold so many numbers, so that what is wrong is told after it
# was read
SURPLUS, ALWAYS = 4, 1 << 25


@dataclass(frozen=True)
class Georeference:
    """Place of a raster on the ground.

    Attributes:
        crs: coordinate reference system, "EPSG:32633" or WKT.
        transform: (a, b, c, d, e, f) with x = a * column + b * row + c and y = d * column + e * row + f, at the upper
            left corner of a pixel, in units of the crs.
    """

    crs: str
    transform: tuple[float, float, float, float, float, float]


@dataclass(frozen=True)
class Raster:
    """Values of a file and what the file says about them.

    Attributes:
        values: float32 (channels, height, width); a label map has one channel. Not always contiguous.
        bands: wavelengths in nanometres where the file has them.
        georeference: place on the ground where the file has it.
        nodata: value that marks missing pixels where the file names one.
        bad_bands: indices of bands that the file says are of no use.
    """

    values: np.ndarray
    bands: Bands | None = None
    georeference: Georeference | None = None
    nodata: float | None = None
    bad_bands: tuple[int, ...] = ()


def has_values(values: np.ndarray, nodata: float | None) -> np.ndarray:
    """Returns where float32 `values` are neither NaN nor infinite nor nodata, bool of their shape."""
    present: np.ndarray = np.isfinite(values)
    if nodata is None:
        return present
    # what only float64 holds is infinite in float32, like the values that it stands for
    with np.errstate(over="ignore"):
        return present & (values != np.float32(nodata))


def check_size(shape: tuple[int, ...], expected: CardShape, source: str) -> None:
    """Refuses an array that is not read yet and is far larger than the card says; compressed, it may be a small file.

    Args:
        shape: of the array.
        expected: rows, columns and channels on the card.
        source: file, named in the error.

    Raises:
        DataError: it is more than `SURPLUS` times as large, and larger than `ALWAYS`.
    """
    if math.prod(shape) > max(SURPLUS * math.prod(expected), ALWAYS):
        found, wanted = (" x ".join(map(str, lengths)) for lengths in (shape, expected))
        raise DataError(f"{source}: {found}, the card says {wanted} (rows, columns, channels); correct one of them")


def channels_first(array: np.ndarray, axes: str | None, height: int, width: int, source: str) -> np.ndarray:
    """Returns a view of `array` as (channels, height, width).

    Args:
        array: what the file holds.
        axes: left side of an einops pattern; None means "height width channels", or "height width" for two axes.
        height: rows the card states; used where the pattern composes axes.
        width: columns the card states; likewise.
        source: file, named in the error.

    Raises:
        DataError: `axes` does not fit the array, or the array holds no real numbers.
    """
    if array.dtype.kind not in "iufb":
        raise DataError(f"{source}: array of type {array.dtype}, not of real numbers; name the right array by `key`")
    if axes is None:
        if array.ndim not in (2, 3):
            raise DataError(f"{source}: array of shape {array.shape}; say in the card's `axes` what its axes are")
        axes = "height width channels" if array.ndim == 3 else "height width"
    names = axes.replace("(", " ").replace(")", " ").split()
    lengths = {name: length for name, length in (("height", height), ("width", width)) if name in names}
    # a plain list of axes has no length to fill in, and a wrong one is reported later against the card's shape
    composed = lengths if "(" in axes else {}
    target = "channels height width" if "channels" in names else "1 height width"
    try:
        return np.asarray(rearrange(array, f"{axes} -> {target}", **composed))
    except EinopsError as error:
        raise DataError(f"{source}: axes {axes!r} do not fit the array of shape {array.shape}") from error
