"""Picture of a training's course."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.ticker import MaxNLocator

from vision_lowrank.plots.figures import figure_file

Series = tuple[Sequence[float], Sequence[float]]


def save_curves(path: Path, panels: Mapping[str, Mapping[str, Series]], best_epoch: float | None = None) -> None:
    """Writes curves over epochs, one panel a quantity, one line a series; panels without points are left out.

    Args:
        path: picture file.
        panels: for example `{"loss": {"training": (epochs, values), "validation": ...}, "learning rate": ...}`; the
            key becomes the vertical label. Epochs may be fractions, where something changes at every step.
        best_epoch: epoch whose weights were kept, marked by a line.
    """
    drawn = {title: lines for title, lines in panels.items() if any(len(epochs) for epochs, _ in lines.values())}
    columns = min(2, len(drawn))
    rows = -(-len(drawn) // columns) if drawn else 1
    with figure_file(path, 3.4 * max(columns, 1), 2.2 * rows) as figure:
        if not drawn:
            figure.text(0.5, 0.5, "no epoch was finished", ha="center")
            return
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
        for panel, (title, lines) in zip(axes.flat, drawn.items(), strict=False):
            for name, (epochs, values) in lines.items():
                panel.plot(epochs, values, label=name, linewidth=1.2, marker="o" if len(epochs) == 1 else None)
            if best_epoch is not None:
                panel.axvline(best_epoch, color="0.5", linewidth=0.8, linestyle=":", label="best epoch")
            panel.set_ylabel(title)
            panel.set_xlabel("epoch")
            panel.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
            panel.tick_params(labelbottom=True)
            panel.grid(color="0.9", linewidth=0.5)
            # above the axes, where it hides no curve
            panel.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, columnspacing=1)
        for panel in axes.flat[len(drawn) :]:
            panel.remove()
