"""What varies patches while training: the eight symmetries of a square, and mixtures of two patches."""

import torch
from torch import Tensor

SYMMETRIES = 8


def apply_symmetry(x: Tensor, index: int) -> Tensor:
    """Maps (..., side, side) to the same shape by one of the `SYMMETRIES` flips, rotations and transpositions."""
    if index & 1:
        x = x.flip(-1)
    if index & 2:
        x = x.flip(-2)
    return x.transpose(-1, -2) if index & 4 else x


def random_symmetries(x: Tensor) -> Tensor:
    """Applies to each sample of (batch, channels, side, side) a symmetry of its own, drawn from torch's generator."""
    choice = torch.randint(SYMMETRIES, (len(x),))
    y = torch.empty_like(x)
    for index in range(SYMMETRIES):
        chosen = choice == index
        y[chosen] = apply_symmetry(x[chosen], index)
    return y


def mixup(x: Tensor, alpha: float) -> tuple[Tensor, Tensor, float]:
    """Mixes each sample with another one of the batch (Zhang et al. 2018, arXiv 1710.09412).

    Args:
        x: (batch, ...).
        alpha: parameter of the symmetric beta distribution that the share is drawn from; 0 mixes nothing.

    Returns:
        `share * x + (1 - share) * x[partner]`, the partner's index of each sample (batch,), and the share, which is at
        least one half.
    """
    if alpha == 0:
        return x, torch.arange(len(x), device=x.device), 1.0
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    share = max(share, 1 - share)
    partner = torch.randperm(len(x), device=x.device)
    return share * x + (1 - share) * x[partner], partner, share
