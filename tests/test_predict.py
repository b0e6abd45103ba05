"""Whole scenes by a finished run, against the run's own map and against the model applied to patches cut by hand."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rasterio.windows import Window
from safetensors.numpy import load_file, save_file

from vision_lowrank import pixel_predictor
from vision_lowrank import predict as command
from vision_lowrank.data import streams
from vision_lowrank.errors import CheckpointError, ConfigError, DataError
from vision_lowrank.fitting import restore_network
from vision_lowrank.inference import predict_probabilities
from vision_lowrank.instantiate import instantiate
from vision_lowrank.models import LolaSpecViT
from vision_lowrank.models.heads import LessSegmentation
from vision_lowrank.prediction_files import Grid, Parts, write_geotiff
from vision_lowrank.training import train

REPOSITORY = Path(__file__).resolve().parents[1]
HEIGHT, WIDTH, BANDS, CLASSES, CONSTANT = 30, 26, 9, 3, 4
WAVELENGTHS = np.linspace(450, 950, BANDS)
PLACE = rasterio.Affine(2, 0, 364000, 0, -2, 5809000)
COLOURS = ["#00ff00", "#aa5500", "#0000ff"]
PIXELS = [
    *("experiment=own_scene", "data.patch_size=5", "data.components=4", "+model.dim=16", "+model.num_heads=[2]"),
    *("+model.depths=[1]", "+model.stem_channels=[2,4]", "+model.stem_depths=[3,3]", "trainer.max_epochs=4"),
]
WINDOWS = [
    *("experiment=less_vit_indian_pines", "name=own_scene", "data/split=random", "data.size=4", "data.stride=1"),
    *("model.encoder.embed_dim=32", "model.encoder.depth=1", "model.encoder.num_heads=2", "model.pool_heads=2"),
    *("task.channel_sampling=[0.5,1]", "data.bands=[450,900]", "trainer.max_epochs=2"),
]


def configure(folder, name, *overrides):
    with initialize_config_dir(str(REPOSITORY / folder), version_base="1.3"):
        return compose(name, list(overrides))


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Folder with a scene of stripes, one band without variation and two pixels without values: array and card."""
    folder = tmp_path_factory.mktemp("scene")
    generator = np.random.default_rng(3)
    spectra = generator.normal(100, 20, (CLASSES, BANDS))
    classes = np.arange(WIDTH) * CLASSES // WIDTH * np.ones((HEIGHT, 1), int)
    image = spectra[classes] + generator.normal(0, 8, (HEIGHT, WIDTH, BANDS))
    image[..., CONSTANT] = 7
    image[0, 0] = image[17, 9, 2] = np.nan
    np.save(folder / "image.npy", image.astype(np.float32))
    np.save(folder / "labels.npy", (classes + 1).astype(np.uint8))
    card = {
        "name": "stripes",
        "title": "Stripes",
        "sensor": "a random generator",
        "files": {"image": ["image.npy"], "labels": ["labels.npy"]},
        "shape": {"height": HEIGHT, "width": WIDTH, "channels": BANDS},
        "bands": {"wavelengths": WAVELENGTHS.tolist()},
        "gsd": 2,
        "classes": [{"name": f"class {i}", "colour": colour} for i, colour in enumerate(COLOURS)],
        "licence": "CC0",
        "citation": "nobody",
    }
    (folder / "stripes.yaml").write_text(yaml.safe_dump(card))
    return folder


