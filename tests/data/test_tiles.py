"""Sources of tiles: what they read compared with arrays, how they divide and what they skip."""

import logging
import re

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin

from vision_lowrank.data import tiles as module
from vision_lowrank.data.scene import open_scene
from vision_lowrank.data.tiles import GeoTiffFolder, SceneTiles
from vision_lowrank.errors import ConfigError, DataError

WAVELENGTHS = [450.0, 550.0, 650.0]
SUBSETS = ("train", "validation", "test")


def write_tif(path, values, wavelengths=WAVELENGTHS, unit="Nanometers", pixel=30.0, crs="EPSG:32633", nodata=None):
    """Writes values (channels, height, width) in small blocks, so that a window is not the whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"crs": crs, "transform": from_origin(366000, 5810000, pixel, pixel), "nodata": nodata}
    count, height, width = values.shape
    blocks = {"tiled": True, "blockxsize": 16, "blockysize": 16}
    with rasterio.open(
        path, "w", "GTiff", width, height, count, dtype=values.dtype, interleave="band", **profile, **blocks
    ) as file:
        file.write(values)
        if wavelengths is not None:
            file.descriptions = tuple(f"band ({value} {unit})" for value in wavelengths)


@pytest.fixture
def folder(tmp_path):
    """Ten files of 3 bands, 40 x 24 pixels; each value tells file, band and pixel. Returns the arrays by file name."""
    arrays = {}
    for number in range(10):
        values = 4000 * number + np.arange(3 * 40 * 24).reshape(3, 40, 24)
        arrays[f"{number}.tif"] = values.astype(np.int32)
        write_tif(tmp_path / "scenes" / f"{number}.tif", arrays[f"{number}.tif"])
    return arrays


@pytest.fixture
def open_folder(tmp_path):
    def build(setup=True, **options):
        arguments = {"root": str(tmp_path / "scenes"), "pattern": "*.tif", "size": 8, "stride": 8}
        source = GeoTiffFolder(**(arguments | options))
        if setup:
            source.setup()
        return source

    return build


def damage(path):
    """Cuts a file in the middle: the header remains."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def tiles(source, subset):
    return [source.read(index) for index in getattr(source, subset)]


# one scene


@pytest.fixture
def scene_tiles(tiny, tmp_path):
    """Tiles of the tiny scene, whose pixels hold their own index in each band, plus 1000 for each band."""
    tiny.image[:] = np.arange(24 * 20).reshape(24, 20, 1) + 1000 * np.arange(6)

    def build(**options):
        arguments = {"size": 4, "stride": 2, "cell": 8, "validation": 0.2, "test": 0.2}
        source = SceneTiles(str(tiny.write()), str(tmp_path), **(arguments | options))
        source.setup()
        return source

    return build


def test_tiles_held_out_share_no_pixel_with_training(scene_tiles):
    source = scene_tiles()
    pixels = {name: [set(tile[0].astype(int).ravel()) for tile in tiles(source, name)] for name in SUBSETS}
    covered = {name: set().union(*sets) for name, sets in pixels.items()}
    assert not covered["train"] & covered["validation"]
    assert not (covered["train"] | covered["validation"]) & covered["test"]
    # cells of 8: three rows, and two columns with a third one of half the width
    assert sum(map(len, covered.values())) == 24 * 20
    for name in ("validation", "test"):
        assert sum(map(len, pixels[name])) == len(covered[name])
    # overlap within training cells
    assert sum(map(len, pixels["train"])) > len(covered["train"])


