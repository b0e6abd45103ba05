"""Exported graphs against the model that was saved, applied to values that numpy scaled."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.numpy import load_file, save_file
from stripes import write_stripes

from vision_lowrank import export as command
from vision_lowrank.adapters import LoRA, inject, save_adapter
from vision_lowrank.errors import CheckpointError, ConfigError
from vision_lowrank.models import LessViT, LolaSpecViT
from vision_lowrank.models.heads import LessSegmentation
from vision_lowrank.trained_run import load_run

BANDS, CLASSES, COMPONENTS, SIDE = 8, 3, 4, 5
WAVELENGTHS = np.linspace(450, 950, BANDS)


def randomise(model):
    """Gives every weight that is trained a value, so that none is without effect."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in (value for value in model.parameters() if value.requires_grad):
            value.add_(0.1 * torch.randn(value.shape, generator=generator))


def write_run(folder, model, projection, regime, data, inputs):
    """Leaves what `train.py` leaves of a run with this scaling; returns mean, gain and projection."""
    generator = np.random.default_rng(1)
    scaling = {"mean": generator.uniform(50, 150, BANDS), "gain": generator.uniform(0.02, 0.1, BANDS)}
    if projection:
        scaling["projection"] = generator.normal(0, 0.5, (COMPONENTS, BANDS))
    scaling = {name: value.astype(np.float32) for name, value in scaling.items()}
    save_file(scaling, folder / "preprocessing.safetensors")
    card = write_stripes(folder, 12, 10, BANDS, CLASSES)
    data = {"card": str(card), "root": str(folder), **data}
    OmegaConf.save({"data": data, "regime": regime, "task": {"inputs": inputs}}, folder / "config.yaml")
    model.save_pretrained(folder / "model")
    return scaling


