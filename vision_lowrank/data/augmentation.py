"""The eight symmetries of a square, to vary patches while training and to average predictions over."""

from collections.abc import Iterator

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


def all_symmetries(x: Tensor) -> Iterator[Tensor]:
    """Yields `x` (..., side, side) under each of the symmetries."""
    return (apply_symmetry(x, index) for index in range(SYMMETRIES))
