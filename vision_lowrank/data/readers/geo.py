"""Georeferenced rasters: GeoTIFF, as one file or as tiles of one scene, and ENVI."""

import logging
import math
import re
import warnings
from pathlib import Path

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.enums import MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from vision_lowrank.data.bands import Bands, check_wavelengths
from vision_lowrank.data.readers.raster import CardShape, Georeference, Raster, check_size, has_values
from vision_lowrank.errors import DataError

logger = logging.getLogger(__name__)

# in one of each unit of wavelengths, by the beginning of its name
_NANOMETRES = {"micro": 1000.0, "µm": 1000.0, "um": 1000.0, "nano": 1.0, "nm": 1.0, "unknown": 1.0, "angstrom": 0.1}
ENVI_BINARIES = (".bsq", ".bil", ".bip", ".img", ".dat", ".raw")
# numpy types of the `data type` codes of an ENVI header
ENVI_TYPES = {1: "u1", 2: "i2", 3: "i4", 4: "f4", 5: "f8", 12: "u2", 13: "u4", 14: "i8", 15: "u8"}
# a number, or two from end to end, and a unit: "450-510 nm", "418.24 (Nanometers"; "445,12 nm" is none
_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?"
_DESCRIBED = re.compile(
    rf"(?<![\d.])(?<!\d,)(?:(?P<start>{_NUMBER})\s*(?:-|–|—|to)\s*)?(?P<centre>{_NUMBER})\s*\(?"
    r"(?P<unit>nanomet|nm\b|micromet|µm|um\b)",
    flags=re.IGNORECASE,
)
# what tiles may differ by in the wavelength of a band, in nanometres
SAME_BAND = 1.0
# a tile may lie off the common pixel grid by this share of a pixel, which covers rounding in stored coordinates
GRID_TOLERANCE = 0.01


def open_raster(path: Path) -> DatasetReader:
    """Opens a GeoTIFF, or the binary file of ENVI where the name does not end in .tif or .tiff.

    By no other of GDAL's drivers: some follow names inside a file to other files and into the network.

    Raises:
        DataError: its numbers are complex.
        RasterioError: it is no such file.
    """
    file = rasterio.open(path, driver="GTiff" if path.suffix.lower() in (".tif", ".tiff") else "ENVI")
    if strange := next((name for name in file.dtypes if name.startswith("complex")), None):
        file.close()
        raise DataError(f"{path}: numbers of type {strange}, not real ones; give their amplitude or intensity")
    return file


def blank_masked(file: DatasetReader, values: np.ndarray, window: Window | None = None) -> np.ndarray:
    """Returns `values` after setting to NaN, in place, the pixels that the file, or an .msk beside it, masks.

    An alpha band masks nothing: many programs take the fourth of several bands for one.

    Args:
        file: what the values are of.
        values: float32 (bands, rows, columns).
        window: the part of the file that they are of, None for all of it.
    """
    flags = file.mask_flag_enums[0]
    if MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags:
        values[:, file.read_masks(1, out_shape=values.shape[1:], window=window) == 0] = np.nan
    return values


def read_geotiff(paths: list[Path], expected: CardShape) -> Raster:
    """Reads a GeoTIFF, or several of one scene put together by their georeference.

    Gaps between tiles and pixels of the files' nodata value become NaN in a mosaic. Where tiles overlap, the first that
    has a value counts.

    Args:
        paths: the files.
        expected: rows, columns and channels on the card, see `check_size`.

    Raises:
        DataError: a file is damaged or far larger than expected, or tiles differ in crs, pixel grid or bands.
    """
    try:
        # a scene without place on the ground is nothing to warn of
        with warnings.catch_warnings(action="ignore", category=NotGeoreferencedWarning), open_raster(paths[0]) as first:
            bands, bad = read_bands(first, paths[0]), bad_bands(first)
            if len(paths) == 1:
                check_size((*first.shape, first.count), expected, str(paths[0]))
                values = first.read(out_dtype="float32")
                return Raster(blank_masked(first, values), bands, georeference(first, paths[0]), first.nodata, bad)
            values, place, nodata = _put_together(paths, first, bands, expected)
            return Raster(values, bands, place, nodata, bad)
    except (RasterioError, ValueError) as error:
        # a file's own error carries its name already in most cases, but not in all
        names = str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} tiles)"
        detail = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{names}: damaged, truncated or no raster ({detail}); fetch or copy it again") from error


def read_envi(path: Path, expected: CardShape) -> Raster:
    """Reads an ENVI raster, given its header or its binary; any interleave, byte order and header offset.

    Args:
        path: header or binary.
        expected: rows, columns and channels on the card, see `check_size`.

    Raises:
        DataError: header or binary is missing or damaged, or the binary is shorter than the header says.
    """
    header, binary, shape = check_envi(path)
    raster = read_geotiff([binary], expected)
    if raster.values.shape != shape:
        raise DataError(f"{header}: read as {raster.values.shape}, not as its bands, lines, samples; get it again")
    return raster


