"""A training step of LoLA-SpecViT on a processor in bf16: what autocast and PyTorch choose, and ours, part by part.

OMP_NUM_THREADS=1 python -m benchmarks.lola_step prints the table of docs/speed.md in two minutes. The plain step
convolves the single channel in bf16, calls PyTorch's fused attention and its default AdamW; each row below replaces one
more. Contestants take turns, step by step, and ratios are of neighbours in time.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vision_lowrank.models  # noqa: F401  registers the models
from vision_lowrank.models.layers import spectral_stem, window_attention

CLASSES, BATCH, REPEATS = 16, 64, 30


def _plain_convolution(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype))


def contestant(convolution: bool, attention: bool, fused: bool) -> Callable[[Tensor, Tensor], None]:
    """Returns a training step; each argument tells whether that part is ours."""
    torch.manual_seed(0)
    model = timm.create_model("lola_specvit_small", in_chans=30, num_classes=CLASSES, img_size=13).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused or None)

    def step(x: Tensor, label: Tensor) -> None:
        with ExitStack() as stack:
            if not convolution:
                stack.enter_context(patch.object(spectral_stem, "convolve_one_channel", _plain_convolution))
            if not attention:
                stack.enter_context(patch.object(window_attention, "_attend", _plain_attention))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x).float(), label)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return step


def main() -> None:
    """Prints one row a contestant."""
    contestants = {
        "plain": contestant(False, False, False),
        "+ first convolution in float32": contestant(True, False, False),
        "+ attention by plain products": contestant(True, True, False),
        "+ AdamW in one pass": contestant(True, True, True),
    }
    x, label = torch.randn(BATCH, 30, 13, 13), torch.arange(BATCH) % CLASSES
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(REPEATS):
        for name, step in contestants.items():
            started = time.perf_counter()
            step(x, label)
            times[name].append(time.perf_counter() - started)
    print("| step of 64, `small` | shortest (ms) | median (ms) | of the plain step |")
    print("| :--- | ---: | ---: | ---: |")
    for name, taken in times.items():
        # the first steps allocate
        ratio = statistics.median(ours / plain for ours, plain in zip(taken[2:], times["plain"][2:], strict=True))
        shortest, median = 1e3 * min(taken), 1e3 * statistics.median(taken[2:])
        print(f"| {name} | {shortest:.0f} | {median:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
