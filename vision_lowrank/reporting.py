"""The pictures, maps and curves that a run on a scene leaves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vision_lowrank.data.scene import Scene
from vision_lowrank.plots.confusion import save_confusion
from vision_lowrank.plots.curves import Series, save_curves
from vision_lowrank.plots.maps import composite, save_composite, save_error_map, save_label_map, save_overview
from vision_lowrank.plots.rasters import save_array, save_class_geotiff


def save_scene_pictures(folder: Path, scene: Scene, predicted: np.ndarray, confusion: np.ndarray) -> None:
    """Writes what a person looks at: composite, truth, prediction, errors, all in one, confusion; and the map as data.

    Args:
        folder: run folder.
        scene: the scene.
        predicted: uint8 (height, width) class indices, 255 where the scene has no values.
        confusion: (classes, classes) counts over the test pixels.
    """
    names, colours = [item.name for item in scene.classes], [item.colour for item in scene.classes]
    picture = composite(scene.image, scene.bands.rgb(), scene.valid)
    save_composite(folder / "composite.png", picture)
    save_label_map(folder / "ground_truth.png", scene.labels, names, colours)
    save_label_map(folder / "prediction.png", predicted, names, colours)
    accuracy = float(np.trace(confusion) / confusion.sum())
    save_error_map(folder / "errors.png", picture, scene.labels, predicted, accuracy)
    save_overview(folder / "overview.png", picture, scene.labels, predicted, names, colours, accuracy)
    save_confusion(folder / "confusion.png", confusion, names)
    save_array(folder / "prediction.npy", predicted)
    place = None if scene.georeference is None else (scene.georeference.crs, scene.georeference.transform)
    save_class_geotiff(folder / "prediction.tif", predicted, names, colours, place)


def save_training_curves(path: Path, history: Sequence[dict[str, float]], best_epoch: float) -> None:
    """Draws the history of a `SceneClassification`; `best_epoch` is the one whose weights were kept."""

    def series(name: str) -> Series:
        rows = [row for row in history if name in row]
        return [row["epoch"] for row in rows], [row[name] for row in rows]

    panels = {
        "loss": {"training": series("train/loss"), "validation": series("val/loss")},
        "overall accuracy": {"training": series("train/OA"), "validation": series("val/OA")},
        "learning rate": {"AdamW": series("learning rate")},
        "strength": {"adapters": series("strength")},
    }
    save_curves(path, panels, best_epoch)
