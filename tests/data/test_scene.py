import hashlib
import logging

import numpy as np
import pytest
import rasterio
import yaml
from rasterio.crs import CRS
from rasterio.transform import from_origin
from tensorly.datasets import load_indian_pines

from vision_lowrank.data.cards import load_card
from vision_lowrank.data.scene import IGNORE, open_scene
from vision_lowrank.errors import DataError


def test_indian_pines_equals_the_package():
    scene = open_scene("indian_pines", "nowhere")
    original = load_indian_pines()
    assert np.array_equal(scene.image, np.moveaxis(original["tensor"], -1, 0))
    assert np.array_equal((scene.labels + 1) % (IGNORE + 1), original["ticks"][0])
    assert scene.valid.all()
    assert scene.dropped_bands == ()
    assert scene.bands.rgb() == (25, 15, 5)


def test_hashes_are_those_of_the_files(tiny, tmp_path):
    scene = open_scene(tiny.write(), tmp_path)
    assert scene.hashes["image.npy"] == hashlib.sha256((tmp_path / "image.npy").read_bytes()).hexdigest()
    assert set(scene.hashes) == {"image.npy", "labels.npy"}
    # some programs print it in capitals
    tiny.card["files"]["image"] = [{"path": "image.npy", "sha256": scene.hashes["image.npy"].upper()}]
    assert open_scene(tiny.write(), tmp_path).hashes == scene.hashes


def test_a_header_stands_for_its_binary(tiny, tmp_path):
    tiny.write()
    tiny.image.tofile(tmp_path / "image.bip")
    (tmp_path / "image.hdr").write_text(
        "ENVI\nsamples = 20\nlines = 24\nbands = 6\ndata type = 4\ninterleave = bip\nbyte order = 0\n"
    )
    # headers that are only fetched may be of anything
    (tmp_path / "other.hdr").write_text("no ENVI")
    tiny.card["files"] |= {"image": ["image.hdr"], "extra": ["other.hdr"]}
    scene = open_scene(tiny.write(), tmp_path)
    assert scene.hashes == {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        for name in ("image.hdr", "image.bip", "labels.npy", "other.hdr")
    }


def test_values_that_are_missing_are_masked_and_counted(tiny, tmp_path, caplog):
    tiny.labels[:] = 1
    tiny.image[2, 3, 1] = np.nan
    tiny.image[5, 6, 0] = np.inf
    tiny.image[7, 8, 2] = -9999
    tiny.card["nodata"] = -9999
    with caplog.at_level(logging.WARNING):
        scene = open_scene(tiny.write(), tmp_path)
    empty = np.zeros(tiny.labels.shape, bool)
    empty[[2, 5, 7], [3, 6, 8]] = True
    assert np.array_equal(scene.valid, ~empty)
    assert (scene.image[:, empty] == 0).all()
    assert (scene.labels[empty] == IGNORE).all()
    assert (scene.labels[~empty] == 0).all()
    assert np.array_equal(scene.image[:, ~empty], np.moveaxis(tiny.image, -1, 0)[:, ~empty])
    assert "tiny: 3 of 480 pixels lack values, 3 labelled" in caplog.text


def test_bands_without_variation_are_dropped_with_their_wavelengths(tiny, tmp_path, caplog):
    tiny.image[..., 1] = 42
    tiny.image[..., 4] = np.nan
    # constant but for a pixel that another band's gap makes invalid
    tiny.image[..., 5] = 7
    tiny.image[0, 0, 5] = 8
    tiny.image[0, 0, 0] = np.nan
    with caplog.at_level(logging.WARNING):
        scene = open_scene(tiny.write(), tmp_path)
    assert scene.dropped_bands == (1, 4, 5)
    assert scene.bands.wavelengths.tolist() == [450, 650, 750]
    assert np.array_equal(scene.image[1][scene.valid], tiny.image[..., 2][scene.valid])
    assert (~scene.valid).sum() == 1
    assert "3 bands without values or variation dropped, indices [1, 4, 5]" in caplog.text


