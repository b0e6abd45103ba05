"""Square tiles for training without labels: sources that cut them out of one scene or out of a folder of GeoTIFFs."""

import itertools
import logging
import math
import multiprocessing
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rasterio.enums import Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from vision_lowrank.argument_types import check_least
from vision_lowrank.data.bands import Bands, check_wavelengths
from vision_lowrank.data.cards import load_card
from vision_lowrank.data.download import fetch
from vision_lowrank.data.readers.geo import blank_masked, open_raster, read_bands
from vision_lowrank.data.scene import Scene, open_scene
from vision_lowrank.data.spectral_shape import check_shapes, spectral_shape
from vision_lowrank.errors import ConfigError, DataError
from vision_lowrank.runs import process_rank

logger = logging.getLogger(__name__)

SUBSETS = ("train", "validation", "test")
# files of one sensor may differ by this share in pixel size and wavelengths, which covers rounding
TOLERANCE = 0.01
# files that are tried before training by each process, of at most so many, and so many at once
FILES_EACH, MOST_WORKERS, EXAMINED_AT_ONCE = 500, 16, 64
# a band that more files lack than have would take every pixel of theirs out of use
LEAST_PRESENCE = 0.5


class TileSource(ABC):
    """Tiles of one sensor, divided into training, validation and test.

    Attributes:
        bands: wavelengths in nanometres of the channels of a tile; from `setup` on, like what follows.
        gsd: pixel size in metres.
        train: indices of the training tiles, int64, sorted.
        validation: likewise.
        test: likewise.
    """

    bands: Bands
    gsd: float
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def __init__(self, size: int, stride: int, validation: float, test: float, seed: int) -> None:
        if size < 1 or stride < 1:
            raise ConfigError(f"tiles: size is {size}, stride {stride}; give pixels, at least 1")
        if validation < 0 or test < 0 or validation + test >= 1:
            raise ConfigError(f"tiles: validation is {validation}, test {test}; give shares with a sum below 1")
        check_least(0, seed=seed)
        self.size = size
        self.stride = stride
        self.shares = (validation, test)
        self.seed = seed
        # row and column of a tile's upper left pixel, and for files in front of them which one, (tiles, 2 or 3)
        self._places = np.empty((0, 2), np.int64)

    def __len__(self) -> int:
        return len(self._places)

    @abstractmethod
    def prepare(self) -> None:
        """Fetches missing files, if the source knows from where."""

    @abstractmethod
    def setup(self) -> None:
        """Opens the source and divides it; a second call does nothing.

        Raises:
            DataError: a file is missing, damaged or unlike the others.
            ConfigError: the tiles are too few to be divided as asked.
        """

    def hashes(self) -> dict[str, str]:
        """Returns the sha256 of the files by path, after `setup`; none for folders, which may hold millions."""
        return {}

    @abstractmethod
    def read(self, index: int) -> np.ndarray:
        """Returns a tile in the units of the files, float32 (channels, size, size), NaN where a band has no value."""

    def _draw(self, units: int, what: str) -> np.ndarray:
        """Returns the number of the subset (0 training, 1 validation, 2 test) of each cell or file, int64 (units,)."""
        held = [max(1, round(share * units)) if share > 0 else 0 for share in self.shares]
        if units <= sum(held):
            raise ConfigError(
                f"{what}: {units} leave none for training beside {held[0]} for validation and {held[1]} for test; "
                "take more, or smaller ones, or lower the shares"
            )
        subsets = np.zeros(units, np.int64)
        subsets[np.random.default_rng(self.seed).permutation(units)[: sum(held)]] = np.repeat([1, 2], held)
        return subsets

    def _divide(self, places: Iterable[tuple[int, ...]], subsets: Sequence[int], what: str) -> None:
        """Takes over tiles with the numbers of their subsets."""
        self._places = np.asarray(list(places), np.int64)
        owner = np.asarray(subsets, np.int64)
        self.train, self.validation, self.test = (np.flatnonzero(owner == number) for number in range(3))
        logger.info("%s: %s tiles", what, ", ".join(f"{getattr(self, name).size} {name}" for name in SUBSETS))
        for name, share in zip(SUBSETS, (1.0, *self.shares), strict=True):
            if share > 0 and not getattr(self, name).size:
                raise ConfigError(f"{what}: no {name} tiles of {self.size} x {self.size} pixels; make size smaller")