def test_training_tiles_lie_in_one_cell_each(scene_tiles):
    source = scene_tiles()
    corners = np.array([divmod(int(tile[0, 0, 0]), 20) for tile in tiles(source, "train")])
    assert set(corners.ravel() % 8) == {0, 2, 4}
    cells = {tuple(cell) for cell in (corners // 8).tolist()}
    assert len(cells) == 9 - 2 - 2
    # a whole cell has 3 x 3 training tiles; one at the right border 3 x 1
    assert len(corners) == sum(3 if column == 2 else 9 for _, column in cells)


def test_tiles_without_brightness_hold_shapes(scene_tiles):
    plain, shapes = scene_tiles(), scene_tiles(brightness=False)
    expected = np.log(np.maximum(plain.read(3), 1).astype(np.float64))
    np.testing.assert_allclose(shapes.read(3), expected - expected.mean(axis=0), atol=1e-5)


def test_tiles_of_small_reflectances_have_no_shapes(tiny, tmp_path):
    tiny.image[:] /= 1e6
    source = SceneTiles(str(tiny.write()), str(tmp_path), size=4, stride=2, cell=8, brightness=False)
    with pytest.raises(DataError, match="most values of the spectra are 1 or less"):
        source.setup()


def test_scene_tiles_are_slices_of_the_scene(scene_tiles, tiny):
    source = scene_tiles()
    assert source.bands.wavelengths.tolist() == [450, 550, 650, 750, 850, 950]
    assert source.gsd == 2
    assert len(source) == source.train.size + source.validation.size + source.test.size
    for index in range(len(source)):
        tile = source.read(index)
        row, column = divmod(int(tile[0, 0, 0]), 20)
        assert np.array_equal(tile, tiny.image[row : row + 4, column : column + 4].transpose(2, 0, 1))
        assert (tile.dtype, tile.shape) == (np.float32, (6, 4, 4))


def test_scene_pixels_without_values_are_nan_and_empty_tiles_left_out(scene_tiles, tiny, caplog):
    whole = scene_tiles()
    tiny.image[0:8, 0:8, 2] = np.nan
    tiny.image[8, 9, 1] = np.inf
    with caplog.at_level(logging.INFO):
        source = scene_tiles(seed=3)
    read = [source.read(index) for index in range(len(source))]
    assert all(np.isfinite(tile).any() for tile in read)
    assert "1 of 9 cells without a tile" in caplog.text
    assert len(source) < len(whole)
    marked = [tile for tile in read if np.isnan(tile).any()]
    assert marked
    for tile in marked:
        # row 8, column 9 is the second pixel of a cell; a pixel that lacks one band lacks all
        assert np.argwhere(np.isnan(tile)).tolist() == [[band, 0, 1] for band in range(6)]
        assert tile[0, 0, 0] == 8 * 20 + 8


def test_empty_tiles_of_a_used_cell_are_counted(scene_tiles, tiny, caplog):
    tiny.image[0:4, 0:4] = np.nan
    with caplog.at_level(logging.INFO):
        source = scene_tiles(validation=0, test=0)
    assert "1 tiles without values left out, 0 of 9 cells" in caplog.text
    assert source.train.size == len(source) == 6 * 9 + 3 * 3 - 1


def test_the_seed_decides_which_cells_are_held_out(scene_tiles):
    def first_pixels(seed):
        return [tile[0, 0, 0] for tile in tiles(scene_tiles(seed=seed), "test")]

    assert first_pixels(1) == first_pixels(1)
    assert len({tuple(first_pixels(seed)) for seed in range(6)}) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": 24}, "cells of scene tiny: 1 leave none for training beside 1 for validation and 1 for test"),
        ({"cell": 6}, "cell is 6; give a multiple of size 4"),
        ({"stride": 0}, "stride 0; give pixels, at least 1"),
        ({"validation": 0.5, "test": 0.5}, "validation is 0.5, test 0.5; give shares with a sum below 1"),
        ({"validation": -0.1}, "validation is -0.1"),
    ],
)
def test_impossible_divisions_are_refused(scene_tiles, options, message):
    with pytest.raises(ConfigError, match=message):
        scene_tiles(**options)


