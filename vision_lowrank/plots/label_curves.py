"""Picture of accuracy over the number of labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from vision_lowrank.plots.figures import figure_file

MARKERS = "osD^vPX"
# share of the distance between two ticks by which neighbouring curves stand apart, so that intervals can be told apart
ASIDE = 0.015


@dataclass(frozen=True)
class Curve:
    """Values of one method.

    Attributes:
        labels: what training had, all whole numbers (pixels a class) or all shares, ascending.
        values: fractions.
        lows: lower ends of their intervals.
        highs: upper ends.
    """

    labels: Sequence[float]
    values: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]


def save_label_curves(path: Path, panels: Sequence[Sequence[tuple[str, Mapping[str, Curve]]]]) -> None:
    """Writes rows of panels with a curve a method, labels on a logarithmic axis, intervals as error bars.

    Args:
        path: picture file.
        panels: rows of (title, curve by method); a row has one scale of values, a method one colour in all panels.
    """
    methods = list(dict.fromkeys(method for row in panels for _, curves in row for method in curves))
    columns = max(len(row) for row in panels)
    with figure_file(path, 0.4 + 3.1 * columns, 0.4 + 2.5 * len(panels)) as figure:
        axes = figure.subplots(len(panels), columns, squeeze=False, sharey="row")
        handles: dict[str, Line2D] = {}
        for line, row in zip(axes, panels, strict=True):
            for panel, (title, curves) in zip(line, row, strict=False):
                panel.set_title(title, loc="left")
                for method, curve in curves.items():
                    handles[method] = _draw(panel, curve, methods.index(method), len(methods))
                _finish(panel, sorted({value for curve in curves.values() for value in curve.labels}))
            for panel in line[len(row) :]:
                panel.remove()
            line[0].set_ylabel("OA of test pixels, percent")
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=min(len(methods), 3))


def _draw(panel: Axes, curve: Curve, index: int, count: int) -> Line2D:
    """Draws the curve of the method with a number among so many; returns what stands for it in the legend."""
    shift = 1 + ASIDE * (index - (count - 1) / 2)
    values, lows, highs = ([100 * value for value in part] for part in (curve.values, curve.lows, curve.highs))
    reach = [
        [value - low for value, low in zip(values, lows, strict=True)],
        [high - value for value, high in zip(values, highs, strict=True)],
    ]
    container = panel.errorbar(
        [shift * label for label in curve.labels],
        values,
        reach,
        color=f"C{index % 10}",
        marker=MARKERS[index % len(MARKERS)],
        markersize=4,
        linewidth=1,
        elinewidth=0.7,
        capsize=1.5,
    )
    line: Line2D = container.lines[0]
    return line


def _finish(panel: Axes, labels: Sequence[float]) -> None:
    """Gives a panel its axes: a tick at each number of labels."""
    shares = max(labels) < 1
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(FixedLocator(list(labels)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value if shares else value:g}"))
    panel.set_xlabel("labelled pixels of a class, percent" if shares else "labelled pixels a class")
    panel.grid(axis="y", color="0.9", linewidth=0.5)
    panel.set_axisbelow(True)
