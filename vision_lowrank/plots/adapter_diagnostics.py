"""Picture of what a training did to the singular vectors of weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from vision_lowrank.plots.figures import figure_file

INTRUDER_COLOUR = "#c0392b"
# inches: height of one bar in the right panel, height of the left panel
BAR = 0.07
MATRIX = 2.8


def save_intruders(
    path: Path,
    similarity: np.ndarray,
    layer: str,
    names: Sequence[str],
    counts: Mapping[str, Sequence[int]],
    threshold: float,
) -> None:
    """Writes the similarity matrix of one layer beside the number of intruder dimensions of all layers.

    In the matrix a training that only turned the weight's directions a little is a bright diagonal; a row that is dark
    throughout is an intruder, and its number is red.

    Args:
        path: picture file.
        similarity: (top, rank) absolute cosines of singular vectors after and before, of `layer`.
        layer: name of the layer that the matrix belongs to.
        names: name of every layer, as in the model.
        counts: intruder dimensions of every layer, for each way of training.
        threshold: cosine below which a vector counts as an intruder.
    """
    height = max(MATRIX, len(names) * (len(counts) * BAR + 0.06) + 0.8)
    with figure_file(path, 7.2, height) as figure:
        # beside many layers the matrix keeps its shape
        grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1), height_ratios=(MATRIX, height - MATRIX + 0.01))
        left, right = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[:, 1])
        image = left.imshow(similarity, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        left.set_title(layer, loc="left")
        left.set_xlabel("singular vector before")
        left.set_ylabel("singular vector after")
        left.set_yticks(range(len(similarity)), [str(row + 1) for row in range(len(similarity))])
        ticks = [int(tick) for tick in MaxNLocator(6, integer=True).tick_values(1, similarity.shape[1])]
        ticks = [1, *(tick for tick in ticks if 1 < tick <= similarity.shape[1])]
        left.set_xticks([tick - 1 for tick in ticks], [str(tick) for tick in ticks])
        for label, strongest in zip(left.get_yticklabels(), similarity.max(axis=1), strict=True):
            if strongest < threshold:
                label.set_color(INTRUDER_COLOUR)
                label.set_fontweight("bold")
        bar = figure.colorbar(image, ax=left, aspect=30, pad=0.02)
        bar.set_label(f"absolute cosine (intruder: < {threshold:g})")
        bar.outline.set_visible(False)
        _draw_counts(right, names, counts)


def _draw_counts(axes: Axes, names: Sequence[str], counts: Mapping[str, Sequence[int]]) -> None:
    """Draws one group of bars a layer, the first layer on top."""
    height = 0.8 / len(counts)
    places = np.arange(len(names))
    for number, (name, values) in enumerate(counts.items()):
        axes.barh(places - 0.4 + (number + 0.5) * height, values, height, label=name)
    axes.set_yticks(places, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlim(0, max(1, max(max(values) for values in counts.values())) * 1.05)
    axes.set_xlabel("intruder dimensions")
    axes.grid(axis="x", color="0.9", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
