"""Arrays without a place on the ground: .npy, .npz and MATLAB files."""

import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import scipy.io
from scipy.io.matlab import MatReadError

from vision_lowrank.data.readers.raster import CardShape, Raster, channels_first, check_size
from vision_lowrank.errors import DataError

# what the libraries raise on damaged or truncated files
DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    zlib.error,
    zipfile.BadZipFile,
    MatReadError,
)
CHUNK_BYTES = 1 << 20
# types of arrays of numbers in a MATLAB file
NUMBERS = ("double", "single", "logical", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))


def read_npy(path: Path, key: str | None, axes: str | None, height: int, width: int, expected: CardShape) -> Raster:
    """Reads an .npy file piece by piece, so that little more than the float32 result is ever in memory.

    Raises:
        DataError: the file is damaged, or holds something else than the card says.
    """
    if key is not None:
        raise DataError(f"{path}: an .npy file holds one array; remove key {key!r} from the card")

    def open_view() -> np.ndarray:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        check_size(array.shape, expected, str(path))
        return channels_first(array, axes, height, width, str(path))

    try:
        return Raster(_copy_in_chunks(open_view))
    except DAMAGED as error:
        raise _damaged(path, error) from error


def read_npz(path: Path, key: str | None, axes: str | None, height: int, width: int, expected: CardShape) -> Raster:
    """Reads one array of an .npz file; without `key` the file must hold a single one.

    Raises:
        DataError: the file is damaged, or holds something else than the card says.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            name = _choose(path, key, dict.fromkeys(file.files, ()), None)
            with file.zip.open(f"{name}.npy") as member:
                # of the two layouts of a header the first serves nearly all arrays
                old = np.lib.format.read_magic(member) == (1, 0)
                read_header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                shape, _, kind = read_header(member)
            # what is no number may take any room
            check_size((*shape, kind.itemsize // 16 + 1), expected, f"{path} key {name}")
            array = file[name]
    except DAMAGED as error:
        raise _damaged(path, error) from error
    return Raster(_as_float32(channels_first(array, axes, height, width, f"{path} key {name}")))


def read_mat(path: Path, key: str | None, axes: str | None, height: int, width: int, expected: CardShape) -> Raster:
    """Reads one array of a MATLAB file, v5 or v7.3; without `key` the only one with as many axes as `axes` (else 3, 2).

    Cell and object arrays are refused: they are not plain numbers.

    Raises:
        DataError: as `read_npy`.
    """
    try:
        if h5py.is_hdf5(path):
            name, array = _read_hdf5(path, key, axes, expected)
        else:
            contents = {name: (shape, kind) for name, shape, kind in scipy.io.whosmat(path)}
            name = _choose(path, key, {name: shape for name, (shape, _) in contents.items()}, axes)
            shape, kind = contents[name]
            if kind not in NUMBERS:
                raise DataError(
                    f"{path} key {name}: array of type {kind}, not of real numbers; name the right array by `key`"
                )
            check_size(shape, expected, f"{path} key {name}")
            array = scipy.io.loadmat(path, variable_names=[name])[name]
    except DAMAGED as error:
        raise _damaged(path, error) from error
    return Raster(_as_float32(channels_first(array, axes, height, width, f"{path} key {name}")))


def _read_hdf5(path: Path, key: str | None, axes: str | None, expected: CardShape) -> tuple[str, np.ndarray]:
    with h5py.File(path, "r") as file:
        # MATLAB stores the axes of its arrays in reverse, and keeps cells and objects below a group of references
        shapes = {name: item.shape[::-1] for name, item in file.items() if isinstance(item, h5py.Dataset)}
        name = _choose(path, key, shapes, axes)
        dataset = file[name]
        if dataset.dtype.kind not in "iufb":
            raise DataError(f"{path} key {name}: a cell or object array; store plain numbers")
        check_size(dataset.shape, expected, f"{path} key {name}")
        array = np.empty(dataset.shape, dtype=np.float32)
        dataset.read_direct(array)
    return name, array.T


def _choose(path: Path, key: str | None, shapes: dict[str, tuple[int, ...]], axes: str | None) -> str:
    """Returns `key` if the file has it, else the only array that can be meant."""
    if key is not None:
        if key not in shapes:
            raise DataError(f"{path}: no array {key!r}; it holds {', '.join(shapes) or 'nothing'}; correct `key`")
        return key
    if len(shapes) == 1:
        return next(iter(shapes))
    # axes in brackets are one of the array
    for rank in (3, 2) if axes is None else (len(re.sub(r"\(.*?\)", "composed", axes).split()),):
        candidates = [name for name, shape in shapes.items() if len(shape) == rank and min(shape) > 1]
        if len(candidates) == 1:
            return candidates[0]
    raise DataError(f"{path}: holds {', '.join(shapes) or 'nothing'}; name the array in the card's `key`")


def _as_float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32, order="K", copy=False)


def _copy_in_chunks(open_view: Callable[[], np.ndarray]) -> np.ndarray:
    """Copies a memory-mapped view to a new float32 array.

    The file is mapped anew for every piece: pages of a mapping stay in memory as long as it lives.
    """
    view = open_view()
    result = np.empty(view.shape, dtype=np.float32)
    axis = int(np.argmax(np.abs(view.strides)))
    length = view.shape[axis]
    step = max(1, CHUNK_BYTES * length // max(view.nbytes, 1))
    del view
    for start in range(0, length, step):
        window = (slice(None),) * axis + (slice(start, start + step),)
        result[window] = open_view()[window]
    return result


def _damaged(path: Path, error: Exception) -> DataError:
    detail = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{path}: damaged, truncated or of another format ({detail}); fetch or copy it again")
