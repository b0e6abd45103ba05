"""Predictions of a scene on disk: finished windows, which outlive the process, and the GeoTIFFs made of them.

    .map.parts/             beside map.tif while it is being made
        identity.json       what is predicted, by which weights, on which files
        000000.npz …        one for each finished window, whole or absent

A raster that grows in place is damaged by a kill at the wrong moment; windows of their own are not. Once all are there,
GeoTIFFs are written under temporary names, then renamed, and the folder is removed.
"""

import json
import shutil
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from matplotlib.colors import to_rgba
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import DatasetReader
from rasterio.windows import Window as RasterWindow

from vision_lowrank.data.readers import Georeference
from vision_lowrank.data.streams import Window
from vision_lowrank.errors import ConfigError
from vision_lowrank.plots.rasters import NODATA, check_written
from vision_lowrank.runs import atomic_path, remove_leftovers_of, write_json

# of GDAL while it writes, in megabytes
BLOCK_CACHE = 64


class Parts:
    """The finished windows of one prediction.

    Args:
        out: the file that the prediction is for.
        identity: what tells this prediction from others, as JSON holds it.

    Raises:
        ConfigError: windows of another prediction are in the way.
        OSError: the folder cannot be written to.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.folder = out.with_name(f".{out.stem}.parts")
        note = self.folder / "identity.json"
        if not note.is_file():
            # windows that nothing is known of, as of a removal that was killed
            shutil.rmtree(self.folder, ignore_errors=True)
            write_json(note, identity)
            return
        try:
            known = json.loads(note.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"out={out}: {note} is damaged ({error}); delete {self.folder}") from error
        changed = [key for key in known.keys() | identity.keys() if known.get(key) != identity.get(key)]
        if changed and not any(self.folder.glob("*.npz")):
            # that one was refused before its first window
            write_json(note, identity)
        elif changed:
            raise ConfigError(
                f"out={out}: {self.folder} holds an unfinished prediction with other {', '.join(sorted(changed))}; "
                "delete that folder, or give another out"
            )

    def path(self, index: int) -> Path:
        """Returns the file of a window."""
        return self.folder / f"{index:06d}.npz"

    def save(self, index: int, arrays: dict[str, Any]) -> None:
        """Writes the arrays that were found in a window."""
        with atomic_path(self.path(index)) as temporary:
            np.savez(temporary, **arrays)

    def load(self, index: int, name: str) -> np.ndarray:
        """Returns an array of a window.

        Raises:
            ConfigError: the file is damaged.
        """
        try:
            with np.load(self.path(index), allow_pickle=False) as file:
                found: np.ndarray = file[name]
                return found
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ConfigError(f"{self.path(index)}: damaged ({error}); delete it and run the command again") from error

    def missing(self, count: int) -> list[int]:
        """Returns which of so many windows are not finished."""
        return [index for index in range(count) if not self.path(index).is_file()]

    def remove(self) -> None:
        """Deletes the folder; first the note, without which what remains of a killed removal counts for nothing."""
        (self.folder / "identity.json").unlink()
        shutil.rmtree(self.folder)


@dataclass(frozen=True)
class Grid:
    """Cells of a raster on a scene.

    Attributes:
        windows: of the scene, in the order of the parts.
        height: rows of the scene in pixels.
        width: its columns.
        scale: pixels along a side of a cell.
        side: pixels along the height of a window, a multiple of 16 cells.
        place: of the scene on the ground.
    """

    windows: Sequence[Window]
    height: int
    width: int
    scale: int
    side: int
    place: Georeference | None


def write_geotiff(
    path: Path, parts: Parts, name: str, grid: Grid, bands: Sequence[str], classes: Mapping[str, str] | None = None
) -> None:
    """Writes an array of all parts as a tiled, compressed GeoTIFF; no more than one window is in memory.

    Args:
        path: file ending in .tif.
        parts: all finished.
        name: of the array (bands, height, width), uint8 where 255 is nodata, or float32 where NaN is.
        grid: where the parts lie.
        bands: description of each band.
        classes: colour ("#rrggbb") by name, for a map of classes; kept as colour table and as tags `class_0`, ...
    """
    # a killed command left its own
    remove_leftovers_of(path)
    floating = classes is None
    tile = grid.side // grid.scale
    profile = {
        "driver": "GTiff",
        "height": -(-grid.height // grid.scale),
        "width": -(-grid.width // grid.scale),
        "count": len(bands),
        "dtype": "float32" if floating else "uint8",
        "nodata": np.nan if floating else NODATA,
        "tiled": True,
        "blockxsize": tile,
        "blockysize": tile,
        "compress": "deflate",
        "predictor": 3 if floating else 1,
        "interleave": "band",
        # decided before the size is known, which compression tells last
        "bigtiff": "if_safer",
    }
    if grid.place is not None:
        profile |= {"crs": grid.place.crs, "transform": Affine(*grid.place.transform) @ Affine.scale(grid.scale)}
    with (
        atomic_path(path) as temporary,
        warnings.catch_warnings(),
        rasterio.Env(GDAL_CACHEMAX=BLOCK_CACHE),
    ):
        # a scene without coordinates is a regular case here, not an oversight
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(temporary, "w", **profile) as file:
            if classes is not None:
                table = {
                    index: tuple(round(255 * part) for part in to_rgba(colour))
                    for index, colour in enumerate(classes.values())
                }
                # before the pixels: GDAL complains of a colour table that comes after them
                file.write_colormap(1, table | {NODATA: (0, 0, 0, 0)})
                file.update_tags(1, **{f"class_{index}": label for index, label in enumerate(classes)})
            for band, description in enumerate(bands, 1):
                file.set_band_description(band, description)
            for index, window in enumerate(grid.windows):
                values = parts.load(index, name)
                file.write(values, window=_place(window, grid, values))

        def same(file: DatasetReader) -> bool:
            arrays = ((window, parts.load(index, name)) for index, window in enumerate(grid.windows))
            return all(
                np.array_equal(file.read(window=_place(window, grid, values)), values, equal_nan=floating)
                for window, values in arrays
            )

        check_written(temporary, path, same)


def _place(window: Window, grid: Grid, values: np.ndarray) -> RasterWindow:
    """Returns where the values (bands, height, width) of a window of the scene lie in the raster."""
    return RasterWindow(window.left // grid.scale, window.top // grid.scale, values.shape[2], values.shape[1])
