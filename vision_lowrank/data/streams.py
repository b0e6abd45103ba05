"""Scenes read window by window, so that they may be larger than memory."""

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import torch
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window as RasterWindow
from torch import Tensor

from vision_lowrank.data.bands import Bands
from vision_lowrank.data.cards import DatasetCard, load_card
from vision_lowrank.data.download import fetch
from vision_lowrank.data.preprocessing import ScenePreprocessor
from vision_lowrank.data.readers import Georeference
from vision_lowrank.data.readers.geo import (
    ENVI_BINARIES,
    blank_masked,
    check_envi,
    georeference,
    open_raster,
    pixel_size,
    read_bands,
)
from vision_lowrank.data.readers.raster import has_values
from vision_lowrank.data.scene import read_role
from vision_lowrank.errors import DataError

GEOTIFF = (".tif", ".tiff")
ENVI = (".hdr", *ENVI_BINARIES)
# of one window, as float32 of all its channels
WINDOW_BYTES = 128 << 20
# of decoded blocks of the file that GDAL keeps, in megabytes
BLOCK_CACHE = 128
# what a channel's centre may be off between two products of one sensor, in nanometres
TOLERANCE = 1.0

Reader = Callable[[np.ndarray, slice, slice], np.ndarray]


@dataclass(frozen=True)
class Window:
    """Part of a scene in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class SceneStream:
    """A scene of which nothing is in memory, unless its format leaves no choice.

    Attributes:
        name: for messages.
        channels: number of channels of the file.
        height: rows.
        width: columns.
        bands: wavelengths of the channels, None where nobody tells.
        gsd: pixel size in metres, None where nobody tells.
        georeference: place on the ground, None where the file has none.
        nodata: value of missing pixels, None where there is none.
        files: what it is read from.
        reader: returns float32 (chosen channels, rows, columns) of channel indices, rows and columns.
    """

    name: str
    channels: int
    height: int
    width: int
    bands: Bands | None
    gsd: float | None
    georeference: Georeference | None
    nodata: float | None
    files: tuple[Path, ...]
    reader: Reader

    def read(self, channels: np.ndarray, rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        """Returns values, float32 (channels, rows, columns), and which pixels have all of them, bool (rows, columns).

        Raises:
            DataError: the file is damaged there.
        """
        values = self.reader(channels, rows, columns)
        valid = np.ones(values.shape[1:], dtype=bool)
        for band in values:
            valid &= has_values(band, self.nodata)
        return values, valid

    def channels_like(self, bands: Bands, kept: np.ndarray, total: int) -> np.ndarray:
        """Returns the indices of the channels that a model was trained on.

        Args:
            bands: of the model.
            kept: the indices that those bands had in the files of training.
            total: channels of the files of training.

        Raises:
            DataError: the scene has other channels, or other wavelengths.
        """
        choices = [choice for count, choice in ((total, kept), (len(bands), np.arange(len(bands))))
                   if count == self.channels]  # fmt: skip
        if not choices:
            counts = f"{len(bands)}" if total == len(bands) else f"{total}, of which it uses {len(bands)},"
            raise DataError(
                f"{self.name}: {self.channels} channels, the model was trained on {counts} "
                f"of {bands.wavelengths.min():g} to {bands.wavelengths.max():g} nm; give a scene of that sensor"
            )
        if self.bands is None:
            return choices[0]
        found = self.bands.wavelengths
        for choice in choices:
            if np.allclose(found[choice], bands.wavelengths, rtol=0, atol=TOLERANCE):
                return choice
        first = int(np.argmax(np.abs(found[choices[0]] - bands.wavelengths) > TOLERANCE))
        raise DataError(
            f"{self.name}: channel index {choices[0][first]} is at {found[choices[0]][first]:g} nm, the model was "
            f"trained on {bands.wavelengths[first]:g} nm; give a scene of that sensor, or a model trained on this one"
        )

    def check_margin(self, margin: int) -> None:
        """Makes sure that a window can be mirrored so far beyond the scene, see `read_scaled`.

        Raises:
            DataError: the scene is too small.
        """
        if margin >= min(self.height, self.width):
            raise DataError(
                f"{self.name}: {self.height} x {self.width} pixels, but the model sees {margin} pixels around each; "
                "give a larger scene"
            )


def open_stream(scene: str | Path, root: str | Path) -> SceneStream:
    """Opens a GeoTIFF or ENVI file, or the image of a dataset card; missing files of a card are fetched.

    Scenes in other formats and mosaics of tiles, which a card names, are read into memory.

    Args:
        scene: name of a card, path of a card (.yaml), or path of a GeoTIFF or ENVI file (header or binary).
        root: data folder of cards.

    Raises:
        DataError: there is no such scene, or it is damaged, or it is not as its card says.
    """
    path = Path(scene)
    if path.suffix.lower() in (*GEOTIFF, *ENVI):
        return _open_file(path)
    if path.is_file() and path.suffix.lower() not in (".yaml", ".yml"):
        raise DataError(f"{path}: read by windows are {', '.join((*GEOTIFF, *ENVI))}; give others by a card")
    card = load_card(scene)
    fetch(card, root)
    return _open_card(card, root)


def plan_windows(height: int, width: int, channels: int, side: int, margin: int) -> list[Window]:
    """Cuts a scene into windows, row by row.

    Args:
        height: rows of the scene.
        width: columns.
        channels: that are read.
        side: height of a window; its width is a multiple of it, as large as `WINDOW_BYTES` allows.
        margin: pixels around a window that are read with it.
    """
    affordable = WINDOW_BYTES // (4 * channels * (side + 2 * margin)) - 2 * margin
    across = side * max(1, affordable // side)
    return [
        Window(top, left, min(side, height - top), min(across, width - left))
        for top in range(0, height, side)
        for left in range(0, width, across)
    ]


def read_scaled(
    stream: SceneStream, channels: np.ndarray, preprocessor: ScenePreprocessor, window: Window, margin: int
) -> tuple[Tensor, np.ndarray]:
    """Reads a window with its margin, scaled; beyond the scene it is mirrored at the outer pixels.

    Returns:
        float32 (components, height + 2 margin, width + 2 margin), 0 where a pixel lacks values, and which pixels of
        the window have all values, bool (height, width).

    Raises:
        DataError: the scene is damaged there.
    """
    rows = _mirrored(window.top - margin, window.top + window.height + margin, stream.height)
    columns = _mirrored(window.left - margin, window.left + window.width + margin, stream.width)
    # what is mirrored lies inside the window or its margin, so the scaled values can be repeated rather than the raw
    raw, valid = stream.read(channels, _span(rows), _span(columns))
    scaled = preprocessor.transform(raw)
    del raw
    # the training mean, as in training
    scaled[:, ~valid] = 0
    rows, columns = rows - rows.min(), columns - columns.min()
    if (len(rows), len(columns)) != valid.shape:
        scaled = scaled[:, rows][:, :, columns]
    inside = valid[np.ix_(rows, columns)][margin : margin + window.height, margin : margin + window.width]
    return torch.from_numpy(scaled), inside


def _span(positions: np.ndarray) -> slice:
    return slice(int(positions.min()), int(positions.max()) + 1)


def _mirrored(start: int, stop: int, length: int) -> np.ndarray:
    """Returns where on a line of so many pixels the positions from `start` to `stop` are found."""
    positions = np.abs(np.arange(start, stop))
    return np.where(positions < length, positions, 2 * (length - 1) - positions)


def _open_file(path: Path) -> SceneStream:
    if not path.is_file():
        raise DataError(f"{path}: not found; give a GeoTIFF or ENVI file, or the name of a dataset card")
    files: tuple[Path, ...] = (path,)
    if path.suffix.lower() in ENVI:
        files = check_envi(path)[:2]
        path = files[1]

    def read(channels: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        place = RasterWindow(columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
        # opened for each window: nothing that GDAL keeps of a file outlives it
        try:
            # the second spares much time where bands are interleaved by pixel in a raw file
            with rasterio.Env(GDAL_CACHEMAX=BLOCK_CACHE, GDAL_ONE_BIG_READ=True), warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                with open_raster(path) as file:
                    values = file.read((channels + 1).tolist(), window=place, out_dtype="float32")
                    return blank_masked(file, values, place)
        except RasterioError as error:
            raise _damaged(path, error) from error

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with open_raster(path) as file:
                place = georeference(file, path)
                stream = SceneStream(
                    name=str(path),
                    channels=file.count,
                    height=file.height,
                    width=file.width,
                    bands=read_bands(file, path),
                    gsd=None if place is None else pixel_size(place),
                    georeference=place,
                    nodata=file.nodata,
                    files=files,
                    reader=read,
                )
    except RasterioError as error:
        raise _damaged(path, error) from error
    # the end of a file that was cut off is missed now rather than after hours
    read(np.array([stream.channels - 1]), slice(stream.height - 1, stream.height), slice(0, stream.width))
    return stream


def _open_card(card: DatasetCard, root: str | Path) -> SceneStream:
    paths = [path for entry in card.files.image for path in card.find(entry, root)]
    if len(paths) == 1 and paths[0].suffix.lower() in (*GEOTIFF, *ENVI):
        stream = _open_file(paths[0])
    else:
        raster = read_role(card, card.files.image, root)
        stream = SceneStream(
            name=card.name,
            channels=raster.values.shape[0],
            height=raster.values.shape[1],
            width=raster.values.shape[2],
            bands=raster.bands,
            gsd=card.gsd,
            georeference=raster.georeference,
            nodata=raster.nodata,
            files=tuple(paths),
            reader=lambda channels, rows, columns: raster.values[channels, rows, columns],
        )
    stated = (card.shape.channels, card.shape.height, card.shape.width)
    found = (stream.channels, stream.height, stream.width)
    if stated != found:
        raise DataError(f"card {card.name}: shape is {stated} (channels, height, width), the file has {found}")
    return dataclasses.replace(
        stream,
        name=card.name,
        bands=stream.bands if card.bands.from_file and stream.bands else card.bands.on_card(f"card {card.name}"),
        gsd=card.gsd,
        nodata=stream.nodata if card.nodata is None else card.nodata,
    )


def _damaged(path: Path, error: Exception) -> DataError:
    detail = " ".join(str(error.__cause__ or error).split())
    return DataError(f"{path}: damaged, truncated or no raster ({detail}); fetch or copy it again")