class SceneTiles(TileSource):
    """Tiles of the scene of a dataset card, which stays in memory.

    The scene is divided into square cells, and whole cells train, validate or test: no pixel serves two of them. Tiles
    without any valid pixel are left out.

    Args:
        card: name of a dataset card, or path of a card file.
        root: data folder; missing files are fetched into it where the card says from where.
        size: side of a tile in pixels.
        stride: pixels from one training tile to the next in its cell; tiles held out lie side by side.
        cell: side of a cell in pixels, a multiple of `size`.
        validation: share of the cells, at least one; 0 for none.
        test: likewise.
        seed: of the division.
        brightness: false gives the `spectral_shape` of each pixel instead of its values.
    """

    def __init__(
        self,
        card: str,
        root: str,
        size: int,
        stride: int,
        cell: int,
        validation: float = 0.1,
        test: float = 0.1,
        seed: int = 0,
        brightness: bool = True,
    ) -> None:
        super().__init__(size, stride, validation, test, seed)
        if cell < size or cell % size:
            raise ConfigError(f"tiles: cell is {cell}; give a multiple of size {size}")
        self.card = load_card(card)
        self.root = root
        self.cell = cell
        self.brightness = brightness
        self.scene: Scene | None = None

    def prepare(self) -> None:
        """Fetches missing files."""
        fetch(self.card, self.root)

    def setup(self) -> None:
        """Opens the scene and divides it into cells; once."""
        if self.scene is not None:
            return
        self.prepare()
        scene = open_scene(self.card, self.root)
        if not self.brightness:
            check_shapes(scene.image[:, scene.valid])
        self.bands, self.gsd = scene.bands, scene.gsd
        height, width = scene.valid.shape
        corners = [(row, column) for row in range(0, height, self.cell) for column in range(0, width, self.cell)]
        cells = [corner for corner in corners if self._tiles(corner, scene.valid, self.size)[0]]
        places: list[tuple[int, int]] = []
        subsets: list[int] = []
        empty = 0
        for corner, subset in zip(cells, self._draw(len(cells), f"cells of scene {scene.name}").tolist(), strict=True):
            found, lost = self._tiles(corner, scene.valid, self.size if subset else self.stride)
            places += found
            subsets += [subset] * len(found)
            empty += lost
        if empty or len(cells) < len(corners):
            logger.info(
                "%s: %d tiles without values left out, %d of %d cells without a tile",
                scene.name,
                empty,
                len(corners) - len(cells),
                len(corners),
            )
        self._divide(places, subsets, f"scene {scene.name}")
        self.scene = scene

    def hashes(self) -> dict[str, str]:
        """Returns the sha256 of the scene's files by path, after `setup`."""
        return {} if self.scene is None else self.scene.hashes

    def read(self, index: int) -> np.ndarray:
        """Returns a tile, float32 (channels, size, size), NaN in every band of pixels that lack one.

        Without brightness, values are logarithms.

        Raises:
            ConfigError: called before `setup`.
        """
        if self.scene is None:
            raise ConfigError("tiles: read before setup; call setup() first")
        row, column = self._places[index]
        window = (slice(row, row + self.size), slice(column, column + self.size))
        values = self.scene.image[:, *window]
        if not self.brightness:
            values = spectral_shape(values, axis=0)
        return np.where(self.scene.valid[window], values, np.float32(np.nan))

    def _tiles(self, corner: tuple[int, int], valid: np.ndarray, stride: int) -> tuple[list[tuple[int, int]], int]:
        """Returns the tiles of the cell at `corner` that hold a valid pixel, and how many others it has."""
        rows, columns = (
            range(first, min(first + self.cell, length) - self.size + 1, stride)
            for first, length in zip(corner, valid.shape, strict=True)
        )
        places = [(row, column) for row in rows for column in columns]
        found = [(row, column) for row, column in places if valid[row:, column:][: self.size, : self.size].any()]
        return found, len(places) - len(found)


@dataclass(frozen=True)
class _Header:
    """What one file, or one folder of band files, tells before training.

    Attributes:
        shape: height and width of the finest grid in pixels.
        gsd: pixel size in metres, None where the file has no projected coordinates.
        bands: all bands, None where one has no wavelength.
        low: least value of each band in the first tile, float32 (channels,), inf without any.
        high: likewise the greatest, -inf without any.
        scaling: factor and summand of each band that make its numbers the quantity, as the file declares them.
    """

    shape: tuple[int, int]
    gsd: float | None
    bands: Bands | None
    low: np.ndarray
    high: np.ndarray
    scaling: tuple[tuple[float, float], ...]


