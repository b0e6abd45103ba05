"""One cube through every format; then every way a file can be broken."""

import pickle
import resource
from pathlib import Path

import h5py
import numpy as np
import pytest
import rasterio
import scipy.io
from rasterio import Affine
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin

from vision_lowrank.data.readers import Georeference, raster, read_raster
from vision_lowrank.data.readers.geo import pixel_size, read_geotiff
from vision_lowrank.errors import DataError

HEIGHT, WIDTH, CHANNELS = 7, 5, 4
CUBE = np.random.default_rng(3).integers(0, 4000, (HEIGHT, WIDTH, CHANNELS)).astype(np.int16)
TRANSFORM = from_origin(366000, 5810000, 30, 30)
WAVELENGTHS = [450.0, 550.5, 650.25, 640.0]


def read(path, key=None, axes=None):
    return read_raster([path], key, axes, HEIGHT, WIDTH, CHANNELS)


def write_npy(path):
    np.save(path, CUBE)


def write_npy_fortran(path):
    np.save(path, np.asfortranarray(CUBE.astype(np.float64)))


def write_npz(path):
    np.savez_compressed(path, cube=CUBE, mask=CUBE[..., 0])


def write_mat5(path):
    scipy.io.savemat(path, {"cube": CUBE, "note": "text"}, do_compression=True)


def write_mat73(path):
    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_dataset("cube", data=CUBE.T, compression="gzip")
        file.create_dataset("map", data=CUBE[..., 0].T)
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file")


def write_tif(
    path, rows=slice(None), columns=slice(None), values=CUBE, wavelengths=WAVELENGTHS, offsets=None, **options
):
    piece = values[rows, columns]
    transform = from_origin(366000 + 30 * (columns.start or 0), 5810000 - 30 * (rows.start or 0), 30, 30)
    profile = {"driver": "GTiff", "crs": "EPSG:32633", "transform": transform, "dtype": piece.dtype, **options}
    with rasterio.open(path, "w", height=piece.shape[0], width=piece.shape[1], count=CHANNELS, **profile) as file:
        file.write(np.moveaxis(piece, -1, 0))
        file.descriptions = tuple(f"band {i + 1} ({value} Nanometers)" for i, value in enumerate(wavelengths))
        if offsets is not None:
            file.offsets = offsets


def write_envi(path, interleave="bsq", order="<", offset=0, units="Nanometers", scale=1.0):
    axes = {"bsq": (2, 0, 1), "bil": (0, 2, 1), "bip": (0, 1, 2)}[interleave]
    binary = path.with_suffix(f".{interleave}") if path.suffix == ".hdr" else path
    binary.write_bytes(b"\xff" * offset + CUBE.transpose(axes).astype(f"{order}i2").tobytes())
    waves = ", ".join(str(value * scale) for value in WAVELENGTHS)
    path.with_suffix(".hdr").write_text(
        f"ENVI\ndescription = {{\n  bands = 99 in a text}}\nsamples = {WIDTH}\nlines   = {HEIGHT}\nbands = {CHANNELS}\n"
        f"header offset = {offset}\nfile type = ENVI Standard\ndata type = 2\ninterleave = {interleave}\n"
        f"byte order = {int(order == '>')}\nwavelength units = {units}\nwavelength = {{\n {waves}}}\n"
        "map info = {UTM, 1, 1, 366000, 5810000, 30, 30, 33, North, WGS-84, units=Meters}\n"
    )


@pytest.mark.parametrize(
    ("name", "write", "key"),
    [
        ("a.npy", write_npy, None),
        ("a.npy", write_npy_fortran, None),
        ("a.npz", write_npz, "cube"),
        ("a.mat", write_mat5, "cube"),
        ("a.mat", write_mat5, None),
        ("a.mat", write_mat73, "cube"),
        ("a.mat", write_mat73, None),
        ("a.tif", write_tif, None),
        ("a.hdr", write_envi, None),
        ("a.bsq", write_envi, None),
    ],
)
def test_every_format_gives_the_same_cube(tmp_path, name, write, key):
    path = tmp_path / name
    write(path)
    values = read(path, key).values
    assert values.dtype == np.float32
    assert np.array_equal(values, np.moveaxis(CUBE, -1, 0))


