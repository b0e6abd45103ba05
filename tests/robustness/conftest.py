"""Small scenes and configurations that whole runs finish within seconds, and a server of processes to kill."""

import numpy as np
import pytest
import yaml
from forks import Forks

SIDE, BANDS, CLASSES = 24, 8, 3


@pytest.fixture(scope="session")
def forks():
    server = Forks()
    yield server
    server.close()


def write_scene(folder, classes):
    """Writes a noisy scene with a spectrum for each of its classes (height, width), and returns its card."""
    generator = np.random.default_rng(3)
    height, width = classes.shape
    spectra = generator.normal(100, 20, (CLASSES, BANDS))
    image = spectra[classes] + generator.normal(0, 4, (height, width, BANDS))
    np.save(folder / "image.npy", image.astype(np.float32))
    np.save(folder / "labels.npy", (classes + 1).astype(np.uint8))
    content = {
        "name": "painted", "title": "Painted", "sensor": "a random generator",
        "files": {"image": ["image.npy"], "labels": ["labels.npy"]},
        "shape": {"height": height, "width": width, "channels": BANDS},
        "bands": {"start": 450, "stop": 950, "count": BANDS}, "gsd": 2,
        "classes": [{"name": f"class {i}", "colour": f"#0000{i:02x}"} for i in range(CLASSES)],
        "licence": "CC0", "citation": "nobody",
    }  # fmt: skip
    (folder / "painted.yaml").write_text(yaml.safe_dump(content))
    return folder / "painted.yaml"


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """Card of a scene of stripes, a class each."""
    classes = np.arange(SIDE) * CLASSES // SIDE * np.ones((SIDE, 1), int)
    return write_scene(tmp_path_factory.mktemp("stripes"), classes)


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    """Card of a scene of small fields, each of any class."""
    classes = np.random.default_rng(0).integers(0, CLASSES, (12, 12)).repeat(4, 0).repeat(4, 1)
    return write_scene(tmp_path_factory.mktemp("fields"), classes)


@pytest.fixture(scope="module")
def scene(card):
    """Overrides of a short training on the scene: three epochs of seven batches."""
    return [
        "experiment=own_scene", f"data.card={card}", f"data.root={card.parent}", "data.patch_size=5",
        "data.components=4", "data.split.train=0.2", "data.split.validation=0.1", "data.batch_size=16",
        "trainer.max_epochs=3", "trainer.precision=32-true", "+model.dim=16", "+model.num_heads=[2]",
        "+model.depths=[1]", "+model.stem_channels=[2,4]", "+model.stem_depths=[3,3]", "baselines=null",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tiles(card):
    """Overrides of a short pretraining on tiles of the scene."""
    source = "data.sources.indian_pines"
    return [
        "experiment=hyper_mae_indian_pines", f"{source}.card={card}", f"{source}.root={card.parent}",
        f"{source}.size=4", f"{source}.stride=4", f"{source}.cell=8", "data.batch_size=4",
        "model.encoder.patch_size=2", "model.encoder.embed_dim=24", "model.encoder.num_heads=3",
        "model.encoder.depth=1", "model.decoder_dim=16", "model.decoder_depth=1", "model.decoder_heads=2",
        "model.channel_mask_ratio=0.5", "task.channel_sampling=[0.5,1]", "trainer.max_epochs=3",
        "trainer.precision=32-true",
    ]  # fmt: skip
