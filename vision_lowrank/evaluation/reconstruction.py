"""What a masked autoencoder must beat: fillings of hidden values that learn nothing, and errors by kind of hiding.

Arrays of one tile: `image` float (channels, height, width), scaled so that a channel's training mean is 0; hidden are
whole channels, and whole patches at some positions in all channels.
"""

from collections.abc import Mapping

import numpy as np
from scipy.interpolate import griddata

# of what is hidden: at hidden positions of channels that are shown, in hidden channels at positions shown, and both
KINDS = ("positions", "channels", "both")


def hidden_kinds(hidden_channels: np.ndarray, hidden_pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns for each of `KINDS` where it is, bool (channels, height, width).

    Args:
        hidden_channels: bool (channels,).
        hidden_pixels: bool (height, width).
    """
    channels, pixels = hidden_channels[:, None, None], hidden_pixels[None]
    return {"positions": ~channels & pixels, "channels": channels & ~pixels, "both": channels & pixels}


def fill_with_mean(image: np.ndarray, hidden_channels: np.ndarray, hidden_pixels: np.ndarray) -> np.ndarray:
    """Fills each shown channel with its mean over the pixels shown, and hidden channels with the training mean, 0."""
    filled = np.zeros_like(image)
    shown = image[~hidden_channels][:, ~hidden_pixels]
    if shown.shape[1]:
        filled[~hidden_channels] = shown.mean(axis=1)[:, None, None]
    return _restore(filled, image, hidden_channels, hidden_pixels)


def fill_over_space(image: np.ndarray, hidden_channels: np.ndarray, hidden_pixels: np.ndarray) -> np.ndarray:
    """Fills shown channels linearly between the pixels shown, nearest outside of their hull; hidden channels with 0."""
    filled = np.zeros_like(image)
    filled[~hidden_channels] = _interpolate(image[~hidden_channels], hidden_pixels)
    return _restore(filled, image, hidden_channels, hidden_pixels)


def fill_over_wavelength(
    image: np.ndarray, hidden_channels: np.ndarray, hidden_pixels: np.ndarray, wavelengths: np.ndarray
) -> np.ndarray:
    """Fills over space first, then hidden channels linearly over wavelength between those shown (nearest outside).

    Args:
        image: see the module.
        hidden_channels: bool (channels,).
        hidden_pixels: bool (height, width).
        wavelengths: nanometres (channels,), in any order.
    """
    filled = fill_over_space(image, hidden_channels, hidden_pixels)
    shown = np.flatnonzero(~hidden_channels)
    shown = shown[np.argsort(wavelengths[shown], kind="stable")]
    places = np.interp(wavelengths[hidden_channels], wavelengths[shown], np.arange(len(shown)))
    below = np.floor(places).astype(int)
    share = (places - below)[:, None, None]
    above = np.minimum(below + 1, len(shown) - 1)
    filled[hidden_channels] = (1 - share) * filled[shown[below]] + share * filled[shown[above]]
    return filled


def squared_errors(
    image: np.ndarray,
    fillings: Mapping[str, np.ndarray],
    hidden_channels: np.ndarray,
    hidden_pixels: np.ndarray,
    valid: np.ndarray,
) -> dict[str, dict[str, tuple[float, int]]]:
    """Returns sum of squared errors and number of values, for each kind of hiding and each filling.

    Args:
        image: the truth.
        fillings: by name.
        hidden_channels: bool (channels,).
        hidden_pixels: bool (height, width).
        valid: bool (height, width), pixels that count.
    """
    kinds = {kind: where & valid[None] for kind, where in hidden_kinds(hidden_channels, hidden_pixels).items()}
    return {
        kind: {
            name: (float(np.square(filled - image, where=where, out=np.zeros_like(image)).sum()), int(where.sum()))
            for name, filled in fillings.items()
        }
        for kind, where in kinds.items()
    }


def _interpolate(channels: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Fills hidden pixels of (channels, height, width) linearly between the others, with 0 where there are none."""
    known, unknown = np.argwhere(~hidden), np.argwhere(hidden)
    if not len(known):
        return np.zeros_like(channels)
    filled = channels.copy()
    if not len(unknown):
        return filled
    values = channels[:, ~hidden].T
    near = griddata(known, values, unknown, method="nearest")
    # fewer than three points, or points on a line, span no triangle
    spread = np.linalg.matrix_rank(known - known[0]) == 2
    found = griddata(known, values, unknown, method="linear") if spread else np.full_like(near, np.nan)
    filled[:, hidden] = np.where(np.isfinite(found), found, near).T
    return filled


def _restore(
    filled: np.ndarray, image: np.ndarray, hidden_channels: np.ndarray, hidden_pixels: np.ndarray
) -> np.ndarray:
    """Puts the values that are shown back."""
    shown = np.ix_(~hidden_channels)[0]
    filled[shown] = np.where(hidden_pixels, filled[shown], image[shown])
    return filled
