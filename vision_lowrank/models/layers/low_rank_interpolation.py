"""Interpolation over wavelength and ground by a low-rank Gaussian model, for any channels of any sensor.

Values over the wavelength w are taken as `x(w) = phi(w) . z + noise`, with `rank` normal factors z and loadings phi
that are a learnt function of w (probabilistic principal components, Tipping and Bishop 1999, with loadings made
continuous). Channels that were not seen are the posterior mean, in closed form; positions that were not seen are means
weighted by inverse distances (Shepard 1968). The whole is one Kronecker product of weights over channels and over
positions.

`B` batch, `C` channels, `N` positions, `E` width; `C'` and `N'` are those seen.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_lowrank.models.layers.embeddings import Coordinates, sincos

# of the encoding of a wavelength and of the layer that reads it
WIDTHS = (128, 64)
# of the distances on the ground
POWER = 3.0


class LowRankInterpolation(nn.Module):
    """Fills all channels at all positions from those seen; learnt by the loss of what uses it.

    Args:
        rank: number of factors.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.loadings = nn.Sequential(nn.Linear(WIDTHS[0], WIDTHS[1]), nn.GELU(), nn.Linear(WIDTHS[1], rank))
        # of one element, as sharding knows no parameter without a dimension
        self.log_noise = nn.Parameter(torch.zeros(1))

    def spectral_weights(self, wavelengths: Tensor, seen: Tensor) -> Tensor:
        """Returns (B, C, C'), by which what was seen becomes the posterior mean of each channel; at least float32.

        Args:
            wavelengths: of the channels to fill, nanometres (B, C).
            seen: of the channels seen, nanometres (B, C').
        """
        encodings = (sincos(values, WIDTHS[0]).to(self.log_noise.dtype) for values in (wavelengths, seen))
        # no system is solved in half precision
        dtype = torch.promote_types(self.log_noise.dtype, torch.float32)
        wanted, given = (self.loadings(encoding).to(dtype) for encoding in encodings)
        # (rank, rank) to solve, not (C', C')
        noise = self.log_noise.to(dtype).exp() * torch.eye(given.shape[-1], device=given.device, dtype=dtype)
        return wanted @ torch.linalg.solve(given.mT @ given + noise, given.mT)

    def forward(self, tokens: Tensor, whole: Coordinates, seen: Coordinates) -> Tensor:
        """Returns tokens of all channels and positions (B, 1 + C, 1 + N, E), those of classes from those of classes.

        They are of the precision of this layer's weights.

        Args:
            tokens: what was seen (B, 1 + C', 1 + N', E); row 0 and column 0 are class tokens.
            whole: coordinates of all channels and positions.
            seen: coordinates of those seen.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            spectral = self.spectral_weights(whole.wavelengths, seen.wavelengths)
            wanted, given = whole.metres.to(spectral.dtype), seen.metres.to(spectral.dtype)
            # a position seen is all but itself, far nearer than any other
            near = torch.cdist(wanted, given).clamp(min=1e-3).pow(-POWER)
            spatial = near / near.sum(-1, keepdim=True)
            # one factor after the other; einsum of all three would build their product
            filled = torch.einsum("bmn,bkne->bkme", _with_class(spatial), tokens.to(spectral.dtype))
            return torch.einsum("bck,bkme->bcme", _with_class(spectral), filled).to(self.log_noise.dtype)


def _with_class(weights: Tensor) -> Tensor:
    """Adds a class token, which stays itself, to weights (B, L, L'): (B, 1 + L, 1 + L')."""
    padded = F.pad(weights, (1, 0, 1, 0))
    padded[:, 0, 0] = 1
    return padded
