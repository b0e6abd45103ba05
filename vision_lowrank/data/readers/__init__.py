"""Readers of raster files, chosen by suffix."""

from pathlib import Path

from vision_lowrank.data.readers.arrays import read_mat, read_npy, read_npz
from vision_lowrank.data.readers.geo import ENVI_BINARIES, read_envi, read_geotiff
from vision_lowrank.data.readers.raster import Georeference, Raster
from vision_lowrank.errors import DataError

__all__ = ["Georeference", "Raster", "read_raster"]

ARRAY_READERS = {".npy": read_npy, ".npz": read_npz, ".mat": read_mat}


def read_raster(paths: list[Path], key: str | None, axes: str | None, height: int, width: int, channels: int) -> Raster:
    """Reads an image or a label map; several GeoTIFF files are tiles of one.

    Args:
        paths: one file, or GeoTIFF tiles.
        key: name of the array in .mat and .npz files; None where there is only one it can be.
        axes: order of the axes in array files, see `FileEntry`.
        height: rows the card states, to take composed axes apart and to know how much can be expected.
        width: columns the card states; likewise.
        channels: channels the card states of an image, also for its label map.

    Raises:
        DataError: a file is damaged or of an unknown format, the options do not fit it, or it is far larger than the
            card says; this before it fills the memory.
    """
    expected = (height, width, channels)
    suffixes = {path.suffix.lower() for path in paths}
    if suffixes <= {".tif", ".tiff"}:
        return read_geotiff(paths, expected)
    path = paths[0]
    if len(paths) > 1:
        raise DataError(f"{path} and {len(paths) - 1} more: only GeoTIFF tiles can be put together; give one file")
    if path.suffix.lower() in ARRAY_READERS:
        return ARRAY_READERS[path.suffix.lower()](path, key, axes, height, width, expected)
    if path.suffix.lower() in (".hdr", *ENVI_BINARIES):
        return read_envi(path, expected)
    known = ", ".join([*ARRAY_READERS, ".tif", ".tiff", ".hdr", *ENVI_BINARIES])
    raise DataError(f"{path}: unknown format {path.suffix!r}; known are {known}")
