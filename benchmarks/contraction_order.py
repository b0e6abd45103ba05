"""The orders of contraction of LESS attention's output, and whether the one is taken that is fastest.

OMP_NUM_THREADS=1 python -m benchmarks.contraction_order prints the table of docs/speed.md in three minutes:
formats, widths, channels, positions, batches and ranks crossed, but for what is too large. It tells whether the costs
of `contraction_order` are right.
"""

import itertools
import time
from typing import get_args

import numpy as np
import torch

from vision_lowrank.models.layers.kronecker_attention import Order, contraction_order, kronecker_projection

FORMATS = (torch.float32, torch.bfloat16)
# width: heads; a channel's share of a head is 4
WIDTHS, SHARE = {128: 16, 384: 6, 768: 12}, 4
CHANNELS, POSITIONS, BATCHES, RANKS = (2, 12, 64, 202), (5, 17, 65, 197), (1, 16), (1, 4)
# multiply-adds of the product, and numbers of a folded weight
LARGEST, LARGEST_FOLDED = 8e9, 6e7
REPEATS = 3
# a call of so many seconds is not repeated
LONG = 0.15


def times(dtype: torch.dtype, size: tuple[int, int, int, int, int], training: bool) -> dict[Order, float]:
    """Returns the least processor time of each order that is not too large; they take turns."""
    dim, channels, positions, batch, rank = size
    heads = WIDTHS[dim]
    share = dim // heads // SHARE

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype).requires_grad_(training)

    parts = draw(batch, rank, heads, channels, SHARE), draw(batch, rank, heads, positions, share), draw(dim, dim)
    bias, direction = draw(dim), torch.randn(batch, channels, positions, dim).to(dtype)
    folded: dict[Order, float] = {
        "product": 0,
        "fold_channel": batch * channels * rank * dim**2 / SHARE,
        "fold_spatial": batch * positions * rank * dim**2 / share,
    }
    taken = {order: float("inf") for order in get_args(Order) if folded[order] <= LARGEST_FOLDED}
    for _ in range(REPEATS):
        for order, least in taken.items():
            if LONG < least < float("inf"):
                continue
            started = time.process_time()
            y = kronecker_projection(*parts, bias, order)
            if training:
                torch.autograd.grad(y, [*parts, bias], direction)
            taken[order] = min(least, time.process_time() - started)
    return taken


def main() -> None:
    """Prints a row for each format, mode and rank."""
    torch.manual_seed(0)
    print(
        "| format | mode | rank | sizes | chosen / fastest: mean | largest | always product / fastest: mean | largest |"
    )
    print("| :--- | :--- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for dtype, training, rank in itertools.product(FORMATS, (False, True), RANKS):
        chosen, product = [], []
        for dim, channels, positions, batch in itertools.product(WIDTHS, CHANNELS, POSITIONS, BATCHES):
            if batch * channels * positions * dim**2 > LARGEST:
                continue
            found = times(dtype, (dim, channels, positions, batch, rank), training)
            share = dim // WIDTHS[dim] // SHARE
            order = contraction_order(channels, positions, dim, rank, SHARE, share, dtype)
            fastest = min(found.values())
            chosen.append(found[order] / fastest)
            product.append(found["product"] / fastest)
        row = [str(dtype).removeprefix("torch."), "forward + backward" if training else "forward", str(rank)]
        cells = [f"{value:.2f}" for ratios in (chosen, product) for value in (np.mean(ratios), np.max(ratios))]
        print(f"| {' | '.join([*row, str(len(chosen)), *cells])} |", flush=True)


if __name__ == "__main__":
    main()
