"""Picture of a confusion matrix."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import Colormap

from vision_lowrank.plots.figures import figure_file


def save_confusion(path: Path, confusion: np.ndarray, names: Sequence[str]) -> None:
    """Writes a confusion matrix, each row in percent of the class's labelled pixels.

    Zeros stay empty; the row of a class without labels is grey.

    Args:
        path: picture file.
        confusion: (classes, classes) counts, rows are labels, columns predictions.
        names: name of each class.
    """
    count = len(names)
    pixels = confusion.sum(axis=1)
    percent = 100 * confusion / np.maximum(pixels, 1)[:, None]
    side = 0.36 * count + 0.6
    labels_width = 0.075 * max(map(len, names)) + 0.6
    with figure_file(path, side + labels_width + 0.7, side + labels_width) as figure:
        axes = figure.add_subplot()
        shown = np.ma.masked_where(np.broadcast_to(pixels[:, None] == 0, percent.shape), percent)
        image = axes.imshow(shown, cmap=_blues(), vmin=0, vmax=100)
        for row, column in zip(*np.nonzero(percent > 0), strict=True):
            value = percent[row, column]
            colour = "white" if value > 55 else "black"
            axes.text(column, row, _number(value), ha="center", va="center", fontsize=6.5, color=colour)
        axes.set_xticks(range(count), names, rotation=90)
        labelled = [f"{name} ({pixel:,})" for name, pixel in zip(names, pixels, strict=True)]
        axes.set_yticks(range(count), labelled)
        axes.tick_params(length=0)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class (labelled pixels)")
        axes.spines[:].set_visible(False)
        axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="0.85", linewidth=0.4)
        axes.tick_params(which="minor", length=0)
        bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=30, pad=0.01)
        bar.set_label("percent of the true class")
        bar.outline.set_visible(False)


def _blues() -> Colormap:
    return matplotlib.colormaps["Blues"].with_extremes(bad="0.9")


def _number(percent: float) -> str:
    """One decimal, but never 100 for less than all nor 0 for more than none."""
    if percent == 100:
        return "100"
    return f"{min(max(percent, 0.1), 99.9):.1f}"
