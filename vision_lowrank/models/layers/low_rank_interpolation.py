"""Interpolation over wavelength and ground by a low-rank Gaussian model of spectra, for any channels of any sensor.

A spectrum is taken as `x(w) = phi(w) . z + noise`, with `rank` normal factors z and loadings phi that are a function of
the wavelength w (probabilistic principal components, Tipping and Bishop 1999, with loadings made continuous). Channels
that were not seen are the posterior mean, in closed form; places that were not seen are means of spectra weighted by
inverse distances (Shepard 1968). The whole is one Kronecker product of weights over channels and over positions.

`B` batch, `C` channels, `N` positions, `P` pixels of a patch; `C'` and `N'` are those seen.
"""

import torch
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
        """Returns (B, C, C'), by which values seen become the posterior mean of each channel.

        Args:
            wavelengths: of the channels to fill, nanometres (B, C).
            seen: of the channels seen, nanometres (B, C').
        """
        encodings = (sincos(values, WIDTHS[0]).to(self.log_noise.dtype) for values in (wavelengths, seen))
        wanted, given = (self.loadings(encoding) for encoding in encodings)
        # (rank, rank) to solve, not (C', C')
        noise = self.log_noise.exp() * torch.eye(given.shape[-1], device=given.device, dtype=given.dtype)
        return wanted @ torch.linalg.solve(given.mT @ given + noise, given.mT)

    def forward(self, pixels: Tensor, whole: Coordinates, seen: Coordinates, positions: Tensor) -> Tensor:
        """Returns (B, C, N, P) in the precision of the weights; a position that was not seen is the same all over.

        Args:
            pixels: what was seen, with a mean of 0 in each channel (B, C', N', P).
            whole: coordinates of all channels and positions.
            seen: coordinates of those seen.
            positions: indices of the positions seen (B, N').
        """
        with torch.autocast(pixels.device.type, enabled=False):
            weights = self.spectral_weights(whole.wavelengths, seen.wavelengths)
            spectra = torch.einsum("bck,bknp->bcnp", weights, pixels.to(weights.dtype))
            # positions that were seen keep their own spectra, whatever is divided by their distance from themselves
            wanted, given = whole.metres.to(weights.dtype), seen.metres.to(weights.dtype)
            near = torch.cdist(wanted, given).clamp(min=1e-3).pow(-POWER)
            around = torch.einsum("bmn,bcn->bcm", near / near.sum(-1, keepdim=True), spectra.mean(-1))
        filled = around.unsqueeze(-1).expand(-1, -1, -1, pixels.shape[-1])
        return filled.scatter(2, positions[:, None, :, None].expand_as(spectra), spectra)
