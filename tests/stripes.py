"""A scene in which every class is a stripe of rows with a spectrum of its own: small models learn it in seconds."""

from pathlib import Path

import numpy as np
import yaml


def write_stripes(folder: Path, height: int, width: int, bands: int = 8, classes: int = 3) -> Path:
    """Writes image, labels and card; returns the card's path."""
    generator = np.random.default_rng(3)
    spectra = generator.normal(100, 20, (classes, bands))
    rows = (np.arange(height) * classes // height)[:, None] * np.ones((1, width), int)
    image = spectra[rows] + generator.normal(0, 4, (height, width, bands))
    labels = np.where(generator.random((height, width)) < 0.8, rows + 1, 0)
    np.save(folder / "image.npy", image.astype(np.float32))
    np.save(folder / "labels.npy", labels.astype(np.uint8))
    card = {
        "name": "stripes",
        "title": "Stripes",
        "sensor": "a random generator",
        "files": {"image": ["image.npy"], "labels": ["labels.npy"]},
        "shape": {"height": height, "width": width, "channels": bands},
        "bands": {"start": 450, "stop": 950, "count": bands},
        "gsd": 2,
        "classes": [{"name": f"class {i}", "colour": f"#0000{40 * i:02x}"} for i in range(classes)],
        "licence": "CC0",
        "citation": "nobody",
    }
    (folder / "stripes.yaml").write_text(yaml.safe_dump(card))
    return folder / "stripes.yaml"
