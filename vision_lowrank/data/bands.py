"""Spectral bands: where each channel of a cube sits in the spectrum."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vision_lowrank.errors import DataError

# no sensor of this field records below 100 nm, and none above 100 micrometres
SHORTEST_NANOMETRES = 100.0


@dataclass(frozen=True)
class Bands:
    """Centres and widths of the channels of a cube.

    Attributes:
        wavelengths: centre wavelengths in nanometres, float32 (channels,), in channel order (need not be sorted).
        widths: full widths at half maximum in nanometres, float32 (channels,), or None where unknown.
    """

    wavelengths: np.ndarray
    widths: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.widths is not None and self.widths.shape != self.wavelengths.shape:
            raise DataError(f"{self.widths.size} band widths for {self.wavelengths.size} bands: give one each")

    def __len__(self) -> int:
        return self.wavelengths.size

    def select(self, channels: np.ndarray) -> "Bands":
        """Returns the bands of `channels` (indices or a mask), in that order."""
        return Bands(self.wavelengths[channels], None if self.widths is None else self.widths[channels])

    def rgb(self) -> tuple[int, int, int]:
        """Returns the channels nearest to 650, 550 and 450 nm, for a colour composite."""
        red, green, blue = (int(np.abs(self.wavelengths - target).argmin()) for target in (650.0, 550.0, 450.0))
        return red, green, blue


def check_wavelengths(values: Iterable[float], source: str) -> np.ndarray:
    """Returns `values` as float32 (channels,) after checking that they can be nanometres.

    Unsorted and repeated values pass: the detectors of real sensors overlap.

    Args:
        values: centre wavelengths in nanometres, one per channel.
        source: file or card field that they come from, named in the error.

    Raises:
        DataError: a value is not a positive finite number, or looks like micrometres.
    """
    try:
        wavelengths = np.asarray(list(values), dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"{source}: wavelengths must be numbers in nanometres ({error})") from error
    if wavelengths.ndim != 1 or wavelengths.size == 0:
        raise DataError(f"{source}: no wavelengths; give one per band, in nanometres")
    wrong = np.flatnonzero(~np.isfinite(wavelengths) | (wavelengths <= 0))
    if wrong.size:
        index = int(wrong[0])
        raise DataError(f"{source}: wavelength of band index {index} is {wavelengths[index]}; give nanometres > 0")
    if wavelengths.max() < SHORTEST_NANOMETRES:
        raise DataError(
            f"{source}: wavelengths from {wavelengths.min():g} to {wavelengths.max():g} look like micrometres; "
            "multiply them by 1000 to give nanometres"
        )
    if wavelengths.min() < SHORTEST_NANOMETRES:
        index = int(wavelengths.argmin())
        raise DataError(
            f"{source}: wavelength of band index {index} is {wavelengths[index]:g}, beside {wavelengths.max():g}; it "
            "looks like micrometres, give all in nanometres"
        )
    return wavelengths