def test_label_values_follow_the_card(tiny, tmp_path):
    tiny.card["classes"] = [
        {"name": "grass", "colour": "#00ff00", "value": 7},
        {"name": "soil", "colour": "#aa5500", "value": 0},
    ]
    tiny.card["ignore"] = [255, 9]
    tiny.labels = np.full(tiny.labels.shape, 255, np.uint8)
    tiny.labels[0, :4] = [7, 0, 9, 7]
    labels = open_scene(tiny.write(), tmp_path).labels
    assert labels[0, :5].tolist() == [0, 1, IGNORE, 0, IGNORE]


def test_a_scene_needs_no_labels(tiny, tmp_path):
    del tiny.card["files"]["labels"]
    scene = open_scene(tiny.write(), tmp_path)
    assert (scene.labels == IGNORE).all()


def change_label_shape(tiny):
    tiny.labels = tiny.labels[:-1]


def change_image_shape(tiny):
    tiny.image = tiny.image[..., :-1]


def change_label_value(tiny):
    tiny.labels[4, 4] = 77


def fraction_label(tiny):
    tiny.labels = tiny.labels + 0.5


def no_values(tiny):
    tiny.image[:] = np.nan


def constant_image(tiny):
    tiny.image[:] = 3


def wrong_count(tiny):
    tiny.card["classes"][1]["pixels"] = 1


def wrong_hash(tiny):
    tiny.card["files"]["image"] = [{"path": "image.npy", "sha256": "0" * 64}]


def wrong_size(tiny):
    tiny.card["files"]["labels"] = [{"path": "labels.npy", "size": 3}]


def no_file(tiny):
    tiny.card["files"]["image"] = ["cube.npy"]
    tiny.card["source"] = {"page": "https://example.org/scene"}


def no_wavelengths(tiny):
    tiny.card["bands"] = {"from_file": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_label_shape, r"label map labels\.npy: shape 23 x 20, the image has 24 x 20"),
        (change_image_shape, r"image\.npy: 24 x 20 x 5 \(rows, columns, channels\), the card says 24 x 20 x 6"),
        (change_label_value, r"labels\.npy: value 77 is neither one of the 3 classes nor ignored; add it"),
        (fraction_label, r"labels\.npy: value 0\.5, 1\.5"),
        (no_values, "scene tiny: no pixel has a value in every band"),
        (constant_image, "scene tiny: every band is constant"),
        (wrong_count, "class soil has [0-9]+ pixels, the card says 1;"),
        (wrong_hash, r"image\.npy: sha256 [0-9a-f]{64}, the card says 0{64}; delete"),
        (wrong_size, r"labels\.npy: [0-9]+ bytes, the card says 3; delete"),
        (no_file, r"1 files not found; get cube\.npy from https://example\.org/scene and put .* into .*/tiny"),
        (no_wavelengths, r"image\.npy has no wavelengths; list them"),
    ],
)
def test_contradictions_are_named_in_one_line(tiny, tmp_path, change, message):
    change(tiny)
    with pytest.raises(DataError, match=message) as caught:
        open_scene(tiny.write(), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("columns", "scale", "fits"), [(0, 1, True), (0.5, 1, True), (1, 1, False), (0, 1.05, False)])
