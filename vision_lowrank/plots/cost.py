"""Picture of accuracy against cost."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from vision_lowrank.plots.figures import figure_file

MARKERS = "osD^vPX<>*hp"
# a line of a panel's title
LETTERS = 34
# inches between encoders of equal cost
ASIDE = 0.09


def save_cost(
    path: Path,
    panels: Sequence[str],
    encoders: Sequence[str],
    gmacs: Sequence[float],
    values: Sequence[float],
    lows: Sequence[float],
    highs: Sequence[float],
) -> None:
    """Writes one panel a task, one marker an encoder, multiply-adds on a logarithmic axis, intervals as error bars.

    What costs nothing has no place on such an axis: it is a dashed line through its panel, with its interval as a band.
    Encoders of equal cost stand side by side.

    Args:
        path: picture file.
        panels: title of the panel that each point belongs to, for example task, protocol and metric.
        encoders: name of each point's encoder.
        gmacs: 1e9 multiply-adds a picture, 0 for what needs next to none.
        values: fractions.
        lows: lower ends of their intervals.
        highs: upper ends.
    """
    titles, names = list(dict.fromkeys(panels)), list(dict.fromkeys(encoders))
    columns = min(3, max(1, len(titles)))
    rows = max(1, -(-len(titles) // columns))
    with figure_file(path, 0.6 + 2.6 * columns, 0.5 + 2.3 * rows + 0.16 * -(-len(names) // columns)) as figure:
        if not titles:
            figure.text(0.5, 0.5, "no row to show", ha="center")
            return
        axes = figure.subplots(rows, columns, squeeze=False)
        handles: dict[str, Line2D] = {}
        for panel, title in zip(axes.flat, titles, strict=False):
            panel.set_title(textwrap.fill(title, LETTERS), loc="left")
            costs: list[float] = []
            for place, name, cost, value, low, high in zip(panels, encoders, gmacs, values, lows, highs, strict=True):
                if place == title:
                    style = names.index(name)
                    point = (cost, 100 * value, 100 * low, 100 * high)
                    look = f"C{style % 10}", MARKERS[style % len(MARKERS)]
                    handles.setdefault(name, _draw(panel, point, look, ASIDE * costs.count(cost)))
                    costs.append(cost)
            _finish(panel, [cost for cost in costs if cost > 0])
        for panel in axes.flat[len(titles) :]:
            panel.remove()
        for panel in axes[:, 0]:
            panel.set_ylabel("percent")
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)


def _draw(panel: Axes, point: tuple[float, float, float, float], look: tuple[str, str], aside: float) -> Line2D:
    """Draws one point in a colour and a marker; returns what stands for it in the legend.

    Args:
        panel: where.
        point: cost, and value, low and high in percent.
        look: colour and marker.
        aside: inches to the right of its place.
    """
    (cost, value, low, high), (colour, marker) = point, look
    if cost == 0:
        panel.axhspan(low, high, color=colour, alpha=0.15, linewidth=0)
        return panel.axhline(value, color=colour, linestyle="--", linewidth=1)
    # a percentile interval may lie beside a value at the edge of what is possible
    reach = [[max(0.0, value - low)], [max(0.0, high - value)]]
    assert panel.figure is not None
    place = panel.transData + ScaledTranslation(aside, 0, panel.figure.dpi_scale_trans)
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4.5, "linestyle": ""}
    drawn = panel.errorbar([cost], [value], reach, **style, elinewidth=0.9, capsize=2, transform=place)
    # with a transform of its own a point does not stretch the axes
    panel.update_datalim([(cost, min(value, low)), (cost, max(value, high))])
    panel.autoscale_view()
    return drawn.lines[0]


def _finish(panel: Axes, costs: Sequence[float]) -> None:
    """Gives a panel its axes: ticks that can be read whether the costs span half a decade or five."""
    panel.grid(color="0.9", linewidth=0.5)
    panel.set_axisbelow(True)
    panel.set_xlabel("GMACs a picture")
    if not costs:
        panel.set_xticks([])
        return
    panel.set_xscale("log")
    low, high = min(costs), max(costs)
    margin = max(1.3, (high / low) ** 0.08)
    panel.set_xlim(low / margin, high * margin)
    span = high / low * margin**2
    if span < 10:
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.xaxis.set_minor_locator(NullLocator())
    else:
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < 150 else (1.0,), numticks=6))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda cost, _: f"{cost:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