def test_indian_pines_opens_without_a_download(tmp_path):
    source = SceneTiles("indian_pines", str(tmp_path), size=16, stride=8, cell=32)
    source.setup()
    scene = open_scene("indian_pines", tmp_path)
    used = np.zeros((145, 145), int)
    for name in SUBSETS:
        mask = np.zeros((145, 145), bool)
        for row, column in source._places[getattr(source, name)]:
            mask[row : row + 16, column : column + 16] = True
        used += mask
    assert used.max() == 1
    row, column = source._places[5]
    assert np.array_equal(source.read(5), scene.image[:, row : row + 16, column : column + 16])
    assert (len(source.bands), source.gsd) == (200, 20)


# folders of files


def test_files_are_divided_whole(folder, open_folder):
    source = open_folder(stride=4, validation=0.2, test=0.1)
    files = {name: {int(tile[0, 0, 0]) // 4000 for tile in tiles(source, name)} for name in SUBSETS}
    assert [len(files[name]) for name in SUBSETS] == [7, 2, 1]
    assert set().union(*files.values()) == set(range(10))
    # 40 x 24 pixels: 9 x 5 training tiles at a stride of 4, 5 x 3 side by side
    assert [getattr(source, name).size for name in SUBSETS] == [7 * 45, 2 * 15, 15]
    assert sorted(np.concatenate([getattr(source, name) for name in SUBSETS])) == list(range(len(source)))


def test_windows_equal_slices_of_the_files(folder, open_folder):
    source = open_folder(stride=3)
    corners = set()
    for index in range(len(source)):
        tile = source.read(index)
        number, rest = divmod(int(tile[0, 0, 0]), 4000)
        row, column = divmod(rest, 24)
        assert np.array_equal(tile, folder[f"{number}.tif"][:, row : row + 8, column : column + 8])
        corners.add((row, column))
    assert tile.dtype == np.float32
    assert {(0, 0), (3, 15), (30, 15), (32, 16)} <= corners
    assert source.bands.wavelengths.tolist() == WAVELENGTHS
    assert source.gsd == 30


def test_files_of_one_folder_stay_together(tmp_path, open_folder):
    for place in range(5):
        for date in "ab":
            values = np.arange(3 * 8 * 8).reshape(3, 8, 8) + 1000 * place
            write_tif(tmp_path / "scenes" / str(place) / f"{date}.tif", values.astype(np.int32))
    places = {}
    for seed in range(5):
        source = open_folder(pattern="*/*.tif", group=1, validation=0.2, test=0.2, seed=seed)
        places = {name: [int(tile[0, 0, 0]) // 1000 for tile in tiles(source, name)] for name in SUBSETS}
        assert [len(places[name]) for name in SUBSETS] == [6, 2, 2]
        assert [len(set(places[name])) for name in SUBSETS] == [3, 1, 1]


@pytest.mark.parametrize("declared", [True, False])
def test_missing_values_are_nan(folder, open_folder, tmp_path, declared):
    for name, values in folder.items():
        values = values.astype(np.float32)
        values[1, 2, 3] = -9999
        values[0, 4, 5] = np.nan
        values[2, 6, 7] = -np.inf
        write_tif(tmp_path / "scenes" / name, values, nodata=-9999 if declared else None)
    source = open_folder(size=8, stride=40, nodata=None if declared else -9999)
    for index in source.train:
        missing = np.argwhere(np.isnan(source.read(index)))
        assert missing.tolist() == [[0, 4, 5], [1, 2, 3], [2, 6, 7]]


def test_masked_pixels_are_nan(folder, open_folder, tmp_path):
    for name, values in folder.items():
        write_tif(tmp_path / "scenes" / name, values)
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(tmp_path / "scenes" / name, "r+") as file:
            mask = np.ones(file.shape, bool)
            mask[3, 6:] = False
            file.write_mask(mask)
    source = open_folder(size=8, stride=40)
    for index in source.train:
        missing = np.argwhere(np.isnan(source.read(index)))
        assert missing.tolist() == [[band, 3, column] for band in range(3) for column in (6, 7)]


def test_bands_without_values_or_variation_are_dropped(folder, open_folder, tmp_path, caplog):
    for name, values in folder.items():
        extra = np.stack([np.full_like(values[0], -1), np.full_like(values[0], 7)])
        write_tif(tmp_path / "scenes" / name, np.concatenate([extra, values]), [380, 400, 450, 550, 650], nodata=-1)
    with caplog.at_level(logging.WARNING):
        source = open_folder()
    assert "2 bands without values or variation dropped, indices [0, 1]" in caplog.text
    assert source.bands.wavelengths.tolist() == WAVELENGTHS
    tile = source.read(0)
    assert np.array_equal(tile, folder["0.tif"][:, :8, :8])


def test_a_band_that_most_files_lack_is_dropped_and_one_that_few_lack_is_kept(folder, open_folder, tmp_path, caplog):
    for number, (name, values) in enumerate(folder.items()):
        values = values.copy()
        values[0] = values[0] if number == 0 else -1
        values[1] = -1 if number == 9 else values[1]
        write_tif(tmp_path / "scenes" / name, values, nodata=-1)
    with caplog.at_level(logging.WARNING):
        source = open_folder(validation=0, test=0)
    assert source.bands.wavelengths.tolist() == [550, 650]
    assert "1 training files lack a band that is used" in caplog.text
    assert np.isnan(source.read(len(source) - 1)[0]).all()


def test_files_without_values_and_small_ones_are_left_out(folder, open_folder, tmp_path, caplog):
    write_tif(tmp_path / "scenes" / "0.tif", np.full((3, 40, 24), -1, np.int32), nodata=-1)
    write_tif(tmp_path / "scenes" / "1.tif", folder["1.tif"][:, :7])
    with caplog.at_level(logging.WARNING):
        source = open_folder()
    assert "2 files smaller than a tile or without values in the tiles looked at; left out" in caplog.text
    assert len(source) == 8 * 15


def test_a_file_whose_corners_have_no_values_is_used(folder, open_folder, tmp_path):
    values = folder["0.tif"].copy()
    values[:, :12, :12] = values[:, -12:, -12:] = -1
    write_tif(tmp_path / "scenes" / "0.tif", values, nodata=-1)
    source = open_folder()
    assert len(source) == 10 * 15
    assert np.isnan(source.read(0)).all()


def test_a_header_that_makes_no_sense_counts_as_damage(folder, open_folder, tmp_path):
    with rasterio.open(tmp_path / "scenes" / "4.tif", "r+") as file:
        file.update_tags(2, wavelength="5x0")
    source = open_folder(max_bad=0.1)
    assert [path.name for path in source.damaged] == ["4.tif"]
    with pytest.raises(DataError, match=r"1 of 10 damaged, max_bad is 0; first \S+4\.tif \(.*5x0"):
        open_folder(max_bad=0.0)


@pytest.mark.parametrize("each", [3, 500])
def test_damaged_files_are_skipped_counted_and_named(folder, open_folder, tmp_path, caplog, monkeypatch, each):
    # with 3 files for each, several processes try them
    monkeypatch.setattr(module, "FILES_EACH", each)
    names = ["3.tif", "5.tif"]
    damage(tmp_path / "scenes" / names[0])
    (tmp_path / "scenes" / names[1]).write_text("no raster")
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        source = open_folder(max_bad=0.2)
    # weights that are drawn afterwards stay the same
    assert torch.equal(torch.get_rng_state(), state)
    assert [path.name for path in source.damaged] == names
    for name in names:
        assert len(re.findall(rf"{name}: damaged", caplog.text)) == 1
    assert {int(source.read(index)[0, 0, 0]) // 4000 for index in range(len(source))} == {0, 1, 2, 4, 6, 7, 8, 9}


def test_too_many_damaged_files_are_an_error(folder, open_folder, tmp_path):
    for number in (3, 5):
        damage(tmp_path / "scenes" / f"{number}.tif")
    with pytest.raises(DataError, match=r"2 of 10 damaged, max_bad is 0\.1; first \S+3\.tif \(") as caught:
        open_folder(max_bad=0.1)
    assert "\n" not in str(caught.value)


def test_a_file_that_breaks_later_has_no_values_until_they_are_too_many(folder, open_folder, tmp_path, caplog):
    source = open_folder(max_bad=0.1, validation=0, test=0)
    damage(tmp_path / "scenes" / "9.tif")
    last = np.flatnonzero(source._places[:, 0] == 9)[-2:]
    with caplog.at_level(logging.WARNING):
        assert all(np.isnan(source.read(index)).all() for index in last)
    assert len(re.findall(r"9\.tif: damaged", caplog.text)) == 1
    (tmp_path / "scenes" / "0.tif").unlink()
    with pytest.raises(DataError, match=r"2 of 10 damaged, max_bad is 0\.1; first \S+9\.tif"):
        source.read(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wavelengths": None}, r"0\.tif: no wavelengths in the file; give `wavelengths`"),
        ({"wavelengths": [0.45, 0.55, 0.65]}, "look like micrometres"),
        ({"crs": "EPSG:4326"}, r"0\.tif: no projected coordinates.* give `gsd`"),
    ],
)
def test_files_that_tell_too_little_are_refused(tmp_path, open_folder, options, message):
    write_tif(tmp_path / "scenes" / "0.tif", np.arange(192, dtype=np.int16).reshape(3, 8, 8), **options)
    with pytest.raises(DataError, match=message):
        open_folder(max_bad=0)


def test_wavelengths_in_declared_micrometres_become_nanometres(folder, open_folder, tmp_path):
    for name, values in folder.items():
        write_tif(tmp_path / "scenes" / name, values, [0.45, 0.55, 0.65], unit="Micrometers")
    assert np.allclose(open_folder().bands.wavelengths, WAVELENGTHS)


def test_pixel_size_in_feet_becomes_metres(folder, open_folder, tmp_path):
    for name, values in folder.items():
        write_tif(tmp_path / "scenes" / name, values, crs="EPSG:2263")
    assert open_folder().gsd == pytest.approx(30 * 1200 / 3937)


def test_given_wavelengths_and_pixel_size_stand_in_for_missing_ones(folder, open_folder, tmp_path):
    for name, values in folder.items():
        write_tif(tmp_path / "scenes" / name, values, None, crs=None)
    source = open_folder(wavelengths=[500, 600, 700], gsd=12.5)
    assert source.bands.wavelengths.tolist() == [500, 600, 700]
    assert source.gsd == 12.5
    with pytest.raises(DataError, match="look like micrometres"):
        open_folder(wavelengths=[0.5, 0.6, 0.7], gsd=12.5)
    with pytest.raises(DataError, match=r"0\.tif: 3 bands, not 2 like the wavelengths"):
        open_folder(wavelengths=[500, 600], gsd=12.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wavelengths": [450, 550, 900]}, r"7\.tif: wavelengths differ from those of \S+0\.tif"),
        ({"wavelengths": None}, r"7\.tif: wavelengths differ from those of \S+0\.tif"),
        ({"pixel": 10.0}, r"7\.tif: pixels of 10\.0 m, 30 m in \S+0\.tif"),
    ],
)
def test_files_of_another_sensor_are_refused(folder, open_folder, tmp_path, options, message):
    write_tif(tmp_path / "scenes" / "7.tif", folder["7.tif"], **options)
    with pytest.raises(DataError, match=message):
        open_folder()


@pytest.mark.parametrize("change", [{"scales": (1, 1, 1e-4)}, {"offsets": (0, -1000, 0)}])
def test_files_in_other_units_are_refused(folder, open_folder, tmp_path, change):
    for number, name in enumerate(folder):
        with rasterio.open(tmp_path / "scenes" / name, "r+") as file:
            for key, values in change.items():
                setattr(file, key, values)
        if number < 9:
            with pytest.raises(
                DataError, match=r"\.tif: scales or offsets of bands differ from \S+0\.tif's; bring all"
            ):
                open_folder()
    # all alike, as the files hold them
    source = open_folder()
    assert np.array_equal(source.read(0), folder["0.tif"][:, :8, :8])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": -1}, "group is -1; give at least 0"),
        ({"group": 1}, r"scenes: group is 1, but \S+/scenes/0\.tif lies in fewer folders; lower it"),
        ({"group": 3}, "group is 3, but"),
        ({"gsd": 0}, "scenes: gsd is 0; give the size of a pixel in metres, above 0"),
        ({"gsd": -10.0}, "gsd is -10"),
        ({"max_bad": -0.1}, "scenes: max_bad is -0.1; give a share of the files, from 0 to 1"),
        ({"max_bad": 2}, "max_bad is 2"),
        ({"pattern": "/etc/*"}, r"scenes: pattern is '/etc/\*' .*; give one below root"),
        ({"pattern": ""}, "pattern is ''"),
    ],
)
def test_options_that_no_folder_suits_are_refused(folder, open_folder, options, message):
    with pytest.raises(ConfigError, match=message):
        open_folder(**options)


def test_a_pattern_that_matches_nothing_is_named(folder, open_folder):
    with pytest.raises(DataError, match=r"scenes: no files match '\*\.tiff'; correct root or pattern"):
        open_folder(pattern="*.tiff")
    with pytest.raises(DataError, match="no folders match"):
        open_folder(band_files=["0.tif"])
    with pytest.raises(ConfigError, match=r"files in \S+: 10 leave none for training"):
        open_folder(validation=0.5, test=0.49)


def test_files_without_any_variation_are_refused(tmp_path, open_folder):
    for number in range(3):
        write_tif(tmp_path / "scenes" / f"{number}.tif", np.full((3, 8, 8), 5, np.int16))
    with pytest.raises(DataError, match="no band varies over the training files"):
        open_folder()


@pytest.fixture
def band_folders(tmp_path):
    """Four folders of three band files on grids of 24, 12 and 4 pixels over the same ground; returns the arrays."""
    arrays = []
    for number in range(4):
        arrays.append([1000 * number + np.arange(side**2, dtype=np.uint16).reshape(side, side) for side in (12, 24, 4)])
        for name, values, wavelength in zip(("B5", "B2", "B1"), arrays[-1], (704, 492, 443), strict=True):
            path = tmp_path / "scenes" / f"place{number}" / f"{name}.tif"
            write_tif(path, values[None], [wavelength], pixel=240 / len(values))
    return arrays


BAND_FILES = ["B5.tif", "B2.tif", "B1.tif"]


def test_coarse_bands_are_brought_to_the_finest_grid(band_folders, open_folder):
    source = open_folder(pattern="place*", band_files=BAND_FILES, stride=5)
    assert source.bands.wavelengths.tolist() == [704, 492, 443]
    assert source.gsd == 10
    fine = [
        np.stack([values.repeat(24 // len(values), 0).repeat(24 // len(values), 1) for values in bands])
        for bands in band_folders
    ]
    corners = set()
    for index in range(len(source)):
        tile = source.read(index)
        number, rest = divmod(int(tile[1, 0, 0]), 1000)
        row, column = divmod(rest, 24)
        assert np.array_equal(tile, fine[number][:, row : row + 8, column : column + 8])
        corners.add((row, column))
    # neither 5 nor 15 is a multiple of the coarse pixels' 2 and 6
    assert {(5, 15), (15, 15)} <= corners


def test_missing_values_of_coarse_bands_spread_over_their_pixels_only(band_folders, open_folder):
    # 1000 is in no first folder's first pixel but in the others' upper left coarse pixels
    source = open_folder(pattern="place*", band_files=BAND_FILES, size=24, stride=24, nodata=1000, validation=0, test=0)
    tile = source.read(1)
    assert np.isnan(tile).sum((1, 2)).tolist() == [4, 1, 36]
    assert np.isnan(tile[2, :6, :6]).all()


def test_a_folder_that_lacks_a_band_file_is_skipped(band_folders, open_folder, tmp_path):
    (tmp_path / "scenes" / "place2" / "B1.tif").unlink()
    source = open_folder(pattern="place*", band_files=BAND_FILES, max_bad=0.25)
    assert [path.name for path in source.damaged] == ["place2"]
    assert {int(source.read(index)[1, 0, 0]) // 1000 for index in range(len(source))} == {0, 1, 3}


# files of real sensors


def test_enmap_scene_with_wavelengths_in_its_files(shared_path):
    root = shared_path("data", "enmap_potsdam", "images")
    source = GeoTiffFolder(str(root), "*.tif", size=16, stride=8)
    source.setup()
    assert (len(source.bands), source.gsd) == (218, 30)
    assert source.bands.wavelengths[[0, -1]] == pytest.approx([418.24, 2445.53])
    assert [getattr(source, name).size for name in SUBSETS] == [14 * 9, 2 * 4, 2 * 4]
    with rasterio.open(sorted(root.glob("*.tif"))[-1]) as file:
        whole = np.delete(file.read(), np.arange(129, 135), axis=0)
    row, column = source._places[-1][1:]
    assert row > 0
    assert np.array_equal(source.read(len(source) - 1), whole[:, row : row + 16, column : column + 16])


def test_hyspecnet_needs_wavelengths(shared_path):
    root = shared_path("data", "rico_hdl_samples", "HySpecNet-11k")
    options = {"root": str(root), "pattern": "*/*-SPECTRAL_IMAGE.TIF", "size": 64, "stride": 32, "test": 0}
    with pytest.raises(DataError, match=r"SPECTRAL_IMAGE\.TIF: no wavelengths in the file; give `wavelengths`"):
        GeoTiffFolder(**options).setup()
    source = GeoTiffFolder(**options, wavelengths=np.linspace(418, 2446, 224).tolist())
    source.setup()
    # the bands in the water absorption
    kept = np.delete(np.arange(224), [*range(126, 141), *range(160, 167)])
    assert np.allclose(source.bands.wavelengths, np.linspace(418, 2446, 224)[kept])
    assert (source.gsd, source.train.size, source.validation.size) == (30, 9, 4)
    for path, index in zip(sorted(root.glob(options["pattern"])), (0, len(source) - 1), strict=True):
        with rasterio.open(path) as file:
            whole = file.read((kept + 1).tolist()).astype(np.float32)
        corner = source._places[index][1:]
        window = tuple(slice(first, first + 64) for first in corner)
        expected = np.where(whole == -32768, np.nan, whole)[:, *window]
        assert np.array_equal(source.read(index), expected, equal_nan=True)


def test_sentinel_bands_in_files_of_their_own(shared_path):
    root = shared_path("data", "rico_hdl_samples", "SSL4EO-S12")
    names = ["B1.tif", "B2.tif", "B5.tif", "B8.tif", "B12.tif"]
    centres = [442.7, 492.4, 704.1, 832.8, 2202.4]
    options = {"pattern": "s2?/*/*", "size": 44, "stride": 44, "wavelengths": centres, "band_files": names}
    with pytest.raises(DataError, match="no projected coordinates"):
        GeoTiffFolder(str(root), **options).setup()
    source = GeoTiffFolder(str(root), **options, gsd=10)
    source.setup()
    assert [getattr(source, name).size for name in SUBSETS] == [72, 36, 36]
    assert (source.bands.wavelengths.tolist(), source.gsd) == (pytest.approx(centres), 10)
    folder = sorted(root.glob(options["pattern"]))[3]
    for channel, (name, ratio) in enumerate(zip(names, (6, 1, 2, 1, 2), strict=True)):
        with rasterio.open(folder / name) as file:
            fine = file.read(1).repeat(ratio, 0).repeat(ratio, 1)
        assert np.array_equal(source.read(len(source) - 2)[channel], fine[220:264, 176:220])