@pytest.mark.parametrize("interleave", ["bsq", "bil", "bip"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("offset", [0, 13])
def test_envi_layouts(tmp_path, interleave, order, offset):
    path = tmp_path / "a.hdr"
    write_envi(path, interleave, order, offset)
    raster = read(path)
    assert np.array_equal(raster.values, np.moveaxis(CUBE, -1, 0))
    assert np.allclose(raster.bands.wavelengths, WAVELENGTHS)
    assert raster.georeference.transform == pytest.approx((30, 0, 366000, 0, -30, 5810000))


def test_what_an_envi_header_quotes_is_none_of_its_fields(tmp_path):
    write_envi(tmp_path / "a.hdr")
    with (tmp_path / "a.hdr").open("a") as file:
        file.write("history = {\n bands = 99\n lines = 1\n header offset = 8\n}\n")
    assert np.array_equal(read(tmp_path / "a.hdr").values, np.moveaxis(CUBE, -1, 0))


def test_bands_that_an_envi_header_calls_bad(tmp_path):
    write_envi(tmp_path / "a.hdr")
    assert read(tmp_path / "a.hdr").bad_bands == ()
    marks = np.ones(CHANNELS, int)
    marks[[0, 3]] = 0
    with (tmp_path / "a.hdr").open("a") as file:
        file.write(f"bbl = {{\n {', '.join(map(str, marks))}}}\n")
    assert read(tmp_path / "a.hdr").bad_bands == (0, 3)
    write_tif(tmp_path / "b.tif")
    with rasterio.open(tmp_path / "b.tif", "r+") as file:
        for band, mark in enumerate(marks, 1):
            file.update_tags(band, bbl=str(mark))
    assert read(tmp_path / "b.tif").bad_bands == (0, 3)
    # not one good band tells nothing
    with (tmp_path / "a.hdr").open("a") as file:
        file.write(f"bbl = {{{', '.join('0' * CHANNELS)}}}\n")
    assert read(tmp_path / "a.hdr").bad_bands == ()


@pytest.mark.parametrize("dtype", ["complex64", "complex_int16"])
def test_complex_numbers_are_refused(tmp_path, dtype):
    profile = {"width": 2, "height": 2, "count": 1, "dtype": dtype, "crs": "EPSG:32633", "transform": TRANSFORM}
    with rasterio.open(tmp_path / "a.tif", "w", "GTiff", **profile) as file:
        file.write(np.ones((1, 2, 2), np.complex64))
    with pytest.raises(DataError, match=rf"a\.tif: numbers of type {dtype}, not real ones; give their amplitude"):
        read(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (False, "a grid without crs, so its maps have no place"),
        (True, "placed by control points alone, so its maps have no place"),
    ],
)
def test_half_a_georeference_is_told(tmp_path, caplog, control, message):
    points = [GroundControlPoint(row, column, 366000 + 30 * column, 5810000 - 30 * row) for row, column in
              ((0, 0), (0, 5), (7, 0), (7, 5))]  # fmt: skip
    options = {"gcps": points, "crs": "EPSG:32633"} if control else {"transform": TRANSFORM}
    profile = {"driver": "GTiff", "height": HEIGHT, "width": WIDTH, "count": CHANNELS, "dtype": "int16"}
    with rasterio.open(tmp_path / "a.tif", "w", **profile, **options) as file:
        file.write(np.moveaxis(CUBE, -1, 0).astype(np.int16))
    assert read(tmp_path / "a.tif").georeference is None
    assert message in caplog.text


def test_envi_files_in_capitals(tmp_path):
    write_envi(tmp_path / "a.hdr")
    (tmp_path / "a.hdr").rename(tmp_path / "A.HDR")
    (tmp_path / "a.bsq").rename(tmp_path / "A.IMG")
    for name in ("A.HDR", "A.IMG"):
        raster = read(tmp_path / name)
        assert np.array_equal(raster.values, np.moveaxis(CUBE, -1, 0))
        assert np.allclose(raster.bands.wavelengths, WAVELENGTHS)


def test_micrometres_that_say_so_become_nanometres(tmp_path):
    write_envi(tmp_path / "a.hdr", units="Micrometers", scale=1e-3)
    assert np.allclose(read(tmp_path / "a.hdr").bands.wavelengths, WAVELENGTHS)


def test_micrometres_without_unit_are_refused(tmp_path):
    write_envi(tmp_path / "a.hdr", units="Unknown", scale=1e-3)
    with pytest.raises(DataError, match=r"a\.bsq: wavelengths from 0\.45 to 0\.65025 look like micrometres"):
        read(tmp_path / "a.hdr")


@pytest.mark.parametrize(
    ("axes", "array"),
    [
        ("channels height width", CUBE.transpose(2, 0, 1)),
        ("width height channels", CUBE.transpose(1, 0, 2)),
        ("channels (width height)", CUBE.transpose(2, 1, 0).reshape(CHANNELS, -1)),
        ("(height width) channels", CUBE.reshape(-1, CHANNELS)),
    ],
)
def test_axes_say_how_an_array_lies(tmp_path, axes, array):
    np.save(tmp_path / "a.npy", array)
    assert np.array_equal(read(tmp_path / "a.npy", axes=axes).values, np.moveaxis(CUBE, -1, 0))


def test_an_array_of_composed_axes_is_found_by_their_number(tmp_path):
    table = CUBE.transpose(2, 1, 0).reshape(CHANNELS, -1)
    scipy.io.savemat(tmp_path / "a.mat", {"library": np.zeros((CHANNELS, 2, 3)), "table": table})
    found = read(tmp_path / "a.mat", axes="channels (width height)").values
    assert np.array_equal(found, np.moveaxis(CUBE, -1, 0))


def test_tiles_are_put_together_by_place_whatever_their_order(tmp_path):
    parts = {
        "b.tif": (slice(0, 4), slice(0, 2)),
        "a.tif": (slice(4, 7), slice(2, 5)),
        "c.tif": (slice(0, 4), slice(2, 5)),
    }
    for name, (rows, columns) in parts.items():
        write_tif(tmp_path / name, rows, columns, nodata=-1)
    raster = read_raster(sorted(tmp_path.glob("*.tif")), None, None, HEIGHT, WIDTH, CHANNELS)
    expected = np.moveaxis(CUBE, -1, 0).astype(np.float32)
    expected[:, 4:, :2] = np.nan
    assert np.array_equal(raster.values, expected, equal_nan=True)
    assert raster.georeference.crs == "EPSG:32633"
    assert raster.georeference.transform == tuple(TRANSFORM)[:6]


def test_where_tiles_overlap_the_first_that_has_a_value_counts(tmp_path):
    first, second = CUBE.copy(), CUBE + 1
    first[2, 1:3] = -1
    second[2, 1] = -1
    for name, rows, values in (("a.tif", slice(0, 4), first), ("b.tif", slice(1, HEIGHT), second)):
        write_tif(tmp_path / name, rows, values=values, nodata=-1)
    raster = read_raster([tmp_path / "a.tif", tmp_path / "b.tif"], None, None, HEIGHT, WIDTH, CHANNELS)
    expected = np.concatenate([CUBE[:4], CUBE[4:] + 1]).astype(np.float32)
    expected[2, 1], expected[2, 2] = np.nan, CUBE[2, 2] + 1
    assert np.array_equal(raster.values, np.moveaxis(expected, -1, 0), equal_nan=True)


def test_more_tiles_than_the_system_opens_at_once(tmp_path):
    # each row a tile, thirty times over
    paths = [tmp_path / f"{number}.tif" for number in range(30 * HEIGHT)]
    for number, path in enumerate(paths):
        row = number % HEIGHT
        write_tif(path, slice(row, row + 1))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        values = read_raster(paths, None, None, HEIGHT, WIDTH, CHANNELS).values
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert np.array_equal(values, np.moveaxis(CUBE, -1, 0))


def test_a_fourth_band_of_tiles_is_no_mask(tmp_path):
    values = (CUBE % 3).astype(np.uint8)
    for name, rows in (("a.tif", slice(0, 4)), ("b.tif", slice(4, HEIGHT))):
        write_tif(tmp_path / name, rows, values=values)
        with rasterio.open(tmp_path / name, "r+") as file:
            file.colorinterp = (*file.colorinterp[:3], ColorInterp.alpha)
    raster = read_raster([tmp_path / "a.tif", tmp_path / "b.tif"], None, None, HEIGHT, WIDTH, CHANNELS)
    assert np.array_equal(raster.values, np.moveaxis(values, -1, 0))


@pytest.mark.parametrize("inside", [True, False])
def test_masked_pixels_of_a_file_lack_values(tmp_path, inside):
    write_tif(tmp_path / "a.tif")
    mask = np.ones((HEIGHT, WIDTH), bool)
    mask[2, 1:4] = mask[5, 0] = False
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=inside), rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.write_mask(mask)
    assert (tmp_path / "a.tif.msk").exists() != inside
    values = read(tmp_path / "a.tif").values
    assert np.isnan(values[:, ~mask]).all()
    assert np.array_equal(values[:, mask], np.moveaxis(CUBE, -1, 0)[:, mask])


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_fourth_band_is_no_mask(tmp_path):
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", height=2, width=2, count=4, dtype="uint8", photometric="rgb"
    ) as file:
        file.write(np.arange(16, dtype=np.uint8).reshape(4, 2, 2) % 12)
        file.colorinterp = (*file.colorinterp[:3], ColorInterp.alpha)
    assert read(tmp_path / "a.tif").values[3].tolist() == [[0, 1], [2, 3]]
    assert np.isfinite(read(tmp_path / "a.tif").values).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crs": "EPSG:32632"}, "crs EPSG:32632 differs from EPSG:32633"),
        ({"transform": from_origin(366000, 5809880, 10, 10)}, "pixel size"),
        ({"transform": from_origin(366011, 5809880, 30, 30)}, "not on its pixel grid"),
        ({"crs": None, "transform": None}, "without georeference"),
        ({"wavelengths": [450.0, 552.0, 650.25, 640.0]}, "wavelengths differ from those of"),
        ({"offsets": (0, 0, 0, -0.1)}, "offset .* differs from"),
        ({"transform": from_origin(366000, 5809880, 30, 30) @ Affine.rotation(20)}, "a turned or mirrored grid"),
        ({"transform": from_origin(366000, 5809880, 30, 30) @ Affine.scale(1, -1)}, "a turned or mirrored grid"),
    ],
)
def test_tiles_that_do_not_fit_are_named(tmp_path, options, message):
    write_tif(tmp_path / "a.tif", slice(0, 4))
    write_tif(tmp_path / "b.tif", slice(4, 7), **options)
    with pytest.raises(DataError, match=rf"b\.tif: .*{message}"):
        read_raster([tmp_path / "a.tif", tmp_path / "b.tif"], None, None, HEIGHT, WIDTH, CHANNELS)


