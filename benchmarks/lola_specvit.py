"""LoLA-SpecViT beside the original, in one process: a training step and the classification of pixels.

python -m benchmarks.lola_specvit [--sizes tiny small base] prints a Markdown table. Both run with as many threads as
torch chooses; the original in float32 as its code does on a CPU, ours also in bf16 where the processor multiplies it
itself. The better of the repetitions counts.
"""

import argparse
import platform
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import nn

import vision_lowrank.models  # noqa: F401  registers the models
from vision_lowrank.models import official
from vision_lowrank.precision import processor_has_bf16

CLASSES, BATCH = 16, 32


def seconds(function: Callable[[], object], repetitions: int) -> float:
    """Returns the shortest time of a call, after one that does not count."""
    function()
    times = []
    for _ in range(repetitions):
        begun = time.perf_counter()
        function()
        times.append(time.perf_counter() - begun)
    return min(times)


def measure(model: nn.Module, patch: torch.Tensor, dtype: torch.dtype | None, repetitions: int) -> tuple[float, float]:
    """Returns the seconds of a training step of 32 patches, and of 1,000 classified pixels."""
    x = patch.repeat(BATCH, 1, 1, 1)
    y = torch.arange(BATCH) % CLASSES
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])

    def run() -> torch.Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            return model(x).float()

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(run(), y).backward()
        optimizer.step()

    model.train()
    training = seconds(step, repetitions)
    model.eval()
    with torch.inference_mode():
        return training, seconds(run, repetitions) * 1000 / BATCH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small", "base"], choices=["tiny", "small", "base"])
    sizes = parser.parse_args().sizes
    torch.manual_seed(0)
    original = official.build_lola_specvit({"num_classes": CLASSES})
    rows = [("original, 15 x 15 x 15, float32", original, *measure(original, torch.randn(1, 15, 15, 15), None, 3))]
    dtypes = {"float32": None} | ({"bf16": torch.bfloat16} if processor_has_bf16() else {})
    for size in sizes:
        for name, dtype in dtypes.items():
            model = timm.create_model(f"lola_specvit_{size}", in_chans=30, num_classes=CLASSES, img_size=13)
            times = measure(model, torch.randn(1, 30, 13, 13), dtype, 10)
            rows.append((f"{size}, 30 x 13 x 13, {name}", model, *times))
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print("| model | parameters | step of 32 (s) | times faster | 1,000 pixels (s) | times faster |")
    print("| :--- | ---: | ---: | ---: | ---: | ---: |")
    first = rows[0]
    for name, model, step, pixels in rows:
        count = sum(parameter.numel() for parameter in model.parameters())
        ratios = f"{first[2] / step:.1f}", f"{first[3] / pixels:.1f}"
        print(f"| {name} | {count / 1e6:.2f} M | {step:.3f} | {ratios[0]} | {pixels:.3f} | {ratios[1]} |")


if __name__ == "__main__":
    main()