def logits_of(model, scaling):
    """The function from raw patches to the logits of LoLA-SpecViT."""

    def reference(image):
        scaled = np.einsum("kc,bchw->bkhw", scaling["projection"], standardised(image, scaling))
        with torch.no_grad():
            return model.eval()(torch.from_numpy(scaled)).numpy()

    return reference


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
    """Folder of LoLA-SpecViT with adapters, and the function from raw patches to its logits."""
    folder = tmp_path_factory.mktemp("patches")
    model = LolaSpecViT(COMPONENTS, CLASSES, SIDE, (2, 4), (3, 3), 16, (1,), (2,), window_size=2)
    randomise(model)
    scaling = write_run(folder, model, True, "adapt", {}, ["image"])
    inject(model, ["attn.qkv", "mlp.fc2"], LoRA(rank=2, alpha=4), train="head")
    randomise(model)
    save_adapter(model, folder / "adapter")
    return folder, logits_of(model, scaling)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Folder of LoLA-SpecViT whose weights were all trained, as by default, and its function."""
    folder = tmp_path_factory.mktemp("full")
    model = LolaSpecViT(COMPONENTS, CLASSES, SIDE, (2, 4), (3, 3), 64, (1,), (4,), window_size=7)
    randomise(model)
    scaling = write_run(folder, model, True, "full", {}, ["image"])
    return folder, logits_of(model, scaling)


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """Folder of LESS ViT on a part of the bands, and the function from raw windows to its logits."""
    folder = tmp_path_factory.mktemp("windows")
    encoder = LessViT(patch_size=2, embed_dim=32, depth=1, num_heads=2, field_radius=5, radar=False)
    model = LessSegmentation(encoder, "linear", CLASSES, channel_pool=True, pool_heads=2)
    randomise(model)
    data = {"size": 6, "stride": 3, "evaluation_batch_size": 4, "bands": [500, 900], "wavelengths": "physical"}
    scaling = write_run(folder, model, False, "full", data, ["image", "wavelengths", "gsd"])
    used = (WAVELENGTHS >= 500) & (WAVELENGTHS <= 900)

    def reference(image):
        scaled = torch.from_numpy(standardised(image, scaling)[:, used])
        with torch.no_grad():
            return model.eval()(scaled, WAVELENGTHS[used].tolist(), 2.0).numpy()

    return folder, reference


def standardised(image, scaling):
    scaled = (image - scaling["mean"][:, None, None]) * scaling["gain"][:, None, None]
    return np.where(np.isnan(scaled).any(1, keepdims=True), np.float32(0), scaled).astype(np.float32)


def export(repository, folder, out):
    with initialize_config_dir(str(repository / "configs/export"), version_base="1.3"):
        return command.export(compose("export", [f"weights={folder}", f"out={out}"]))


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("patches", ".pt2"),
        ("patches", ".onnx"),
        ("full", ".onnx"),
        ("windows", ".pt2"),
        pytest.param("windows", ".onnx", marks=pytest.mark.slow),
    ],
)
def test_a_graph_computes_what_the_saved_model_computes(repository, tmp_path, request, kind, suffix):
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
        onnxruntime = pytest.importorskip("onnxruntime")
    folder, reference = request.getfixturevalue(kind)
    out, about = export(repository, folder, tmp_path / f"model{suffix}")
    assert sorted(tmp_path.iterdir()) == sorted([out, about])
    told = json.loads(about.read_text())
    side = told["input"]["shape"][-1]
    image = np.random.default_rng(5).normal(100, 30, (7, BANDS, side, side)).astype(np.float32)
    image[1, 2, 0, 3] = np.nan
    if suffix == ".onnx":
        session = onnxruntime.InferenceSession(out)
        assert [item.name for item in session.get_inputs()] == ["image"]

        def run(batch):
            return session.run(None, {"image": batch})[0]
    else:
        loaded = torch.export.load(out).module()

        def run(batch):
            return loaded(torch.from_numpy(batch)).detach().numpy()

    for size in (1, 2, 3, 7):
        found, expected = run(image[:size]), reference(image[:size])
        assert list(found.shape) == [size, *told["output"]["shape"][1:]]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
def test_a_graph_leaves_brightness_out_as_its_run_does(repository, tmp_path, patches, suffix):
    folder = tmp_path / "run"
    shutil.copytree(patches[0], folder)
    scaling = load_file(folder / "preprocessing.safetensors")
    scaling |= {"mean": scaling["mean"] / 1000, "gain": 20 * scaling["gain"]}
    save_file(scaling | {"brightness": np.array([False])}, folder / "preprocessing.safetensors")
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    out, _ = export(repository, folder, tmp_path / f"model{suffix}")
    image = np.random.default_rng(5).uniform(0.5, 200, (3, BANDS, SIDE, SIDE)).astype(np.float32)
    image[1, 2, 0, 3] = np.nan
    logarithm = np.log(np.maximum(image, 1))
    shapes = standardised(logarithm - logarithm.mean(axis=1, keepdims=True), scaling)
    with torch.no_grad():
        expected = load_run(folder).model(torch.from_numpy(np.einsum("kc,bchw->bkhw", scaling["projection"], shapes)))
    found = command.run_file(out, torch.from_numpy(image)).detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_nodata_of_the_card_is_no_value(repository, tmp_path, patches):
    folder = tmp_path / "run"
    shutil.copytree(patches[0], folder)
    with (folder / "stripes.yaml").open("a") as file:
        file.write("nodata: -32768.1\n")
    config = OmegaConf.load(folder / "config.yaml")
    config.data.card = str(folder / "stripes.yaml")
    OmegaConf.save(config, folder / "config.yaml")
    out, about = export(repository, folder, tmp_path / "model.pt2")
    assert json.loads(about.read_text())["nodata"] == -32768.1
    image = np.random.default_rng(5).normal(100, 30, (3, BANDS, SIDE, SIDE)).astype(np.float32)
    image[1, :, 0, 3] = image[2, 2, 4, 4] = np.nan
    # as float32 holds it
    marked = np.where(np.isnan(image), np.float32(-32768.1), image)
    found = command.run_file(out, torch.from_numpy(marked)).detach().numpy()
    np.testing.assert_allclose(found, patches[1](image), rtol=1e-4, atol=1e-4 * np.abs(found).max())


def test_what_a_user_has_to_know_is_told(patches, windows):
    run = load_run(patches[0])
    for nodata, expected in ((None, None), (np.nan, None), (-1, -1)):
        card = dataclasses.replace(run.card, nodata=nodata)
        assert command.describe(dataclasses.replace(run, card=card), SIDE)["nodata"] == expected
    told = command.describe(load_run(patches[0]), SIDE)
    assert told["input"] == {"name": "image", "dtype": "float32", "shape": ["batch", BANDS, SIDE, SIDE]}
    assert told["output"] == {"name": "logits", "shape": ["batch", CLASSES]}
    assert told["wavelengths"] == pytest.approx(WAVELENGTHS.tolist(), rel=1e-6)
    assert [entry["name"] for entry in told["classes"]] == ["class 0", "class 1", "class 2"]
    assert (told["gsd"], told["labels"]) == (2, "of the pixel in the centre")
    told = command.describe(load_run(windows[0]), 6)
    assert told["output"]["shape"] == ["batch", CLASSES, 6, 6]
    assert told["labels"] == "of every pixel"


def test_a_graph_that_computes_something_else_is_not_kept(repository, tmp_path, patches, monkeypatch):
    run_file = command.run_file
    monkeypatch.setattr(command, "run_file", lambda path, image: run_file(path, image) + 0.01 * (len(image) == 5))
    with pytest.raises(CheckpointError, match=r"\.pt2 of a batch of 5: logits differ from the model's by 1\.0e-02"):
        export(repository, patches[0], tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_wrong_options(repository, tmp_path, patches, monkeypatch):
    with pytest.raises(ConfigError, match=r"model\.pth: give the name of a file ending in \.onnx or \.pt2"):
        export(repository, patches[0], tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"no config\.yaml there"):
        export(repository, tmp_path, tmp_path / "model.pt2")
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else sys)
    with pytest.raises(ConfigError, match=r"onnxscript not installed; pip install onnxscript, or give a \.pt2"):
        export(repository, patches[0], tmp_path / "model.onnx")


def test_a_place_that_cannot_be_written_to_is_told_before_work(repository, tmp_path, patches, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(command, "trace", lambda *_: pytest.fail("work has started"))
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        export(repository, patches[0], tmp_path / "file" / "model.pt2")