def damage(name, write, change):
    def make(folder: Path) -> Path:
        write(folder / name)
        change(folder / name)
        return folder / name

    return make


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * 0.6)])


def html(path):
    path.write_text("<!DOCTYPE html><html>please log in</html>")


def shorten_binary(path):
    cut(path.with_suffix(".bsq"))


def remove_binary(path):
    path.with_suffix(".bsq").unlink()


def drop_samples(path):
    path.write_text(path.read_text().replace("samples", "sample"))


BROKEN = {
    **{f"{kind} {suffix}": damage(f"a.{suffix}", write, change)
       for kind, change in (("cut", cut), ("html", html), ("empty", lambda path: path.write_bytes(b"")))
       for suffix, write in (("npy", write_npy), ("npz", write_npz), ("mat", write_mat5), ("tif", write_tif))},
    "cut v7.3": damage("a.mat", write_mat73, cut),
    "cut binary": damage("a.hdr", write_envi, shorten_binary),
    "no binary": damage("a.hdr", write_envi, remove_binary),
    "cut header": damage("a.hdr", write_envi, lambda path: path.write_text(path.read_text()[:60])),
    "header without samples": damage("a.hdr", write_envi, drop_samples),
    "html header": damage("a.hdr", write_envi, html),
    "no header": damage("a.bsq", write_envi, lambda path: path.with_suffix(".hdr").unlink()),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_named_in_one_line(tmp_path, case):
    path = BROKEN[case](tmp_path)
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "a."))
    assert "\n" not in message


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_arrays_is_never_run(tmp_path):
    canary = tmp_path / "canary"
    np.save(tmp_path / "a.npy", np.array([Canary(canary)], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", cube=np.array([Canary(canary)], dtype=object), allow_pickle=True)
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Canary(canary)))
    for name in ("a.npy", "a.npz", "b.npy"):
        with pytest.raises(DataError, match=name):
            read(tmp_path / name)
    assert not canary.exists()


