"""Fused attention with its gradient on a processor: PyTorch's in bfloat16, and `fused_attention`, mostly in float32.

OMP_NUM_THREADS=1 python -m benchmarks.attention_gradient prints the table of docs/speed.md in a minute.
"""

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_lowrank.models.layers.fused_attention import fused_attention

# batch, heads, queries, keys, width of a head
SIZES = {
    "LESS ViT, width 128: 45 channels": (16, 16, 46, 46, 8),
    "LESS ViT, width 384: 64 channels": (16, 6, 65, 65, 4),
    "LESS ViT, width 384: 64 positions": (16, 6, 65, 65, 60),
    "LESS ViT, width 384: 196 positions": (16, 6, 197, 197, 60),
    "text of sprites: 24 words": (16, 4, 24, 24, 32),
    "Stable Diffusion: 32 x 32 positions": (1, 8, 1024, 1024, 80),
}
REPEATS = 15


def seconds(
    contestants: Sequence[Callable[[Tensor, Tensor, Tensor], Tensor]], query: Tensor, key: Tensor, value: Tensor
) -> list[float]:
    """Returns each one's least processor time of attention and the gradient of its mean of squares; they take turns."""
    taken = [float("inf")] * len(contestants)
    for _ in range(REPEATS):
        for index, attend in enumerate(contestants):
            started = time.process_time()
            attend(query, key, value).float().square().mean().backward()
            taken[index] = min(taken[index], time.process_time() - started)
    return taken


def main() -> None:
    """Prints one row a size."""
    torch.manual_seed(0)
    print("| attention | batch, heads, queries, keys, width | bf16 (ms) | ours (ms) | times faster |")
    print("| :--- | ---: | ---: | ---: | ---: |")
    for name, (batch, heads, queries, keys, width) in SIZES.items():
        query, key, value = (
            torch.randn(batch, count, heads, width, dtype=torch.bfloat16).transpose(1, 2).detach().requires_grad_()
            for count in (queries, keys, keys)
        )
        plain, ours = seconds((F.scaled_dot_product_attention, fused_attention), query, key, value)
        sizes = f"{batch}, {heads}, {queries}, {keys}, {width}"
        print(f"| {name} | {sizes} | {1e3 * plain:.1f} | {1e3 * ours:.1f} | {plain / ours:.1f} |", flush=True)


if __name__ == "__main__":
    main()
