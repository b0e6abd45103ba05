"""What all pictures share: one style, one way to a file, class colours, legends."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vision_lowrank.errors import DataError
from vision_lowrank.runs import atomic_path

UNLABELLED = 255
UNLABELLED_COLOUR = "#e6e6e6"
DPI = 200
# the keys' own type is not in every matplotlib that we support
STYLE: dict[Any, Any] = {
    "font.size": 8,
    # names of classes and metrics are as users wrote them, also with dollar signs
    "text.parse_math": False,
    "axes.titlesize": 9,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "legend.handleheight": 1.0,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


@contextmanager
def figure_file(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Gives an empty figure in the common style and writes it to `path` when the block ends without an error.

    The figure is not pyplot's, so nothing is kept, no window system is asked for, and threads do not meet.

    Args:
        path: picture file; its suffix chooses the format.
        width: inches.
        height: inches.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=DPI, bbox_inches="tight", pad_inches=0.05)


def colour_labels(labels: np.ndarray, colours: Sequence[str]) -> np.ndarray:
    """Returns the (height, width, 3) float32 picture of a (height, width) map of class indices; 255 becomes grey.

    Raises:
        DataError: the map holds an index that has no colour.
    """
    table = np.full((UNLABELLED + 1, 3), np.nan, dtype=np.float32)
    table[: len(colours)] = [to_rgb(colour) for colour in colours]
    table[UNLABELLED] = to_rgb(UNLABELLED_COLOUR)
    present = np.unique(labels)
    strange = [int(value) for value in present if not 0 <= value <= UNLABELLED or np.isnan(table[value, 0])]
    if strange:
        raise DataError(f"map holds class {strange[0]}, but there are colours for 0 to {len(colours) - 1} only")
    return table[labels]


def class_handles(names: Sequence[str], colours: Sequence[str], unlabelled: bool) -> list[Patch]:
    """Returns legend entries, one a class, and one for unlabelled pixels where they occur."""
    entries = list(zip(names, colours, strict=True))
    if unlabelled:
        entries.append(("unlabelled", UNLABELLED_COLOUR))
    return [Patch(facecolor=colour, edgecolor="0.4", linewidth=0.4, label=name) for name, colour in entries]


def legend_columns(handles: Sequence[Patch], width: float) -> int:
    """Returns in how many columns a legend still fits into `width` inches."""
    lengths = [len(str(handle.get_label())) for handle in handles]
    for columns in range(len(lengths), 1, -1):
        filled = np.array_split(lengths, columns)
        if sum(_entry_width(column.max()) for column in filled) <= width:
            return columns
    return 1


def legend_size(handles: Sequence[Patch], columns: int = 1) -> tuple[float, float]:
    """Returns width and height in inches that a legend needs, roughly."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    return columns * _entry_width(longest), 0.15 + 0.165 * math.ceil(len(handles) / columns)


def _entry_width(letters: int) -> float:
    return 0.42 + 0.064 * letters


def map_size(shape: tuple[int, ...], longest: float) -> tuple[float, float]:
    """Returns width and height in inches of a (height, width, ...) map whose longer side is `longest` inches."""
    scale = longest / max(shape[:2])
    return scale * shape[1], scale * shape[0]