@pytest.fixture
def small_arrays(monkeypatch):
    """No array is so small that it is always read."""
    monkeypatch.setattr(raster, "ALWAYS", 0)


def save_hdf5(path, array):
    with h5py.File(path, "w") as file:
        file.create_dataset("cube", data=array, compression="gzip")


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("a.npz", lambda path, array: np.savez_compressed(path, cube=array)),
        ("a.npy", np.save),
        ("a.mat", lambda path, array: scipy.io.savemat(path, {"cube": array}, do_compression=True)),
        ("b.mat", save_hdf5),
        ("a.tif", lambda path, array: write_tif(path, values=array, compress="deflate")),
        ("a.dat", lambda path, array: write_tif(path, values=array, driver="ENVI")),
    ],
)
def test_arrays_far_larger_than_the_card_says_are_refused_unread(tmp_path, name, save, small_arrays, monkeypatch):
    save(tmp_path / name, np.zeros((4 * HEIGHT + 1, WIDTH, CHANNELS), np.uint8))
    for reads in (np.lib.format, "read_array"), (scipy.io, "loadmat"), (h5py.Dataset, "read_direct"):
        monkeypatch.delattr(*reads)
    with pytest.raises(DataError, match=rf"{name}.*: [\d x]+, the card says 7 x 5 x 4 \(rows, columns, channels\)"):
        read(tmp_path / name)


