"""Pictures of a scene: colour composite, class map, error map, and all of them side by side.

Maps of classes are (height, width) arrays of class indices with 255 for unlabelled pixels; composites are
(height, width, 3) float32 arrays between 0 and 1.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from vision_lowrank.plots.figures import (
    UNLABELLED,
    class_handles,
    colour_labels,
    figure_file,
    legend_columns,
    legend_size,
    map_size,
)

CORRECT, WRONG = "#3b8fd0", "#d7191c"


def composite(image: np.ndarray, channels: tuple[int, int, int], valid: np.ndarray | None = None) -> np.ndarray:
    """Stretches three channels, each from its 2nd to its 98th percentile, to a picture.

    Args:
        image: (channels, height, width).
        channels: indices of the red, green and blue channel.
        valid: (height, width) bool; other pixels neither shape the stretch nor show: they are white.

    Returns:
        (height, width, 3) float32 between 0 and 1.
    """
    picture = image[list(channels)].transpose(1, 2, 0).astype(np.float32)
    inside = np.ones(picture.shape[:2], dtype=bool) if valid is None else valid
    if not inside.any():
        return np.ones_like(picture)
    low, high = np.percentile(picture[inside], [2, 98], axis=0).astype(np.float32)
    picture = np.clip((picture - low) / np.where(high > low, high - low, 1), 0, 1)
    picture[~inside] = 1
    return picture


def error_picture(picture: np.ndarray, labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Marks right and wrong predictions on the greyed composite.

    Args:
        picture: composite, (height, width, 3).
        labels: true classes, (height, width); the composite shows through where they are 255.
        predicted: predicted classes, (height, width).

    Returns:
        (height, width, 3) float32 between 0 and 1.
    """
    grey = picture @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    # a narrow range of light greys keeps the marks the most salient thing
    marked = np.repeat(0.35 + 0.6 * grey[..., None], 3, axis=2)
    right = (labels != UNLABELLED) & (labels == predicted)
    wrong = (labels != UNLABELLED) & (labels != predicted)
    marked[right] = 0.35 * marked[right] + 0.65 * np.array(to_rgb(CORRECT), dtype=np.float32)
    marked[wrong] = to_rgb(WRONG)
    return marked


def save_composite(path: Path, picture: np.ndarray) -> None:
    """Writes a composite as a picture."""
    with figure_file(path, *map_size(picture.shape, longest=5)) as figure:
        _show(figure.add_subplot(), picture)


def save_label_map(path: Path, labels: np.ndarray, names: Sequence[str], colours: Sequence[str]) -> None:
    """Writes a map of classes with its legend, which stands beside tall and square maps and below wide ones.

    Args:
        path: picture file.
        labels: (height, width) class indices, 255 where unlabelled.
        names: name of each class.
        colours: "#rrggbb" of each class.
    """
    width, height = map_size(labels.shape, longest=5)
    handles = class_handles(names, colours, bool((labels == UNLABELLED).any()))
    beside = legend_size(handles)
    columns = legend_columns(handles, width)
    tall = height >= 0.6 * beside[1]
    if tall:
        size, columns = (width + beside[0], max(height, beside[1])), 1
    else:
        size = (width, height + legend_size(handles, columns)[1])
    with figure_file(path, *size) as figure:
        _show(figure.add_subplot(), colour_labels(labels, colours))
        figure.legend(
            handles=handles,
            loc="outside right center" if tall else "outside lower center",
            ncols=columns,
            columnspacing=1.2,
        )


def save_error_map(path: Path, picture: np.ndarray, labels: np.ndarray, predicted: np.ndarray, accuracy: float) -> None:
    """Writes where predictions are right and wrong, over the greyed composite.

    Other arguments are those of `error_picture`; the map shows training pixels too, and says so by its numbers.

    Args:
        path: file to write.
        picture: see there.
        labels: see there.
        predicted: see there.
        accuracy: share of the test pixels that are right.
    """
    width, height = map_size(picture.shape, longest=5)
    handles = [
        Patch(facecolor=CORRECT, label=f"correct ({100 * accuracy:.2f} % of test pixels)"),
        Patch(facecolor=WRONG, label=f"wrong ({100 - 100 * accuracy:.2f} %)"),
        Patch(facecolor="0.75", label="unlabelled"),
    ]
    columns = legend_columns(handles, width)
    with figure_file(path, width, height + legend_size(handles, columns)[1]) as figure:
        _show(figure.add_subplot(), error_picture(picture, labels, predicted))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, columnspacing=1.2)


def save_overview(
    path: Path,
    picture: np.ndarray,
    labels: np.ndarray,
    predicted: np.ndarray,
    names: Sequence[str],
    colours: Sequence[str],
    accuracy: float,
) -> None:
    """Writes composite, ground truth, predicted map and errors side by side with one legend.

    Tall and square scenes stand in one row, wide ones in a 2 x 2 grid. Arguments as `error_picture` and
    `save_label_map` and `save_error_map`; `predicted` covers the whole scene (255 where nothing was predicted).
    """
    rows, columns = (1, 4) if picture.shape[0] >= 0.7 * picture.shape[1] else (2, 2)
    panel_width, panel_height = map_size(picture.shape, longest=2.6 if rows == 1 else 4.5)
    width = max(columns * (panel_width + 0.08), 6.5)
    panels = {
        "colour composite": picture,
        "ground truth": colour_labels(labels, colours),
        "predicted classes": colour_labels(predicted, colours),
        f"errors ({100 - 100 * accuracy:.2f} % of test)": error_picture(picture, labels, predicted),
    }
    handles = class_handles(names, colours, bool((labels == UNLABELLED).any() or (predicted == UNLABELLED).any()))
    handles += [Patch(facecolor=CORRECT, label="correct"), Patch(facecolor=WRONG, label="wrong")]
    legend = legend_columns(handles, width)
    with figure_file(path, width, rows * (panel_height + 0.25) + legend_size(handles, legend)[1]) as figure:
        axes = figure.subplots(rows, columns)
        for panel, (title, content) in zip(axes.flat, panels.items(), strict=True):
            _show(panel, content)
            panel.set_title(title)
        figure.legend(handles=handles, loc="outside lower center", ncols=legend, columnspacing=1.2)


def _show(axes: Axes, picture: np.ndarray) -> None:
    axes.imshow(picture, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
