"""Predicted class maps as data: GeoTIFF for geographic software, .npy for everything else."""

import errno
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from matplotlib.colors import to_rgba
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader

from vision_lowrank.errors import DataError
from vision_lowrank.runs import atomic_path

NODATA = 255


def save_class_geotiff(
    path: Path,
    classes: np.ndarray,
    names: Sequence[str],
    colours: Sequence[str],
    georeference: tuple[str, Sequence[float]] | None = None,
) -> None:
    """Writes a map of classes as a one-band uint8 GeoTIFF with a colour table; 255 is nodata.

    Args:
        path: file ending in .tif.
        classes: (height, width) class indices, 255 where there is no class.
        names: name of each class, kept as band tags `class_0`, `class_1`, ...
        colours: "#rrggbb" of each class.
        georeference: coordinate system (anything rasterio reads, such as "EPSG:32633" or WKT) and the six numbers of
            the affine transform from (column, row) to coordinates, row by row; None leaves the file without.

    Raises:
        DataError: a value that is neither a class index nor 255.
    """
    strange = np.setdiff1d(classes, [*range(len(names)), NODATA])
    if strange.size:
        raise DataError(f"{path.name}: value {strange[0]} is neither a class of 0 to {len(names) - 1} nor {NODATA}")
    height, width = classes.shape
    place = {} if georeference is None else {"crs": georeference[0], "transform": Affine(*georeference[1][:6])}
    with atomic_path(path) as temporary, warnings.catch_warnings():
        # a scene without coordinates is a regular case here, not an oversight
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(
            temporary,
            "w",
            driver="GTiff",
            height=height,
            width=width,
            count=1,
            dtype="uint8",
            nodata=NODATA,
            compress="deflate",
            **place,
        ) as file:
            table = {i: tuple(round(255 * part) for part in to_rgba(colour)) for i, colour in enumerate(colours)}
            # before the pixels: GDAL complains of a colour table that comes after them
            file.write_colormap(1, table | {NODATA: (0, 0, 0, 0)})
            file.update_tags(1, **{f"class_{index}": name for index, name in enumerate(names)})
            file.write(classes.astype(np.uint8), 1)
        check_written(temporary, path, lambda file: np.array_equal(file.read(1), classes))


def check_written(temporary: Path, path: Path, same: Callable[[DatasetReader], bool]) -> None:
    """Reads a raster again before it gets its name: on a full disk GDAL may end without an error.

    Args:
        temporary: the file.
        path: what it is to become.
        same: whether the file holds what was written.

    Raises:
        OSError: it does not, or cannot be read; `filename` is `path`.
    """
    try:
        with rasterio.open(temporary) as file:
            whole = same(file)
    except RasterioError:
        whole = False
    if not whole:
        raise OSError(errno.ENOSPC, "the file could not be written whole; is the disk full?", str(path))


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes an array as .npy; a map of classes is best given as uint8."""
    with atomic_path(path) as temporary:
        np.save(temporary, array, allow_pickle=False)