def test_tiles_that_lie_far_apart_are_refused_unread(tmp_path, small_arrays):
    write_tif(tmp_path / "a.tif", slice(0, 4))
    write_tif(tmp_path / "b.tif", slice(4, 7), transform=from_origin(366000 + 30 * 10**6, 5809880, 30, 30))
    with pytest.raises(DataError, match=r"tiles in .*: 7 x 10000\d\d x 4, the card says 7 x 5 x 4"):
        read_raster([tmp_path / "a.tif", tmp_path / "b.tif"], None, None, HEIGHT, WIDTH, CHANNELS)


def test_cells_and_objects_are_refused(tmp_path):
    cells = np.empty((2, 2), dtype=object)
    cells[:] = [["a", "b"], ["c", "d"]]
    scipy.io.savemat(tmp_path / "a.mat", {"cube": cells})
    with pytest.raises(DataError, match=r"a\.mat key cube: array of type cell, not of real numbers"):
        read(tmp_path / "a.mat")
    with h5py.File(tmp_path / "b.mat", "w") as file:
        file.create_dataset("cube", (2, 2), dtype=h5py.ref_dtype)
    with pytest.raises(DataError, match=r"b\.mat key cube: a cell or object array"):
        read(tmp_path / "b.mat")


@pytest.mark.parametrize(
    ("key", "message"), [("cub", "no array 'cub'; it holds cube, mask"), (None, "name the array in the card's `key`")]
)
def test_wrong_key_lists_what_there_is(tmp_path, key, message):
    path = tmp_path / "a.npz"
    np.savez(path, cube=CUBE, mask=CUBE)
    with pytest.raises(DataError, match=message):
        read(path, key)


@pytest.mark.parametrize(
    ("name", "key", "axes", "message"),
    [
        ("a.npy", "cube", None, "holds one array; remove key 'cube'"),
        ("a.npy", None, "channels (height width)", "do not fit the array of shape"),
        ("a.npy", None, "channels height", "do not fit the array of shape"),
        ("a.csv", None, None, "unknown format '.csv'"),
    ],
)
def test_wrong_options_are_named(tmp_path, name, key, axes, message):
    path = tmp_path / name
    np.save(tmp_path / "a.npy", CUBE)
    with pytest.raises(DataError, match=message):
        read(path, key, axes)


