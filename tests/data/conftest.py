"""A tiny scene on disk, written as a user would (arrays and one card), and miniatures of two benchmark tasks."""

import numpy as np
import pytest
import yaml
from task_archives import COUNTS, SIDE, Miniature, small

from vision_lowrank.data.task_cards import load_task_card

HEIGHT, WIDTH, CHANNELS, CLASSES = 24, 20, 6, 3


class TinyScene:
    """Folder with `image.npy`, `labels.npy` and `tiny.yaml`; change `card`, `image` or `labels`, then `write()`."""

    def __init__(self, folder):
        generator = np.random.default_rng(7)
        self.folder = folder
        self.image = generator.normal(100, 20, (HEIGHT, WIDTH, CHANNELS)).astype(np.float32)
        self.labels = generator.integers(0, CLASSES + 1, (HEIGHT, WIDTH)).astype(np.uint8)
        self.card = {
            "name": "tiny",
            "title": "Tiny scene",
            "sensor": "a random generator",
            "files": {"image": ["image.npy"], "labels": ["labels.npy"]},
            "shape": {"height": HEIGHT, "width": WIDTH, "channels": CHANNELS},
            "bands": {"start": 450, "stop": 950, "count": CHANNELS},
            "gsd": 2,
            "classes": [
                {"name": "grass", "colour": "#00ff00"},
                {"name": "soil", "colour": "#aa5500"},
                {"name": "water", "colour": "#0000ff"},
            ],
            "licence": "CC0",
            "citation": "nobody",
        }

    def write(self):
        np.save(self.folder / "image.npy", self.image)
        np.save(self.folder / "labels.npy", self.labels)
        path = self.folder / "tiny.yaml"
        path.write_text(yaml.safe_dump(self.card))
        return path


@pytest.fixture
def tiny(tmp_path):
    return TinyScene(tmp_path)


@pytest.fixture
def eurosat(tmp_path):
    return Miniature(small(load_task_card("eurosat")), tmp_path / "data", SIDE, COUNTS)


@pytest.fixture
def dfc2020(tmp_path):
    return Miniature(small(load_task_card("dfc2020")), tmp_path / "data", SIDE, COUNTS)
