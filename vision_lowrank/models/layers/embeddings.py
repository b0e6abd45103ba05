"""Where a token lies: its wavelength and its place on the ground, as added vectors or as rotations; the field of view.

`B` batch, `C` channels, `N` positions, `D` width. Tokens form a grid (B, 1 + C, 1 + N, D) whose row 0 and column 0
belong to class tokens; these have no wavelength and no place.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Rotation = tuple[Tensor, Tensor]
# of a rotation, where the shortest is 1
LONGEST_PERIOD = 100.0


@dataclass(frozen=True)
class Coordinates:
    """Wavelengths and places of the tokens of a batch.

    Attributes:
        wavelengths: nanometres (B, C).
        metres: row and column offset of each patch from the first, in metres (B, N, 2).
        relative: row and column of each patch's centre between -1 and 1, the image's edges (B, N, 2).
        present: bool (B, C), False for channels that only pad a batch; None where all are present.
    """

    wavelengths: Tensor
    metres: Tensor
    relative: Tensor
    present: Tensor | None = None

    def keep(self, channels: Tensor, positions: Tensor) -> "Coordinates":
        """Returns those of chosen channels (B, kept) and positions (B, kept), given by index."""
        index = positions.unsqueeze(-1).expand(-1, -1, 2)
        return Coordinates(
            self.wavelengths.gather(1, channels),
            self.metres.gather(1, index),
            self.relative.gather(1, index),
            None if self.present is None else self.present.gather(1, channels),
        )


def grid_coordinates(
    wavelengths: Tensor, gsd: Tensor, rows: int, columns: int, patch_size: int, present: Tensor | None = None
) -> Coordinates:
    """Returns the coordinates of all patches of images, row by row.

    Args:
        wavelengths: nanometres (B, C).
        gsd: pixel size in metres (B,).
        rows: patches along the height.
        columns: patches along the width.
        patch_size: side of a patch in pixels.
        present: see `Coordinates`.
    """
    index = torch.cartesian_prod(
        torch.arange(rows, device=wavelengths.device), torch.arange(columns, device=wavelengths.device)
    ).float()
    size = torch.tensor([rows, columns], device=wavelengths.device)
    relative = (index + 0.5) / size * 2 - 1
    metres = index * (patch_size * gsd.float()[:, None, None])
    return Coordinates(wavelengths.float(), metres, relative.expand(wavelengths.shape[0], -1, -1), present)


def sincos(position: Tensor, dim: int) -> Tensor:
    """Maps positions (...) to sines and cosines (..., dim) at wavelengths from 2 pi to 10000 times that (Vaswani 2017).

    Frequencies are float32 numbers, rounded after each step: a few thousand radians out, others are another embedding.
    """
    angle = position.float().unsqueeze(-1) * torch.from_numpy(_frequencies(dim // 2)).to(position.device)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


@functools.cache
def _frequencies(count: int) -> np.ndarray:
    """Returns 10000 to the powers 0, -1 / count ... , float32 (count,)."""
    # no tensor: one made while a model is traced has no values, and would reach all later models of the process
    exponent = np.arange(count, dtype=np.float32) / np.float32(count)
    frequencies: np.ndarray = 1 / np.float32(10000) ** exponent
    return frequencies


def position_wavelength_embedding(coordinates: Coordinates, dim: int, unit: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns the continuous positional-channel embedding of LESS ViT (arXiv 2503.12843) in its two parts.

    Their sum is the embedding: half the encoding of the wavelength plus half the encoding of the place, the first half
    of whose entries is for the column, the second for the row. Class tokens have zeros.

    Args:
        coordinates: of the tokens.
        dim: width, a multiple of 4.
        unit: metres that count as 1.

    Returns:
        Of channels (B, 1 + C, 1, dim) and of positions (B, 1, 1 + N, dim).
    """
    place = coordinates.metres / unit
    spatial = torch.cat([sincos(place[..., 1], dim // 2), sincos(place[..., 0], dim // 2)], dim=-1)
    spectral = sincos(coordinates.wavelengths, dim)
    channels, positions = (F.pad(part / 2, (0, 0, 1, 0)) for part in (spectral, spatial))
    return channels.unsqueeze(2), positions.unsqueeze(1)


def spectral_rotation(coordinates: Coordinates, dim: int, limits: tuple[float, float]) -> Rotation:
    """Returns sine and cosine (B, 1, 1 + C, dim) that turn the channel branch's queries and keys (SSRoPE of LESSViT).

    Args:
        coordinates: of the tokens.
        dim: width of a head, even.
        limits: wavelengths in nanometres that become -1 and 1.
    """
    position = 2 * (coordinates.wavelengths - limits[0]) / (limits[1] - limits[0]) - 1
    return _rotation(position.unsqueeze(-1), dim)


def spatial_rotation(coordinates: Coordinates, dim: int) -> Rotation:
    """Returns sine and cosine (B, 1, 1 + N, dim) that turn the spatial branch's queries and keys; `dim` in fours."""
    return _rotation(coordinates.relative, dim)


def _rotation(position: Tensor, dim: int) -> Rotation:
    """Maps positions (B, L, axes) to sine and cosine (B, 1, 1 + L, dim), without a turn for the class token."""
    count = dim // (2 * position.shape[-1])
    period = LONGEST_PERIOD ** (torch.arange(count, dtype=torch.float32, device=position.device) / count)
    angle = (2 * math.pi * position.unsqueeze(-1) / period).flatten(-2)
    angle = F.pad(torch.cat([angle, angle], dim=-1), (0, 0, 1, 0)).unsqueeze(1)
    return angle.sin(), angle.cos()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns (batch, heads, tokens, dim) by angles whose pairs are the first and the second half of `dim`."""
    sine, cosine = (part.to(x.dtype) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


def field_mask(metres: Tensor, radius: float) -> Tensor:
    """Returns which positions see which, bool (B, 1, 1 + N, 1 + N): those no further than `radius` metres.

    The class token sees all and is seen by all.

    Args:
        metres: places (B, N, 2).
        radius: in metres.
    """
    # not by matrix products, which round: a patch at exactly the radius is inside. ONNX knows no `torch.cdist`
    distance = torch.linalg.vector_norm(metres.unsqueeze(2) - metres.unsqueeze(1), dim=-1)
    return F.pad(distance <= radius * (1 + 1e-6), (1, 0, 1, 0), value=True).unsqueeze(1)