def check_envi(path: Path) -> tuple[Path, Path, tuple[int, int, int]]:
    """Returns header, binary and bands, lines, samples of an ENVI raster, given one of its two files.

    Raises:
        DataError: header or binary is missing or damaged, or the binary is shorter than the header says.
    """
    header, binary = _envi_pair(path)
    fields = _envi_header(header)
    try:
        bands, lines, samples = (int(fields[name]) for name in ("bands", "lines", "samples"))
        item = np.dtype(ENVI_TYPES[int(fields["data type"])]).itemsize
        size = int(fields.get("header offset", "0")) + item * bands * lines * samples
    except KeyError as error:
        raise DataError(f"{header}: field or data type {error} missing or unknown; fetch or copy it again") from error
    except ValueError as error:
        raise DataError(f"{header}: damaged header ({error}); fetch or copy it again") from error
    found = binary.stat().st_size
    if found < size:
        raise DataError(f"{binary}: truncated, {found} of the {size} bytes that {header.name} promises; get it again")
    return header, binary, (bands, lines, samples)


def _envi_pair(path: Path) -> tuple[Path, Path]:
    if path.suffix.lower() == ".hdr":
        candidates = [path.with_suffix(""), *(path.with_suffix(suffix) for suffix in ENVI_BINARIES)]
        binary = _first_file(candidates)
        if binary is None:
            raise DataError(f"{path}: no data file beside it; expected {path.stem} with {', '.join(ENVI_BINARIES)}")
        return path, binary
    candidates = [path.with_suffix(".hdr"), path.with_name(path.name + ".hdr")]
    header = _first_file(candidates)
    if header is None:
        raise DataError(f"{path}: no ENVI header beside it; put {candidates[0].name} into the same folder")
    return header, path


def _first_file(candidates: list[Path]) -> Path | None:
    """Returns the first that is there, in capitals or not."""
    beside = {path.name.lower(): path for path in sorted(candidates[0].parent.glob("*"), reverse=True)}
    found = (path if path.is_file() else beside.get(path.name.lower()) for path in candidates)
    return next((path for path in found if path is not None and path.is_file()), None)


def _envi_header(path: Path) -> dict[str, str]:
    """Returns the one-line fields of an ENVI header; those in braces, such as wavelengths, are left to rasterio."""
    text = path.read_text(encoding="latin-1")
    if not text.lstrip().startswith("ENVI"):
        raise DataError(f"{path}: no ENVI header, its first line is not 'ENVI'; fetch or copy it again")
    # what a field in braces quotes, such as the header of an older file, is none of this one's
    plain = re.sub(r"\{[^}]*\}", "{}", text)
    pairs = re.findall(r"^[ \t]*([^={}\n]+?)[ \t]*=[ \t]*([^{}\n]*?)[ \t]*$", plain, flags=re.MULTILINE)
    return {name.lower(): value for name, value in pairs}


def read_bands(file: DatasetReader, path: Path) -> Bands | None:
    """Returns wavelengths from band tags or descriptions such as 'band 1 (418.24 Nanometers)'; None without any.

    Also, with a word in the log, where they are in a unit that is no known length, such as an index.

    Raises:
        DataError: a wavelength is no number, or cannot be one in nanometres.
    """
    centres, widths = [], []
    for index, description in zip(file.indexes, file.descriptions, strict=True):
        tags = file.tags(index)
        match = _DESCRIBED.search(description or "")
        if "wavelength" in tags:
            centre, unit = tags["wavelength"], tags.get("wavelength_units", "")
        elif match:
            centre, unit = match["centre"], match["unit"]
            # a band has its ends within an octave; what counts the bands, from 0 or 1, is no end of one
            start = float(match["start"] or 0)
            if float(centre) / 2 <= start < float(centre) and start not in (index - 1, index):
                centre = str((float(match["start"]) + float(centre)) / 2)
        else:
            return None
        factor = next((factor for name, factor in _NANOMETRES.items() if unit.strip().lower().startswith(name)), None)
        if factor is None and unit.strip():
            logger.warning("%s: wavelengths in %r are no lengths known here; taken to be without", path, unit)
            return None
        factor = factor or 1.0
        try:
            centres.append(factor * float(centre))
            widths.append(factor * float(tags.get("fwhm", "nan")))
        except ValueError as error:
            raise DataError(
                f"{path}: wavelength {centre!r} of band {index} is no number; list all on the card"
            ) from error
    known = np.asarray(widths, dtype=np.float32)
    return Bands(check_wavelengths(centres, str(path)), None if np.isnan(known).any() else known)


