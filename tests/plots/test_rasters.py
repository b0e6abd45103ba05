import logging

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from vision_lowrank.errors import DataError
from vision_lowrank.plots.rasters import save_array, save_class_geotiff

NAMES = ["corn", "oats, ripe", "Sträucher"]
COLOURS = ["#d7191c", "#00C853", "#3030ff"]
CLASSES = np.array([[0, 1, 2, 255], [2, 2, 1, 0], [255, 0, 0, 1]])
TRANSFORM = from_origin(364095, 5809965, 30, 20)


@pytest.mark.parametrize("kind", [np.uint8, np.int64])
def test_class_map_comes_back_with_all_that_belongs_to_it(tmp_path, kind, caplog):
    path = tmp_path / "a" / "map.tif"
    with caplog.at_level(logging.INFO):
        save_class_geotiff(path, CLASSES.astype(kind), NAMES, COLOURS, ("EPSG:32633", tuple(TRANSFORM)[:6]))
    assert not caplog.messages
    with rasterio.open(path) as file:
        assert np.array_equal(file.read(1), CLASSES)
        assert (file.count, file.dtypes, file.nodata) == (1, ("uint8",), 255)
        assert file.colorinterp == (rasterio.enums.ColorInterp.palette,)
        assert file.crs.to_epsg() == 32633
        assert file.transform == TRANSFORM
        assert file.xy(2, 1, offset="ul") == (364095 + 30, 5809965 - 40)
        table = file.colormap(1)
        assert [table[index] for index in range(3)] == [(215, 25, 28, 255), (0, 200, 83, 255), (48, 48, 255, 255)]
        # unlabelled pixels are transparent
        assert table[255][3] == 0
        assert np.array_equal(file.dataset_mask() == 0, CLASSES == 255)
        assert {key: value for key, value in file.tags(1).items() if key.startswith("class_")} == {
            "class_0": "corn",
            "class_1": "oats, ripe",
            "class_2": "Sträucher",
        }
    assert list(path.parent.iterdir()) == [path]


def test_wkt_is_a_coordinate_system_too(tmp_path):
    wkt = rasterio.crs.CRS.from_epsg(25833).to_wkt()
    save_class_geotiff(tmp_path / "map.tif", CLASSES, NAMES, COLOURS, (wkt, tuple(TRANSFORM)[:6]))
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.crs == rasterio.crs.CRS.from_epsg(25833)


def test_a_scene_without_place_gives_a_map_without_place(tmp_path, recwarn):
    save_class_geotiff(tmp_path / "map.tif", CLASSES, NAMES, COLOURS)
    assert not [warning for warning in recwarn if warning.category is rasterio.errors.NotGeoreferencedWarning]
    with rasterio.open(tmp_path / "map.tif") as file:
        assert np.array_equal(file.read(1), CLASSES)
        assert file.crs is None
        assert file.transform.is_identity


@pytest.mark.parametrize("value", [3, -1, 254, 300])
def test_a_value_without_class_is_named(tmp_path, value):
    with pytest.raises(DataError, match=rf"map\.tif: value {value} is neither a class of 0 to 2 nor 255"):
        save_class_geotiff(tmp_path / "map.tif", np.array([[0, value]]), NAMES, COLOURS)
    assert not list(tmp_path.iterdir())


def test_an_error_half_way_leaves_the_older_file(tmp_path):
    path = tmp_path / "map.tif"
    path.write_bytes(b"older")
    with pytest.raises(ValueError, match="no colour"):
        save_class_geotiff(path, CLASSES, NAMES, ["#d7191c", "no colour", "#3030ff"])
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("array", [CLASSES.astype(np.uint8), np.asfortranarray(np.linspace(0, 1, 6).reshape(2, 3))])
def test_arrays_come_back(tmp_path, array):
    save_array(tmp_path / "map.npy", array)
    again = np.load(tmp_path / "map.npy", allow_pickle=False)
    assert again.dtype == array.dtype
    assert np.array_equal(again, array)


def test_objects_are_not_written_and_leave_the_older_file(tmp_path):
    save_array(tmp_path / "map.npy", CLASSES)
    with pytest.raises(ValueError, match="Object arrays"):
        save_array(tmp_path / "map.npy", np.array([{}, []], dtype=object))
    assert np.array_equal(np.load(tmp_path / "map.npy"), CLASSES)
    assert len(list(tmp_path.iterdir())) == 1