def test_a_label_map_must_lie_where_the_image_lies(tiny, tmp_path, columns, scale, fits):
    tiny.card["files"] = {"image": ["image.tif"], "labels": ["labels.tif"]}
    places = {"image": from_origin(5000, 9000, 2, 2), "labels": from_origin(5000 + 2 * columns, 9000, 2 * scale, 2)}
    for name, values in (("image", np.moveaxis(tiny.image, -1, 0)), ("labels", tiny.labels[None])):
        profile = {"driver": "GTiff", "crs": "EPSG:32633", "transform": places[name], "dtype": values.dtype}
        count, height, width = values.shape
        with rasterio.open(tmp_path / f"{name}.tif", "w", count=count, height=height, width=width, **profile) as file:
            file.write(values)
    card = tiny.write()
    if fits:
        assert (open_scene(card, tmp_path).labels == IGNORE).sum() == (tiny.labels == 0).sum()
    else:
        with pytest.raises(DataError, match=r"labels\.tif: lies at .*, the image at \(2\.0, .*; take the map that"):
            open_scene(card, tmp_path)


@pytest.mark.parametrize(("crs", "told"), [("EPSG:32632", True), (CRS.from_epsg(32633).to_wkt(), False)])
def test_a_label_map_in_another_crs_is_warned_of(tiny, tmp_path, caplog, crs, told):
    tiny.card["files"] = {"image": ["image.tif"], "labels": ["labels.tif"]}
    for name, values, system in (
        ("image", np.moveaxis(tiny.image, -1, 0), "EPSG:32633"),
        ("labels", tiny.labels[None], crs),
    ):
        count, height, width = values.shape
        profile = {"driver": "GTiff", "dtype": values.dtype, "crs": system, "transform": from_origin(5000, 9000, 2, 2)}
        with rasterio.open(tmp_path / f"{name}.tif", "w", count=count, height=height, width=width, **profile) as file:
            file.write(values)
    open_scene(tiny.write(), tmp_path)
    assert told == ("labels.tif: has the crs EPSG:32632, the image EPSG:32633; taken to be the same" in caplog.text)


@pytest.mark.filterwarnings("error:overflow")
@pytest.mark.parametrize("tiles", [1, 2])
def test_nodata_that_only_float64_holds(tiny, tmp_path, tiles):
    tiny.card["files"]["image"] = ["image*.tif"]
    values = np.moveaxis(tiny.image, -1, 0).astype(np.float64)
    nodata = np.finfo(np.float64).min
    values[2, 5, 6] = values[3, 15, 1] = nodata
    count, height, width = values.shape
    rows = height // tiles
    for start in range(0, height, rows):
        profile = {"driver": "GTiff", "dtype": "float64", "nodata": nodata, "crs": "EPSG:32633"}
        profile |= {"transform": from_origin(5000, 9000 - 2 * start, 2, 2), "count": count}
        with rasterio.open(tmp_path / f"image{start}.tif", "w", height=rows, width=width, **profile) as file:
            file.write(values[:, start : start + rows])
    assert np.argwhere(~open_scene(tiny.write(), tmp_path).valid).tolist() == [[5, 6], [15, 1]]


def test_nominal_wavelengths_step_in_where_the_file_has_none(tiny, tmp_path, caplog):
    tiny.card["bands"]["from_file"] = True
    scene = open_scene(tiny.write(), tmp_path)
    assert scene.bands.wavelengths.tolist() == [450, 550, 650, 750, 850, 950]
    assert "the image file has no wavelengths" in caplog.text


POTSDAM = {
    "name": "enmap_potsdam",
    "title": "Potsdam",
    "sensor": "EnMAP",
    "files": {"image": ["images/*.tif"], "labels": ["labels/*.tif"]},
    "shape": {"height": 192, "width": 160, "channels": 224},
    "bands": {"from_file": True},
    "gsd": 30,
    "classes": [
        {"name": f"class {index}", "colour": f"#0000{index}0", "pixels": pixels}
        for index, pixels in enumerate([505, 953, 1694, 2070, 91, 359])
    ],
    "licence": "see the provider",
    "citation": "see the provider",
}