def run_of(scene, root, *overrides):
    """The folder of a run on the scene."""
    data = [f"data.card={scene / 'stripes.yaml'}", f"data.root={scene}", "data.split.train=0.2"]
    common = ["data.split.validation=0.1", "trainer.precision=32-true", "baselines=null", f"runs_root={root}"]
    train(configure("configs", "train", *overrides, *data, *common))
    return max(root.glob("own_scene/*-seed*"), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture(scope="module")
def pixel_run(scene, tmp_path_factory):
    return run_of(scene, tmp_path_factory.mktemp("pixels"), *PIXELS)


@pytest.fixture(scope="module")
def window_run(scene, tmp_path_factory):
    return run_of(scene, tmp_path_factory.mktemp("windows"), *WINDOWS)


@pytest.fixture(params=["pixels", "windows"])
def run(request):
    return request.getfixturevalue("pixel_run" if request.param == "pixels" else "window_run")


@pytest.fixture
def small_windows(monkeypatch):
    """Windows of 16 x 16 pixels and tiles of 8 x 8, so that a scene has borders of either inside."""
    monkeypatch.setattr(command, "SIDE", 16)
    monkeypatch.setattr(streams, "WINDOW_BYTES", 1)
    monkeypatch.setattr(pixel_predictor, "TILE", 8)


def predict(run, scene, out, *overrides):
    return command.predict(
        configure(
            "configs/predict",
            "predict",
            f"weights={run}",
            f"scene={scene}",
            f"out={out}",
            "precision=32-true",
            *overrides,
        )
    )


def write_raster(scene, path, wavelengths=WAVELENGTHS, keep=slice(None), **profile):
    """The scene as a georeferenced file, its wavelengths as band tags."""
    values = np.load(scene / "image.npy").transpose(2, 0, 1)[keep]
    options = {"driver": "GTiff", "height": HEIGHT, "width": WIDTH, "count": len(values), "dtype": "float32"}
    options |= {"crs": "EPSG:32633", "transform": PLACE} | profile
    with rasterio.open(path, "w", **options) as file:
        file.write(values)
        for band, wavelength in enumerate(() if wavelengths is None else wavelengths, 1):
            file.update_tags(band, wavelength=str(wavelength), wavelength_units="Nanometers")
            file.set_band_description(band, f"band {band} ({wavelength} Nanometers)")
    return path


def expect_map(path, run):
    """The written map is the run's own, which training made without windows."""
    with rasterio.open(path) as file:
        found = file.read(1)
        own = np.load(run / "prediction.npy")
        assert file.dtypes == ("uint8",)
        assert file.nodata == 255
        assert file.compression.name == "deflate"
        assert file.colormap(1)[1][:3] == (0xAA, 0x55, 0)
        assert file.tags(1)["class_2"] == "class 2"
    assert found[0, 0] == found[17, 9] == 255
    assert np.mean(found == own) > 0.995
    assert len(np.unique(own)) > 2


@pytest.mark.usefixtures("small_windows")
def test_map_of_a_card_is_the_map_of_its_run(run, scene, tmp_path):
    assert predict(run, scene / "stripes.yaml", tmp_path / "map.tif", f"root={scene}") == [tmp_path / "map.tif"]
    expect_map(tmp_path / "map.tif", run)
    assert [path.name for path in tmp_path.iterdir()] == ["map.tif"]


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("kind", ["tiled", "striped", "envi"])
def test_map_of_a_file_is_in_its_place(kind, pixel_run, scene, tmp_path):
    if kind == "envi":
        write_raster(scene, tmp_path / "scene.dat", driver="ENVI", interleave="BIL")
        source = tmp_path / "scene.hdr"
    else:
        tiles = {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate"} if kind == "tiled" else {}
        source = write_raster(scene, tmp_path / "scene.tif", **tiles)
    predict(pixel_run, source, tmp_path / "map.tif")
    expect_map(tmp_path / "map.tif", pixel_run)
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.crs.to_epsg() == 32633
        assert file.transform == PLACE
        assert file.profile["tiled"]
        assert file.block_shapes == [(16, 16)]


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("kind", ["pixels", "windows"])
def test_a_map_without_brightness_is_that_of_training(kind, scene, tmp_path):
    options = PIXELS if kind == "pixels" else [option for option in WINDOWS if not option.startswith("data.bands")]
    run = run_of(scene, tmp_path / "runs", *options, "data.brightness=false")
    predict(run, write_raster(scene, tmp_path / "scene.tif"), tmp_path / "map.tif")
    expect_map(tmp_path / "map.tif", run)


def by_hand(run, scene, size):
    """Patches (pixels, 4, size, size) of the scene after the run's scaling, without its channel that does not vary."""
    scaling = load_file(run / "preprocessing.safetensors")
    image = np.delete(np.load(scene / "image.npy"), CONSTANT, axis=2)
    scaled = ((image - scaling["mean"]) * scaling["gain"]) @ scaling["projection"].T
    scaled[np.isnan(image).any(axis=2)] = 0
    padded = np.pad(scaled, ((size // 2, size // 2), (size // 2, size // 2), (0, 0)), mode="reflect")
    patches = [padded[y : y + size, x : x + size] for y in range(HEIGHT) for x in range(WIDTH)]
    return torch.from_numpy(np.stack(patches).transpose(0, 3, 1, 2))


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("threads", [1, 3])
def test_probabilities_are_those_of_patches_by_themselves(pixel_run, scene, tmp_path, threads, set_threads):
    source = write_raster(scene, tmp_path / "scene.tif")
    places = [tmp_path / "new" / "map.tif", tmp_path / "probabilities.tif"]
    set_threads(threads)
    assert predict(pixel_run, source, places[0], f"probabilities={places[1]}") == places
    with ThreadPoolExecutor(1) as later:
        assert torch.get_num_threads() == later.submit(torch.get_num_threads).result() == threads
    with rasterio.open(places[1]) as file, rasterio.open(places[0]) as classes:
        found, chosen = file.read(), classes.read(1)
        assert file.descriptions == ("class 0", "class 1", "class 2")
    with torch.inference_mode():
        model = LolaSpecViT.from_pretrained(pixel_run / "model").eval()
        expected = model(by_hand(pixel_run, scene, 5)).softmax(1).T.reshape(CLASSES, HEIGHT, WIDTH).numpy()
    missing = chosen == 255
    assert np.isnan(found[:, missing]).all()
    np.testing.assert_allclose(found[:, ~missing], expected[:, ~missing], atol=1e-4)
    assert np.array_equal(found[:, ~missing].argmax(0), chosen[~missing])


@pytest.mark.usefixtures("small_windows")
def test_embeddings_of_pixels(pixel_run, scene, tmp_path):
    predict(pixel_run, write_raster(scene, tmp_path / "scene.tif"), tmp_path / "out.tif", "what=embeddings")
    with torch.inference_mode():
        model = LolaSpecViT.from_pretrained(pixel_run / "model").eval()
        expected = model.forward_head(model.forward_features(by_hand(pixel_run, scene, 5)), pre_logits=True).numpy()
    with rasterio.open(tmp_path / "out.tif") as file:
        found = file.read().reshape(file.count, -1).T
        assert file.transform == PLACE
    valid = ~np.isnan(found).any(axis=1)
    assert valid.sum() == HEIGHT * WIDTH - 2
    np.testing.assert_allclose(found[valid], expected[valid], atol=1e-4)


@pytest.fixture(scope="module")
def pyramid_run(scene, tmp_path_factory):
    """As `window_run`, with a head that reads the maps of four blocks."""
    pyramid = ["model.head=upernet", "+model.decoder_dim=32", "model.encoder.depth=4", "trainer.max_epochs=1"]
    return run_of(scene, tmp_path_factory.mktemp("pyramid"), *WINDOWS, *pyramid)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("kind", ["window_run", "pyramid_run"])
def test_embeddings_of_patches_of_less_vit(kind, request, scene, tmp_path):
    window_run = request.getfixturevalue(kind)
    predict(window_run, write_raster(scene, tmp_path / "scene.tif"), tmp_path / "out.tif", "what=embeddings")
    model = LessSegmentation.from_pretrained(window_run / "model").eval()
    scaling = load_file(window_run / "preprocessing.safetensors")
    image = np.delete(np.load(scene / "image.npy"), CONSTANT, axis=2)
    scaled = (image - scaling["mean"]) * scaling["gain"]
    scaled[np.isnan(image).any(axis=2)] = 0
    nanometres = np.delete(WAVELENGTHS, CONSTANT)
    used = nanometres <= 900
    # windows of 4 x 4 pixels side by side: the scene's last two columns and rows are filled by mirroring
    padded = np.pad(scaled, ((0, 2), (0, 2), (0, 0)), mode="reflect").transpose(2, 0, 1)[used]
    with rasterio.open(tmp_path / "out.tif") as file:
        found = file.read()
        assert found.shape == (32, HEIGHT // 2, WIDTH // 2)
        assert file.transform == PLACE @ rasterio.Affine.scale(2)
        assert file.dtypes[0] == "float32"
    for row, column in ((0, 0), (8, 12), (16, 8), (28, 24)):
        window = torch.from_numpy(padded[None, :, row : row + 4, column : column + 4].astype(np.float32))
        with torch.inference_mode():
            tokens = model.encoder.forward_features(window, torch.from_numpy(nanometres[used]), 2.0)
            expected = model.channel_pools[-1](tokens[:, 1:, 1:])[0].reshape(2, 2, 32).permute(2, 0, 1).numpy()
        place = found[:, row // 2 : row // 2 + 2, column // 2 : column // 2 + 2]
        np.testing.assert_allclose(place, expected[:, : place.shape[1], : place.shape[2]], atol=1e-4)


ADAPTED = ["regime=adapt", "adapter=gated_lora", "pretraining.epochs=1", "trainer.max_epochs=2"]


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize(
    "options",
    [[], ["data.patch_size=11"], ADAPTED],
    ids=["patches by themselves", "a shared front-end", "adapters that cannot be merged"],
)
def test_the_map_that_training_leaves_is_that_of_patches_by_themselves(options, scene, tmp_path):
    run = run_of(scene, tmp_path, *PIXELS, *options)
    config = OmegaConf.load(run / "config.yaml")
    data = instantiate(config.data)
    data.setup()
    trained = restore_network(config, data, run)
    expected = predict_probabilities(trained.task, data.predict_dataloader(), "32-true", "cpu").numpy()
    assert expected.std() > 0.1
    found = trained.predict(data, "32-true")[""]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    own = np.load(run / "prediction.npy")
    assert np.mean(found.argmax(1) == own.flat) > 0.995


@pytest.mark.parametrize("adapter", ["lora", "gated_lora", "dora", "pissa"])
def test_a_run_of_adapters(adapter, scene, tmp_path):
    short = ["regime=adapt", f"adapter={adapter}", "pretraining.epochs=1", "trainer.max_epochs=2"]
    run = run_of(scene, tmp_path, *PIXELS, *short)
    predict(run, scene / "stripes.yaml", tmp_path / "map.tif", f"root={scene}")
    with rasterio.open(tmp_path / "map.tif") as file:
        assert np.mean(file.read(1) == np.load(run / "prediction.npy")) > 0.995


class Killed(BaseException):
    """Nothing catches it, as nothing catches a signal."""


@pytest.mark.usefixtures("small_windows")
def test_an_interrupted_prediction_goes_on_and_leaves_an_older_map_alone(pixel_run, scene, tmp_path, monkeypatch):
    source, out = write_raster(scene, tmp_path / "scene.tif"), tmp_path / "map.tif"
    out.write_text("older")
    save = Parts.save

    def stop(parts, index, arrays):
        if index == 2:
            raise Killed
        save(parts, index, arrays)

    with monkeypatch.context() as patched:
        patched.setattr(Parts, "save", stop)
        with pytest.raises(Killed):
            predict(pixel_run, source, out)
    assert out.read_text() == "older"
    assert sorted(path.name for path in (tmp_path / ".map.parts").iterdir()) == [
        "000000.npz", "000001.npz", "identity.json",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"unfinished prediction with other outputs; delete that folder"):
        predict(pixel_run, source, out, "what=embeddings")
    computed = []
    monkeypatch.setattr(
        Parts, "save", lambda parts, index, arrays: (computed.append(index), save(parts, index, arrays))
    )
    predict(pixel_run, source, out)
    assert computed == [2, 3]
    expect_map(out, pixel_run)
    assert not (tmp_path / ".map.parts").exists()


def test_scenes_of_other_sensors_are_refused(pixel_run, scene, tmp_path):
    out = tmp_path / "map.tif"
    with pytest.raises(
        DataError, match=r"7 channels, the model was trained on 9, of which it uses 8, of 450 to 950 nm"
    ):
        predict(pixel_run, write_raster(scene, tmp_path / "few.tif", WAVELENGTHS[:7], keep=slice(7)), out)
    shifted = WAVELENGTHS + np.where(np.arange(BANDS) > 5, 3, 0)
    with pytest.raises(DataError, match=r"shifted.tif: channel index 6 is at 828 nm, the model was trained on 825 nm"):
        predict(pixel_run, write_raster(scene, tmp_path / "shifted.tif", shifted), out)
    assert not list(tmp_path.glob("*map*"))
    # no wavelengths at all, or without the channel that training left out: the same sensor as far as anybody can tell
    predict(pixel_run, write_raster(scene, tmp_path / "silent.tif", None), out)
    expect_map(out, pixel_run)
    used = np.delete(np.arange(BANDS), CONSTANT)
    predict(pixel_run, write_raster(scene, tmp_path / "used.tif", WAVELENGTHS[used], keep=used), out)
    expect_map(out, pixel_run)


@pytest.mark.usefixtures("small_windows")
def test_pixels_that_a_file_masks_get_no_class(pixel_run, scene, tmp_path):
    values = np.load(scene / "image.npy").transpose(2, 0, 1)
    source = write_raster(scene, tmp_path / "scene.tif")
    masked = np.zeros((HEIGHT, WIDTH), bool)
    masked[3:9, 14:20] = masked[28:, :2] = True
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(source, "r+") as file:
        file.write(np.where(masked, 90, values))
        file.write_mask(~masked)
    predict(pixel_run, source, tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as file:
        assert np.array_equal(file.read(1) == 255, masked | np.isnan(values).any(axis=0))


@pytest.mark.usefixtures("small_windows")
def test_missing_values_that_a_file_does_not_tell_are_those_of_training(
    pixel_run, scene, tmp_path, monkeypatch, caplog
):
    values = np.load(scene / "image.npy").transpose(2, 0, 1)
    source = write_raster(scene, tmp_path / "scene.tif")
    with rasterio.open(source, "r+") as file:
        file.write(np.where(np.isnan(values).any(axis=0), -9999, values))
    load_run = command.load_run

    def of_a_card_that_tells(folder):
        run = load_run(folder)
        return dataclasses.replace(run, card=dataclasses.replace(run.card, nodata=-9999))

    monkeypatch.setattr(command, "load_run", of_a_card_that_tells)
    with caplog.at_level("INFO"):
        predict(pixel_run, source, tmp_path / "map.tif")
    assert "scene.tif tells no value of missing pixels: taken to be -9999, as in training" in caplog.text
    expect_map(tmp_path / "map.tif", pixel_run)


@pytest.mark.parametrize(("factor", "warns"), [(1e-4, True), (0.5, False), (100, True)])
def test_values_in_another_unit_are_warned_of(factor, warns, pixel_run, scene, tmp_path, caplog):
    source = write_raster(scene, tmp_path / "scene.tif")
    with rasterio.open(source, "r+") as file:
        file.write((factor * file.read()).astype(np.float32))
    predict(pixel_run, source, tmp_path / "map.tif")
    assert warns == ("if they are in another unit, give a scene in that of training" in caplog.text)
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.read(1)[0, 0] == 255


def test_files_that_cannot_be_read_are_named_before_work_starts(pixel_run, scene, tmp_path):
    out = tmp_path / "map.tif"
    write_raster(scene, tmp_path / "cut.dat", driver="ENVI")
    write_raster(scene, tmp_path / "cut.tif")
    os.truncate(tmp_path / "cut.dat", (tmp_path / "cut.dat").stat().st_size - 8)
    os.truncate(tmp_path / "cut.tif", (tmp_path / "cut.tif").stat().st_size // 2)
    (tmp_path / "text.tif").write_text("no raster")
    write_raster(scene, tmp_path / "odd.dat", driver="ENVI")
    header = (tmp_path / "odd.hdr").read_text()
    (tmp_path / "odd.hdr").write_text(header.replace("header offset = 0", "header offset = none"))
    for source, message in (
        ("none.tif", "none.tif: not found"),
        ("text.tif", "text.tif: damaged, truncated or no raster"),
        ("cut.tif", "cut.tif: damaged, truncated or no raster"),
        ("cut.dat", "cut.dat: truncated, 28072 of the 28080 bytes"),
        ("odd.hdr", "odd.hdr: damaged header .*'none'"),
        ("nobody", "dataset card .*nobody: not found"),
    ):
        with pytest.raises(DataError, match=message):
            predict(pixel_run, tmp_path / source, out)
    with pytest.raises(DataError, match="give others by a card"):
        predict(pixel_run, scene / "image.npy", out)
    write_raster(scene, tmp_path / "scene.tif")
    with rasterio.open(tmp_path / "scene.tif") as file:
        profile, values = file.profile, file.read(window=Window(0, 0, 2, 2))
    with rasterio.open(tmp_path / "tiny.tif", "w", **(profile | {"height": 2, "width": 2})) as file:
        file.write(values)
    with pytest.raises(DataError, match="2 x 2 pixels, but the model sees 2 pixels around each"):
        predict(pixel_run, tmp_path / "tiny.tif", tmp_path / "tiny_map.tif")
    assert not list(tmp_path.glob(".*.parts"))


def test_incomplete_runs_are_refused(pixel_run, scene, tmp_path):
    def missing(*names):
        folder = tmp_path / "run"
        subprocess.run(["rm", "-rf", folder], check=True)
        subprocess.run(["cp", "-r", pixel_run, folder], check=True)
        for name in names:
            (folder / name).unlink()
        return folder

    source = write_raster(scene, tmp_path / "scene.tif")
    for name in ("config.yaml", "preprocessing.safetensors", "model/model.safetensors"):
        with pytest.raises(CheckpointError, match=f"no {name} there; give the folder of a finished run"):
            predict(missing(name), source, tmp_path / "map.tif")
    folder = missing()
    (folder / "model/model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="model: cannot be loaded"):
        predict(folder, source, tmp_path / "map.tif")
    folder = missing()
    scaling = load_file(folder / "preprocessing.safetensors")
    save_file({"mean": scaling["mean"]}, folder / "preprocessing.safetensors")
    with pytest.raises(CheckpointError, match=r"preprocessing.safetensors is damaged .*'gain' is missing"):
        predict(folder, source, tmp_path / "map.tif")
    folder = missing()
    (folder / "metrics.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"metrics.json is not that of a run on a scene"):
        predict(folder, source, tmp_path / "map.tif")
    folder = missing()
    (folder / "config.yaml").write_text("data: {card: x}")
    with pytest.raises(CheckpointError, match=r"config.yaml is not that of a run on a scene"):
        predict(folder, source, tmp_path / "map.tif")


def test_classes_that_the_card_had_not_in_training_are_refused(pixel_run, scene, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(pixel_run, folder)
    card = yaml.safe_load((scene / "stripes.yaml").read_text())
    # the same pixels under the same values, listed the other way round
    card["classes"] = [entry | {"value": value} for value, entry in enumerate(card["classes"], 1)][::-1]
    (tmp_path / "stripes.yaml").write_text(yaml.safe_dump(card))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace(str(scene / "stripes.yaml"), str(tmp_path / "stripes.yaml")))
    message = "classes class 2, class 1, class 0 now, in training it had class 0, class 1, class 2; put back"
    with pytest.raises(CheckpointError, match=message):
        predict(folder, write_raster(scene, tmp_path / "scene.tif"), tmp_path / "map.tif")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["what=maps"], "it can be classes or embeddings"),
        (["what=embeddings", "probabilities=p.tif"], "go with what=classes"),
        (["out=map.png"], "ending in .tif"),
        (["probabilities=map.tif"], "also out"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    given = [option for option in ("weights=none", "scene=none", "out=map.tif") if options[0][:3] != option[:3]]
    with pytest.raises(ConfigError, match=message):
        command.predict(configure("configs/predict", "predict", *given, *options))


@pytest.mark.parametrize("option", ["out", "probabilities"])
def test_the_scene_is_not_overwritten(option, pixel_run, scene, tmp_path):
    source = write_raster(scene, tmp_path / "scene.tif")
    before = source.read_bytes()
    with pytest.raises(ConfigError, match=r"scene\.tif is the scene itself"):
        predict(pixel_run, source, tmp_path / "map.tif", f"{option}={source}")
    assert source.read_bytes() == before


def test_windows_that_nothing_is_known_of_are_not_used(tmp_path):
    parts = Parts(tmp_path / "map.tif", {"weights": "a"})
    parts.save(0, {"classes": np.zeros((1, 2, 2), np.uint8)})
    # as a removal leaves it that is killed midway
    (parts.folder / "identity.json").unlink()
    assert Parts(tmp_path / "map.tif", {"weights": "b"}).missing(1) == [0]
    # nor does one that was refused before its first window stand in the way
    assert Parts(tmp_path / "map.tif", {"weights": "c"}).missing(1) == [0]
    (parts.folder / "identity.json").write_text("{")
    with pytest.raises(ConfigError, match=r"identity\.json is damaged"):
        Parts(tmp_path / "map.tif", {"weights": "b"})


def test_a_raster_that_gdal_could_not_write_whole_is_not_kept(tmp_path, monkeypatch):
    values = np.arange(64, dtype=np.float32).reshape(1, 8, 8)
    parts = Parts(tmp_path / "map.tif", {})
    parts.save(0, {"embeddings": values})
    grid = Grid([streams.Window(0, 0, 8, 8)], 8, 8, 1, 16, None)
    write_geotiff(tmp_path / "map.tif", parts, "embeddings", grid, ["first"])
    before = (tmp_path / "map.tif").read_bytes()
    write = rasterio.io.DatasetWriter.write
    monkeypatch.setattr(rasterio.io.DatasetWriter, "write", lambda self, x, **options: write(self, x * 0, **options))
    with pytest.raises(OSError, match="could not be written whole") as caught:
        write_geotiff(tmp_path / "map.tif", parts, "embeddings", grid, ["first"])
    assert caught.value.filename == str(tmp_path / "map.tif")
    assert (tmp_path / "map.tif").read_bytes() == before


def test_what_is_not_given_is_named():
    with pytest.raises(ConfigError, match="out, scene not given"):
        command.predict(configure("configs/predict", "predict", "weights=none"))


def test_a_folder_that_cannot_be_written_to_ends_the_command_before_work(pixel_run, scene, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    source = write_raster(scene, tmp_path / "scene.tif")
    monkeypatch.setattr(command, "read_scaled", lambda *_: pytest.fail("work has started"))
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        predict(pixel_run, source, tmp_path / "file" / "map.tif")
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        predict(pixel_run, source, tmp_path / "map.tif", f"probabilities={tmp_path / 'file' / 'probabilities.tif'}")


@pytest.mark.slow
def test_a_file_larger_than_memory_is_killed_and_goes_on(scene, tmp_path):
    """Size by LARGE_SCENE=6000x6000x100 (ten minutes and more); memory may not grow with it, and stays below 2 GB."""
    height, width, bands = map(int, os.environ.get("LARGE_SCENE", "2000x2000x20").split("x"))
    generator = np.random.default_rng(0)
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    spectra = generator.uniform(500, 3000, (CLASSES, bands))
    labels = generator.integers(0, CLASSES, (HEIGHT, WIDTH))
    np.save(tiny / "image.npy", (spectra[labels] + generator.normal(0, 50, (HEIGHT, WIDTH, bands))).astype(np.float32))
    np.save(tiny / "labels.npy", (labels + 1).astype(np.uint8))
    card = yaml.safe_load((scene / "stripes.yaml").read_text())
    card["shape"]["channels"] = bands
    card["bands"] = {"start": 450, "stop": 2400, "count": bands}
    (tiny / "stripes.yaml").write_text(yaml.safe_dump(card))
    small = ["data.patch_size=3", "+model.dim=8", "+model.num_heads=[1]", "+model.depths=[1]", "data.components=4"]
    stem = ["+model.stem_channels=[2]", "+model.stem_depths=[3]", "trainer.max_epochs=2"]
    run = run_of(tiny, tmp_path / "runs", "experiment=own_scene", *small, *stem)
    profile = {"driver": "GTiff", "height": height, "width": width, "count": bands, "dtype": "uint16"}
    with rasterio.open(tmp_path / "large.tif", "w", **profile, bigtiff="if_safer", interleave="pixel") as file:
        for top in range(0, height, 100):
            rows = min(100, height - top)
            block = spectra[generator.integers(0, CLASSES, (rows, width))] + generator.normal(0, 50, (rows, width, 1))
            file.write(block.clip(0).astype(np.uint16).transpose(2, 0, 1), window=Window(0, top, width, rows))
    cube = 4 * height * width * bands
    arguments = [
        f"weights={run}",
        f"scene={tmp_path / 'large.tif'}",
        f"out={tmp_path / 'map.tif'}",
        "precision=32-true",
    ]
    # in a process of its own, whose memory is its own
    start = [sys.executable, str(REPOSITORY / "tests/large_prediction.py"), str(cube), *arguments]
    parts = tmp_path / ".map.parts"
    with subprocess.Popen(start, cwd=REPOSITORY) as first:
        while first.poll() is None and len(list(parts.glob("0*.npz"))) < 3:
            time.sleep(0.1)
        first.send_signal(signal.SIGKILL)
    assert first.returncode == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in parts.glob("0*.npz")}
    assert len(finished) >= 3
    assert not (tmp_path / "map.tif").exists()
    second = subprocess.run(start, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert f"{len(finished)} of" in second.stderr
    rise, peak = map(float, second.stdout.split()[-2:])
    assert rise < cube / 2e6
    assert peak < 2000
    with rasterio.open(tmp_path / "map.tif") as file, rasterio.open(tmp_path / "large.tif") as source:
        assert file.shape == (height, width)
        # the last corner, through windows that were cut short
        raw = source.read(window=Window(width - 40, height - 40, 40, 40)).astype(np.float32)
        found = file.read(1, window=Window(width - 39, height - 39, 38, 38))
    scaling = load_file(run / "preprocessing.safetensors")
    scaled = np.einsum("kc,chw->khw", scaling["projection"], ((raw.T - scaling["mean"]) * scaling["gain"]).T)
    patches = [scaled[:, y : y + 3, x : x + 3] for y in range(38) for x in range(38)]
    with torch.inference_mode():
        model = LolaSpecViT.from_pretrained(run / "model").eval()
        expected = model(torch.from_numpy(np.stack(patches).astype(np.float32))).argmax(1).reshape(38, 38).numpy()
    assert np.mean(found == expected) > 0.99