def bad_bands(file: DatasetReader) -> tuple[int, ...]:
    """Returns the indices of the bands that `bbl` gives up, a list of 1 and 0 in an ENVI header, or each band's tag."""
    marks = re.findall(r"[\d.]+", file.tags(ns="ENVI").get("bbl", ""))
    marks = marks or [file.tags(index).get("bbl", "1") for index in file.indexes]
    bad = tuple(index for index, mark in enumerate(marks) if mark.strip("0.") == "")
    # a list of another length, or without any good band, tells nothing
    return bad if len(bad) < len(marks) == file.count else ()


def georeference(file: DatasetReader, path: Path) -> Georeference | None:
    """Returns the place of a file on the ground; None, with a word in the log where it has half of one."""
    if file.crs is None or file.transform.is_identity:
        if file.gcps[0]:
            logger.warning("%s: placed by control points alone, so its maps have no place; gdalwarp it before", path)
        elif not file.transform.is_identity:
            logger.warning("%s: a grid without crs, so its maps have no place; gdal_edit.py -a_srs names one", path)
        return None
    return Georeference(_crs_text(file), tuple(file.transform)[:6])


def pixel_size(place: Georeference) -> float | None:
    """Returns the width of a pixel in metres, on a rotated grid too; None for a crs in degrees."""
    crs = CRS.from_user_input(place.crs)
    if not crs.is_projected:
        return None
    return math.hypot(place.transform[0], place.transform[3]) * float(crs.linear_units_factor[1])


def same_crs(one: Georeference, other: Georeference) -> bool:
    """Tells whether two places are given in the same coordinate reference system, however each writes it."""
    return bool(CRS.from_user_input(one.crs) == CRS.from_user_input(other.crs))


def _crs_text(file: DatasetReader) -> str:
    code = file.crs.to_epsg()
    # a likely match may be another one, without the file's shift of the datum
    if code is not None and CRS.from_epsg(code) == file.crs:
        return f"EPSG:{code}"
    return str(file.crs.to_wkt())


def _put_together(
    paths: list[Path], first: DatasetReader, bands: Bands | None, expected: CardShape
) -> tuple[np.ndarray, Georeference, float | None]:
    """Returns the values of the tiles of one scene, NaN where none has one, their place, and the nodata of them all."""
    corners: list[tuple[int, int, int, int]] = []
    nodata = {first.nodata}
    # one after the other: a system opens only so many files at once
    for path in paths:
        with open_raster(path) as tile:
            corners.append(_check_tile(first, tile, path))
            nodata.add(tile.nodata)
            found = read_bands(tile, path)
            if bands and found and np.abs(found.wavelengths - bands.wavelengths).max() > SAME_BAND:
                raise DataError(f"{path}: wavelengths differ from those of {first.name}; tiles must agree")
    ends = np.array(corners)
    top, left = ends[:, :2].min(axis=0).tolist()
    height, width = (ends[:, 2:].max(axis=0) - (top, left)).tolist()
    check_size((height, width, first.count), expected, f"tiles in {paths[0].parent}")
    values = np.full((first.count, height, width), np.nan, np.float32)
    for path, (start, column, stop, end) in zip(paths, corners, strict=True):
        target = values[:, start - top : stop - top, column - left : end - left]
        with open_raster(path) as tile:
            part = blank_masked(tile, tile.read(out_dtype="float32"))
            np.copyto(target, part, where=np.isnan(target) & has_values(part, tile.nodata))
    corner = first.transform @ (left, top)
    transform = (first.transform.a, 0.0, corner[0], 0.0, first.transform.e, corner[1])
    return values, Georeference(_crs_text(first), transform), first.nodata if len(nodata) == 1 else None


def _check_tile(first: DatasetReader, tile: DatasetReader, path: Path) -> tuple[int, int, int, int]:
    """Returns where a tile lies on the grid of the first: its first row and column, and those after its last ones."""
    if tile.crs is None or tile.transform.is_identity:
        raise DataError(f"{path}: a tile without georeference cannot be placed; give one file, or georeferenced tiles")
    for what, found, wanted in (
        ("crs", tile.crs, first.crs),
        ("band count", tile.count, first.count),
        ("pixel size", tile.res, first.res),
        ("scale", tile.scales, first.scales),
        ("offset", tile.offsets, first.offsets),
    ):
        if found != wanted:
            raise DataError(f"{path}: {what} {found} differs from {wanted} of {first.name}; tiles must agree")
    if tile.transform.b or tile.transform.d or tile.transform.a < 0 or tile.transform.e > 0:
        raise DataError(
            f"{path}: a tile of a turned or mirrored grid; gdalwarp the tiles to north up, or give one file"
        )
    column = (tile.transform.c - first.transform.c) / first.transform.a
    row = (tile.transform.f - first.transform.f) / first.transform.e
    if max(abs(column - round(column)), abs(row - round(row))) > GRID_TOLERANCE:
        raise DataError(f"{path}: lies {column:.2f} columns, {row:.2f} rows from {first.name}, not on its pixel grid")
    return round(row), round(column), round(row) + tile.height, round(column) + tile.width