class GeoTiffFolder(TileSource):
    """Tiles of all the GeoTIFFs in a folder, read when they are asked for; whole files train, validate or test.

    Each file is tried once at setup. Those that cannot be read then or later are skipped, their names logged: a tile of
    theirs has no values. Bands that most files lack or that are constant over the training files are dropped, judged by
    the first tile of each.

    Args:
        root: the folder.
        pattern: of the files below it, such as "**/*.tif"; with `band_files`, of the folders that hold them.
        size: side of a tile in pixels; smaller files are left out.
        stride: pixels from one training tile to the next in its file; tiles held out lie side by side.
        validation: share of the files, at least one; 0 for none.
        test: likewise.
        seed: of the division.
        group: leading folders below `root` whose files stay together in the division: 1 where each place has a folder
            with several dates of it, 0 where any two files show different ground.
        wavelengths: of all bands, in nanometres, for files that have none.
        gsd: pixel size in metres, for files without projected coordinates.
        nodata: value that means none, beside the files' own, NaN and infinity.
        band_files: names of the files that together make one image, in channel order. Those of coarser grid are brought
            to the finest by repeating pixels; all count as covering the same ground, whatever georeference they have.
        max_bad: share of the files that may be damaged.
    """

    def __init__(
        self,
        root: str,
        pattern: str,
        size: int,
        stride: int,
        validation: float = 0.1,
        test: float = 0.1,
        seed: int = 0,
        group: int = 0,
        wavelengths: Sequence[float] | None = None,
        gsd: float | None = None,
        nodata: float | None = None,
        band_files: Sequence[str] | None = None,
        max_bad: float = 0.01,
    ) -> None:
        super().__init__(size, stride, validation, test, seed)
        check_least(0, group=group)
        if gsd is not None and not 0 < gsd < math.inf:
            raise ConfigError(f"{root}: gsd is {gsd}; give the size of a pixel in metres, above 0")
        if not 0 <= max_bad <= 1:
            raise ConfigError(f"{root}: max_bad is {max_bad}; give a share of the files, from 0 to 1")
        self.root = Path(root)
        self.pattern = pattern
        self.group = group
        self.wavelengths = None if wavelengths is None else check_wavelengths(wavelengths, f"{root}: wavelengths")
        self.stated_gsd = gsd
        self.nodata = nodata
        self.band_files = band_files
        self.max_bad = max_bad
        self.damaged: dict[Path, str] = {}
        self._items: list[Path] = []
        self._found = 0
        self._kept = np.empty(0, bool)

    def prepare(self) -> None:
        """Does nothing: a folder has its files."""

    def setup(self) -> None:
        """Tries every file, divides them and settles on the bands; once.

        Raises:
            DataError: there is no file, or files contradict each other or what is stated of them.
        """
        if self._items:
            return
        try:
            paths = sorted(self.root.glob(self.pattern))
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(f"{self.root}: pattern is {self.pattern!r} ({error}); give one below root") from error
        found = [path for path in paths if (path.is_file() if self.band_files is None else path.is_dir())]
        what = "files" if self.band_files is None else "folders"
        if not found:
            raise DataError(f"{self.root}: no {what} match {self.pattern!r}; correct root or pattern")
        # each would be a group of its own
        if shallow := [path for path in found if len(path.relative_to(self.root).parts) <= self.group]:
            raise ConfigError(f"{self.root}: group is {self.group}, but {shallow[0]} lies in fewer folders; lower it")
        self._found = len(found)
        headers = self._examine_all(found)
        self._check_damaged()
        if not headers:
            raise DataError(f"{self.root}: none of {len(found)} {what} can be read; fetch or copy them again")
        bands = self._check_alike(headers)
        usable = [path for path, header in headers.items() if (header.low <= header.high).any()]
        if len(usable) < len(headers):
            logger.warning(
                "%s: %d %s smaller than a tile or without values in the tiles looked at; left out",
                self.root,
                len(headers) - len(usable),
                what,
            )
        groups = [path.relative_to(self.root).parts[: self.group] if self.group else path for path in usable]
        names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
        drawn = self._draw(len(names), f"{what} in {self.root}" if not self.group else f"groups in {self.root}")
        owner = [int(drawn[names[name]]) for name in groups]
        self._keep([headers[path] for path, subset in zip(usable, owner, strict=True) if not subset])
        self.bands = bands.select(self._kept)
        places: list[tuple[int, int, int]] = []
        subsets: list[int] = []
        for number, (path, subset) in enumerate(zip(usable, owner, strict=True)):
            stride = self.size if subset else self.stride
            rows, columns = (range(0, length - self.size + 1, stride) for length in headers[path].shape)
            places += [(number, row, column) for row in rows for column in columns]
            subsets += [subset] * (len(rows) * len(columns))
        self._divide(places, subsets, str(self.root))
        self._items = usable

    def read(self, index: int) -> np.ndarray:
        """Returns a tile, float32 (channels, size, size), NaN where a band has no value and all over if damaged.

        Raises:
            DataError: more files turned out damaged than `max_bad` allows.
        """
        number, row, column = self._places[index].tolist()
        path = self._items[number]
        if path not in self.damaged:
            try:
                with ExitStack() as stack:
                    return self._read(self._open(path, stack), row, column, self._kept)
            except (RasterioError, ValueError) as error:
                self._report(path, _detail(error))
                self._check_damaged()
        return np.full((len(self.bands), self.size, self.size), np.nan, np.float32)

    def _open(self, path: Path, stack: ExitStack) -> list[DatasetReader]:
        paths = [path] if self.band_files is None else [path / name for name in self.band_files]
        # tiles need no place on the ground
        stack.enter_context(warnings.catch_warnings(action="ignore", category=NotGeoreferencedWarning))
        return [stack.enter_context(open_raster(path)) for path in paths]

    def _read(self, files: list[DatasetReader], row: int, column: int, kept: np.ndarray) -> np.ndarray:
        """Returns the kept bands of the tile at a row and a column of the finest grid."""
        finest = _finest(files)
        tile = np.empty((np.count_nonzero(kept), self.size, self.size), np.float32)
        first = done = 0
        for file in files:
            wanted = (1 + np.flatnonzero(kept[first : first + file.count])).tolist()
            first += file.count
            if not wanted:
                continue
            down, across = file.height / finest.height, file.width / finest.width
            window = Window(column * across, row * down, self.size * across, self.size * down)
            part = tile[done : done + len(wanted)]
            done += len(wanted)
            # interpolation would smear nodata values that the file does not declare, and invent detail besides
            file.read(wanted, out=part, window=window, resampling=Resampling.nearest)
            blank_masked(file, part, window)
            part[~np.isfinite(part)] = np.nan
            for nodata in {self.nodata, *file.nodatavals} - {None}:
                part[part == np.float32(nodata)] = np.nan
        return tile

    def _examine_all(self, paths: Sequence[Path]) -> dict[Path, _Header]:
        """Returns what the files tell, read by several processes where they are many; damage is told in the log."""
        # a worker may have none of its own
        most = 0 if multiprocessing.current_process().daemon else min(os.cpu_count() or 1, MOST_WORKERS)
        loader = DataLoader(
            _Examination(self, paths),
            EXAMINED_AT_ONCE,
            num_workers=min(most, len(paths) // FILES_EACH),
            collate_fn=list,
            # what follows must not draw other numbers
            generator=torch.Generator(),
        )
        silent = process_rank() > 0
        told = itertools.chain.from_iterable(
            track(loader, f"{self.root}: trying every file", transient=True, disable=silent)
        )
        headers = {}
        for path, header in zip(paths, told, strict=True):
            if isinstance(header, _Header):
                headers[path] = header
            else:
                self._report(path, header)
        return headers

    def examine(self, path: Path) -> _Header | str:
        """Reads headers and the first tile with values; returns what is wrong where that fails."""
        try:
            with ExitStack() as stack:
                files = self._open(path, stack)
                count = sum(file.count for file in files)
                low, high = np.full(count, np.inf, np.float32), np.full(count, -np.inf, np.float32)
                finest = _finest(files)
                if min(finest.shape) >= self.size:
                    for row, column in _samples(finest.shape, self.size):
                        tile = self._read(files, row, column, np.ones(count, bool)).reshape(count, -1)
                        low = np.fmin.reduce(tile, axis=1, initial=np.inf)
                        high = np.fmax.reduce(tile, axis=1, initial=-np.inf)
                        if (low <= high).any():
                            break
                bands = None if self.wavelengths is not None else _join(files, path)
                scaling = tuple(pair for file in files for pair in zip(file.scales, file.offsets, strict=True))
                return _Header(finest.shape, _metres(finest), bands, low, high, scaling)
        except (RasterioError, ValueError, DataError) as error:
            return _detail(error)

    def _check_alike(self, headers: dict[Path, _Header]) -> Bands:
        """Returns the bands that all files have, after comparing number, units, wavelengths, pixel size; sets `gsd`."""
        model, first = next(iter(headers.items()))
        bands = first.bands if self.wavelengths is None else Bands(self.wavelengths)
        if bands is None:
            raise DataError(f"{model}: no wavelengths in the file; give `wavelengths`, one per band in nanometres")
        gsd = first.gsd if self.stated_gsd is None else self.stated_gsd
        if gsd is None:
            raise DataError(f"{model}: no projected coordinates, so no pixel size in metres; give `gsd`")
        self.gsd = gsd
        for path, header in headers.items():
            if len(header.low) != len(bands):
                raise DataError(f"{path}: {len(header.low)} bands, not {len(bands)} like the wavelengths; correct them")
            if header.scaling != first.scaling:
                raise DataError(f"{path}: scales or offsets of bands differ from {model}'s; bring all to one unit")
            if self.wavelengths is None and not (
                header.bands and np.allclose(header.bands.wavelengths, bands.wavelengths, rtol=TOLERANCE)
            ):
                raise DataError(f"{path}: wavelengths differ from those of {model}; one source takes one sensor")
            if self.stated_gsd is None and not (header.gsd and math.isclose(header.gsd, gsd, rel_tol=TOLERANCE)):
                raise DataError(f"{path}: pixels of {header.gsd} m, {gsd:g} m in {model}; give `gsd` or a pattern")
        return bands

    def _keep(self, training: Sequence[_Header]) -> None:
        """Chooses the bands that most training files have and that vary over them."""
        low, high = (np.stack([getattr(header, name) for header in training]) for name in ("low", "high"))
        present = low <= high
        common = present.mean(0) > LEAST_PRESENCE
        self._kept = common & (high.max(0) > low.min(0))
        if not self._kept.any():
            raise DataError(f"{self.root}: no band varies over the training files; check `nodata` and the files")
        if not self._kept.all():
            dropped = np.flatnonzero(~self._kept).tolist()
            logger.warning(
                "%s: %d bands without values or variation dropped, indices %s", self.root, len(dropped), dropped
            )
        if lacking := int((~present[:, self._kept]).any(1).sum()):
            logger.warning("%s: %d training files lack a band that is used; no tile of theirs", self.root, lacking)

    def _report(self, path: Path, detail: str) -> None:
        self.damaged[path] = detail
        logger.warning("%s: damaged, truncated or no raster, skipped (%s)", path, self.damaged[path])

    def _check_damaged(self) -> None:
        if len(self.damaged) > self.max_bad * self._found:
            path, detail = next(iter(self.damaged.items()))
            raise DataError(
                f"{self.root}: {len(self.damaged)} of {self._found} damaged, max_bad is {self.max_bad:g}; first {path} "
                f"({detail}); fetch or copy them again"
            )


class _Examination(Dataset[_Header | str]):
    """What each file of a folder tells; text of errors, which reach the caller of a worker as tracebacks."""

    def __init__(self, folder: GeoTiffFolder, paths: Sequence[Path]) -> None:
        self.folder = folder
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> _Header | str:
        return self.folder.examine(self.paths[index])


def _detail(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())


def _samples(shape: tuple[int, int], size: int) -> list[tuple[int, int]]:
    """Returns where to look for values: the first tile, and nine over the scene, whose corners may hold none."""
    rows, columns = ([round((length - size) * share) for share in (0.5, 0.25, 0.75)] for length in shape)
    return [(0, 0), *itertools.product(rows, columns)]


def _finest(files: Sequence[DatasetReader]) -> DatasetReader:
    return max(files, key=lambda file: file.width * file.height)


def _join(files: Sequence[DatasetReader], path: Path) -> Bands | None:
    """Returns the bands of all files one after the other, None where a file has no wavelengths."""
    parts = [read_bands(file, path) for file in files]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    widths = [part.widths for part in known if part.widths is not None]
    wavelengths = np.concatenate([part.wavelengths for part in known])
    return Bands(wavelengths, np.concatenate(widths) if len(widths) == len(known) else None)


def _metres(file: DatasetReader) -> float | None:
    if file.crs is None or not file.crs.is_projected:
        return None
    factor: float = file.crs.linear_units_factor[1]
    return factor * math.hypot(file.transform.a, file.transform.d)