def test_real_tiles_of_a_satellite_scene(tmp_path, shared_path):
    folder = shared_path("data", "enmap_potsdam")
    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump(POTSDAM))
    scene = open_scene(path, folder)
    assert scene.image.shape == (218, 192, 160)
    assert scene.dropped_bands == (129, 130, 131, 132, 133, 134)
    assert scene.bands.wavelengths[[0, -1]].tolist() == pytest.approx([418.24, 2445.53])
    assert scene.bands.widths is not None
    # 18 tiles of 32 x 32 pixels
    assert scene.valid.sum() == 18 * 32 * 32
    assert scene.georeference.crs == "EPSG:32633"
    assert scene.georeference.transform == (30, 0, 364095, 0, -30, 5809965)
    assert len(scene.hashes) == 36
    # trees are green: near infrared well above red
    red, infrared = (np.abs(scene.bands.wavelengths - wave).argmin() for wave in (665, 865))
    trees = scene.image[:, scene.labels == 3]
    ndvi = (trees[infrared] - trees[red]) / (trees[infrared] + trees[red])
    assert np.median(ndvi) > 0.7


def test_gsd_is_compared_with_the_georeference(tmp_path, shared_path):
    folder = shared_path("data", "enmap_potsdam")
    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump({**POTSDAM, "gsd": 3.0}))
    with pytest.raises(DataError, match="pixels of 30 m, the card says gsd 3"):
        open_scene(load_card(path), folder)


def test_a_class_that_is_nodata_in_the_file_is_told(tiny):
    tiny.card["files"]["labels"], tiny.card["ignore"] = ["labels.tif"], [200]
    tiny.card["classes"] = [entry | {"value": value} for value, entry in enumerate(tiny.card["classes"])]
    profile = {"driver": "GTiff", "height": 24, "width": 20, "count": 1, "dtype": "uint8", "crs": "EPSG:32633"}
    profile["transform"] = rasterio.Affine(2, 0, 0, 0, -2, 0)
    for nodata in (0, 255):
        with rasterio.open(tiny.folder / "labels.tif", "w", **profile, nodata=nodata) as file:
            file.write(np.minimum(tiny.labels, 2), 1)
        if nodata:
            assert (open_scene(tiny.write(), tiny.folder).labels == np.minimum(tiny.labels, 2)).all()
            continue
        # as tiles, too
        with rasterio.open(tiny.folder / "rest.tif", "w", **profile | {"height": 1}, nodata=nodata) as file:
            file.write(np.minimum(tiny.labels[:1], 2), 1)
        tiny.card["files"]["labels"] = ["labels.tif", "rest.tif"]
        with pytest.raises(DataError, match=r"labels\.tif: 0 is its nodata and a class of the card"):
            open_scene(tiny.write(), tiny.folder)
        tiny.card["files"]["labels"] = ["labels.tif"]
        with pytest.raises(DataError, match=r"labels\.tif: 0 is its nodata and a class of the card; take it off"):
            open_scene(tiny.write(), tiny.folder)


def test_bands_that_the_file_calls_bad_are_dropped(tiny, caplog):
    tiny.image[0, 0, 4] = np.nan
    tiny.write()
    tiny.image.tofile(tiny.folder / "image.img")
    (tiny.folder / "image.hdr").write_text(
        "ENVI\nsamples = 20\nlines = 24\nbands = 6\nheader offset = 0\ndata type = 4\ninterleave = bip\n"
        "byte order = 0\nbbl = {1, 0, 1, 1, 0, 1}\n"
    )
    tiny.card["files"]["image"] = ["image.hdr"]
    tiny.card["bands"] = {"start": 450, "stop": 950, "count": 6}
    scene = open_scene(tiny.write(), tiny.folder)
    assert scene.dropped_bands == (1, 4)
    assert np.array_equal(scene.image, np.moveaxis(tiny.image, -1, 0)[[0, 2, 3, 5]])
    # what a bad band lacks is no loss
    assert scene.valid.all()
    assert scene.bands.wavelengths.tolist() == [450, 650, 750, 950]
    assert "2 bands that the file calls bad dropped, indices [1, 4]" in caplog.text
