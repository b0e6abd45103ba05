"""What varies samples while training: the eight symmetries of a square, mixtures of two, and subsets of channels."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vision_lowrank.errors import ConfigError

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
    return apply_symmetries(x, torch.randint(SYMMETRIES, (len(x),)))


def apply_symmetries(x: Tensor, choice: Tensor) -> Tensor:
    """Applies to each sample of (batch, ..., side, side) the symmetry of its index in `choice` (batch,)."""
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


def sample_channels(batch: Mapping[str, Tensor], shares: Sequence[float] | None) -> Mapping[str, Tensor]:
    """Keeps a random share of a batch's channels, the same for all samples (hierarchical channel sampling).

    Args:
        batch: with `image` (batch, channels, height, width) and `wavelengths` (batch, channels).
        shares: least and largest share of the channels; None for all of them.

    Returns:
        The batch with at least two channels, in their order.
    """
    if shares is None:
        return batch
    least, largest = shares
    count = batch["image"].shape[1]
    share = least + (largest - least) * float(torch.rand(()))
    chosen = torch.randperm(count)[: sampled_count(count, share)].sort().values.to(batch["image"].device)
    return {**batch, "image": batch["image"][:, chosen], "wavelengths": batch["wavelengths"][:, chosen]}


def sampled_count(count: int, share: float) -> int:
    """Returns how many of `count` channels `sample_channels` keeps of a share."""
    return min(count, max(2, round(share * count)))


def check_shares(shares: Sequence[float] | None) -> None:
    """Checks the argument of `sample_channels`.

    Raises:
        ConfigError: they are no two shares.
    """
    if shares is not None and not (len(shares) == 2 and 0 < shares[0] <= shares[1] <= 1):
        raise ConfigError(f"channel_sampling is {list(shares)}; give two shares, least first, up to 1")