@pytest.mark.parametrize(
    ("crs", "side", "turn", "metres"),
    [("EPSG:32633", 10, 30, 10), ("EPSG:2263", 10, 0, 3.048), ("EPSG:32633", 10, 90, 10), ("EPSG:4326", 0.05, 0, None)],
)
def test_the_side_of_a_pixel_is_told_in_metres_however_the_grid_lies(crs, side, turn, metres):
    place = rasterio.Affine.rotation(turn) @ rasterio.Affine.scale(side, -side)
    found = pixel_size(Georeference(crs, tuple(place)[:6]))
    assert found == (None if metres is None else pytest.approx(metres, rel=1e-5))


def test_a_crs_with_a_shift_of_its_own_stays_itself(tmp_path):
    shifted = rasterio.CRS.from_proj4("+proj=utm +zone=33 +ellps=GRS80 +towgs84=100,200,300 +units=m")
    profile = {"width": 2, "height": 2, "count": 1, "dtype": "float32", "crs": shifted}
    with rasterio.open(tmp_path / "a.tif", "w", "GTiff", **profile, transform=TRANSFORM) as file:
        file.write(np.ones((1, 2, 2), np.float32))
    with rasterio.open(tmp_path / "a.tif") as file:
        expected = file.crs
    found = read_geotiff([tmp_path / "a.tif"], CUBE.shape).georeference.crs
    assert rasterio.CRS.from_user_input(found) == expected


@pytest.mark.parametrize(
    ("unit", "values", "expected"),
    [
        ("Nanometers", [450, 550], [450, 550]),
        ("Microns", [0.45, 0.55], [450, 550]),
        ("Angstroms", [4500, 5500], [450, 550]),
        ("", [450, 550], [450, 550]),
        ("Unknown", [450, 550], [450, 550]),
        ("Index", [101, 102], None),
        ("GHz", [450, 550], None),
    ],
)
def test_units_of_wavelengths(tmp_path, caplog, unit, values, expected):
    profile = {"width": 2, "height": 2, "count": 2, "dtype": "float32", "crs": "EPSG:32633", "transform": TRANSFORM}
    with rasterio.open(tmp_path / "a.tif", "w", "GTiff", **profile) as file:
        file.write(np.ones((2, 2, 2), np.float32))
        for band, value in enumerate(values, 1):
            file.update_tags(band, wavelength=str(value), wavelength_units=unit, fwhm=str(value / 50))
    bands = read_geotiff([tmp_path / "a.tif"], CUBE.shape).bands
    if expected is None:
        assert bands is None
        assert f"wavelengths in {unit!r} are no lengths known here" in caplog.text
    else:
        assert bands.wavelengths == pytest.approx(expected)
        # widths are in the same unit
        assert bands.widths == pytest.approx([9, 11])


@pytest.mark.parametrize(
    ("descriptions", "expected"),
    [
        (("Blue (450-510 nm)", "Green 530 – 590 nm"), [480, 560]),
        (("band 1 (0.45 to 0.51 Micrometers)", "b2 .53-.59µm"), [480, 560]),
        # numbers of bands are no ends of them
        (("B2-490 nm", "Band 8 - 842 nm"), [490, 842]),
        (("Band 1 - 1.5 µm", "Band 2 - 2.2 µm"), [1500, 2200]),
        (("Rrs_443nm", "4.9e+02 nm"), [443, 490]),
        (("B1 445,120 nm", "B2 490,230 nm"), None),
        (("blue", "490 nm"), None),
    ],
)
def test_wavelengths_in_descriptions(tmp_path, descriptions, expected):
    profile = {"width": 2, "height": 2, "count": 2, "dtype": "float32", "crs": "EPSG:32633", "transform": TRANSFORM}
    with rasterio.open(tmp_path / "a.tif", "w", "GTiff", **profile) as file:
        file.write(np.ones((2, 2, 2), np.float32))
        file.descriptions = descriptions
    bands = read_geotiff([tmp_path / "a.tif"], CUBE.shape).bands
    assert (bands is None) if expected is None else bands.wavelengths == pytest.approx(expected)
