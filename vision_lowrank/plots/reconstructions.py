"""Pictures of masked reconstruction: what was there, what was shown, what was made of it, in colour and as spectra."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vision_lowrank.plots.figures import figure_file

HIDDEN_COLOUR = 0.75
COLOURS = {"reconstruction": "#d7191c", "interpolation": "#3b8fd0"}


def save_reconstructions(
    path: Path,
    images: np.ndarray,
    hidden_pixels: np.ndarray,
    fillings: Mapping[str, np.ndarray],
    channels: tuple[int, int, int],
) -> None:
    """Writes a row a tile: the target, the pixels that were shown, and what each filling makes of the tile.

    All pictures of a row share one stretch, from the 2nd to the 98th percentile of the target's channels.

    Args:
        path: picture file.
        images: targets (tiles, channels, height, width).
        hidden_pixels: bool (tiles, height, width).
        fillings: by title, each like `images`.
        channels: indices of the red, green and blue channel.
    """
    titles = ("target", "shown", *fillings)
    with figure_file(path, 1.5 * len(titles), 1.6 * len(images)) as figure:
        axes = figure.subplots(len(images), len(titles), squeeze=False)
        for row, (image, hidden) in enumerate(zip(images, hidden_pixels, strict=True)):
            low, high = np.percentile(image[list(channels)], [2, 98], axis=(1, 2))
            target, *made = (
                _stretch(part[list(channels)], low, high)
                for part in (image, *(each[row] for each in fillings.values()))
            )
            shown = np.where(hidden[..., None], HIDDEN_COLOUR, target)
            for panel, title, picture in zip(axes[row], titles, (target, shown, *made), strict=True):
                panel.imshow(picture, interpolation="nearest")
                panel.set_axis_off()
                if row == 0:
                    panel.set_title(title)


def save_spectra(
    path: Path,
    wavelengths: np.ndarray,
    hidden_channels: np.ndarray,
    spectra: Sequence[Mapping[str, np.ndarray]],
    titles: Sequence[str],
) -> None:
    """Writes a panel a pixel with its spectrum and what fillings make of it.

    Args:
        path: picture file.
        wavelengths: nanometres (channels,), in any order.
        hidden_channels: bool (pixels, channels); the channels shown are marked where the pixel was shown.
        spectra: for each pixel "target" and fillings, each (channels,).
        titles: one a pixel.
    """
    order = np.argsort(wavelengths, kind="stable")
    with figure_file(path, 6.8, 1.9 * len(spectra)) as figure:
        axes = figure.subplots(len(spectra), 1, squeeze=False, sharex=True)[:, 0]
        for panel, lines, hidden, title in zip(axes, spectra, hidden_channels, titles, strict=True):
            panel.plot(wavelengths[order], lines["target"][order], color="0.3", linewidth=1, label="target")
            for name, values in lines.items():
                if name != "target":
                    panel.plot(wavelengths[order], values[order], color=COLOURS[name], linewidth=0.8, label=name)
            panel.plot(wavelengths[~hidden], lines["target"][~hidden], ".", color="0.1", markersize=3, label="shown")
            panel.set_title(title, loc="left")
            panel.set_ylabel("standardised")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
        axes[-1].set_xlabel("wavelength (nm)")


def _stretch(picture: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Maps (3, height, width) to (height, width, 3) between 0 and 1."""
    scaled = (picture.transpose(1, 2, 0) - low) / np.where(high > low, high - low, 1)
    return np.clip(scaled, 0, 1)
