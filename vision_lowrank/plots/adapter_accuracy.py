"""Picture of what adapters reach with how many parameters."""

from collections.abc import Sequence
from pathlib import Path

from vision_lowrank.plots.figures import figure_file

# inches of a column
COLUMN = 0.22


def save_accuracy(
    path: Path,
    names: Sequence[str],
    parameters: Sequence[float],
    values: Sequence[float],
    lows: Sequence[float],
    highs: Sequence[float],
    reference: str,
) -> None:
    """Writes a column a method, the one with the fewest parameters first; methods of equal size stay apart so.

    Args:
        path: picture file.
        names: of the methods.
        parameters: trained ones.
        values: accuracies, fractions.
        lows: lower ends of their intervals.
        highs: upper ends.
        reference: method whose accuracy is a line through the picture, at each of its sizes.
    """
    order = sorted(range(len(names)), key=lambda index: (parameters[index], names[index]))
    with figure_file(path, 1.2 + COLUMN * len(names), 3.6) as figure:
        axes = figure.subplots()
        for place, index in enumerate(order):
            value, is_reference = 100 * values[index], names[index] == reference
            colour = "C3" if is_reference else "C0"
            reach = [[value - 100 * lows[index]], [100 * highs[index] - value]]
            axes.errorbar([place], [value], reach, color=colour, marker="o", markersize=4, elinewidth=1, capsize=2)
            if is_reference:
                axes.axhline(value, color=colour, linewidth=0.6, linestyle="--")
        labels = [f"{names[index]}  {parameters[index]:,.0f}" for index in order]
        axes.set_xticks(range(len(order)), labels, rotation=90)
        axes.set_xlim(-0.7, len(order) - 0.3)
        axes.set_xlabel("method and trained parameters, head included")
        axes.set_ylabel("OA of test pixels, percent")
        axes.grid(axis="y", color="0.9", linewidth=0.5)
        axes.set_axisbelow(True)
