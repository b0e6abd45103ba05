"""A sheet of composed images: methods below one another, scenes side by side, boxes drawn in."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from vision_lowrank.plots.figures import figure_file

COLOURS = ("#ffffff", "#ffd54f", "#80deea", "#f48fb1")


def save_sheet(
    path: Path,
    images: Mapping[str, Sequence[np.ndarray]],
    boxes: Sequence[Sequence[tuple[str, tuple[float, float, float, float]]]],
) -> None:
    """Writes a row a method and a column a scene, the asked concepts above each column in the colours of their boxes.

    Args:
        path: picture file.
        images: by method, one uint8 (height, width, 3) a scene.
        boxes: for each scene, what is asked for and where, (top, left, bottom, right) in pixels.
    """
    columns, lines = len(boxes), max(map(len, boxes))
    with figure_file(path, 0.5 + 1.1 * columns, 1.1 * len(images) + 0.14 * lines) as figure:
        axes = figure.subplots(len(images), columns, squeeze=False)
        for row, (method, pictures) in enumerate(images.items()):
            axes[row, 0].set_ylabel(method)
            for panel, picture, asked in zip(axes[row], pictures, boxes, strict=True):
                panel.imshow(picture, interpolation="nearest")
                panel.set(xticks=[], yticks=[])
                for colour, (_, (top, left, bottom, right)) in zip(COLOURS, asked, strict=False):
                    corner = (left - 0.5, top - 0.5)
                    outline = Rectangle(
                        corner, right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1,
                        # to be seen on snow too
                        path_effects=[withStroke(linewidth=2, foreground="0.35")],
                    )  # fmt: skip
                    panel.add_patch(outline)
        for panel, asked in zip(axes[0], boxes, strict=True):
            for line, (colour, (name, _)) in enumerate(zip(COLOURS, asked, strict=False)):
                panel.annotate(
                    name, (0, 1), (0, 3 + 10 * (len(asked) - 1 - line)), "axes fraction", "offset points",
                    backgroundcolor="0.35", color=colour, fontsize=6, va="bottom",
                    bbox={"facecolor": "0.35", "edgecolor": "none", "pad": 1},
                )  # fmt: skip
