"""torch.compile beside eager, in one process: training steps and predictions of the three models.

python -m benchmarks.compilation [--repetitions 10] prints a Markdown table. What is compiled is what `compile=true`
compiles. Eager and compiled calls take turns, and the best of the repetitions counts, in seconds of the processor, so
that other work on the machine hardly counts; one thread. The first compiled call, which makes the code, is a column of
its own, in seconds of the clock. bf16 where the processor multiplies it itself.
"""

import argparse
import copy
import platform
import time
from collections.abc import Callable, Iterator

import timm
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import nn

import vision_lowrank.models  # noqa: F401  registers the models
from vision_lowrank.compilation import compile_blocks
from vision_lowrank.models import HyperMAE, LessViT
from vision_lowrank.models.heads import LessSegmentation
from vision_lowrank.precision import processor_has_bf16

CLASSES = 16
DTYPE = torch.bfloat16 if processor_has_bf16() else None


def training(model: nn.Module, loss: Callable[[nn.Module], torch.Tensor]) -> Callable[[], None]:
    """Returns a step of training."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=DTYPE, enabled=DTYPE is not None):
            value = loss(model)
        value.backward()
        optimizer.step()

    return step


def prediction(model: nn.Module, apply: Callable[[nn.Module], torch.Tensor]) -> Callable[[], None]:
    """Returns a call without gradients."""
    model.eval()

    def call() -> None:
        with torch.inference_mode(), torch.autocast("cpu", dtype=DTYPE, enabled=DTYPE is not None):
            apply(model)

    return call


def cases() -> Iterator[tuple[str, Callable[[], nn.Module], Callable, Callable]]:
    """Yields names, models, what makes a call of a model, and what it is applied to."""
    patches, labels = torch.randn(32, 30, 13, 13), torch.arange(32) % CLASSES
    windows, wavelengths = torch.randn(16, 200, 8, 8), torch.linspace(400, 2500, 200)
    some, told = windows[:, ::4], wavelengths[::4]
    masks = torch.arange(16 * 64).reshape(16, 8, 8) % CLASSES

    def lola() -> nn.Module:
        return timm.create_model("lola_specvit_small", in_chans=30, num_classes=CLASSES, img_size=13)

    def less() -> nn.Module:
        encoder = LessViT(patch_size=2, embed_dim=128, depth=3, num_heads=16, field_radius=60, radar=False)
        return LessSegmentation(encoder, "linear", CLASSES, channel_pool=True, pool_heads=4)

    def mae() -> nn.Module:
        encoder = LessViT(patch_size=2, embed_dim=128, depth=3, num_heads=16, field_radius=60, radar=False)
        return HyperMAE(encoder, 128, 2, 16, channel_mask_ratio=0.75)

    def segmentation(model: nn.Module) -> torch.Tensor:
        return F.cross_entropy(model(some, told, 20.0), masks)

    def reconstruction(model: HyperMAE) -> torch.Tensor:
        parts = model.encoder.patches(some, told, 20.0)
        return model.reconstruct(parts, "optical", model.draw_noise(parts, "optical")).loss

    yield ("LoLA-SpecViT small, step of 32 patches", lola, training, lambda m: F.cross_entropy(m(patches), labels))
    yield ("LoLA-SpecViT small, 32 patches", lola, prediction, lambda m: m(patches))
    yield ("LESS ViT, step of 16 windows of 50 bands", less, training, segmentation)
    yield ("LESS ViT, 16 windows of 200 bands", less, prediction, lambda m: m(windows, wavelengths, 20.0))
    yield ("Hyper-MAE, step of 16 tiles of 50 bands", mae, training, reconstruction)


def seconds(call: Callable[[], None], clock: Callable[[], float] = time.process_time) -> float:
    """Returns the seconds of one call."""
    begun = clock()
    call()
    return clock() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=10)
    repetitions = parser.parse_args().repetitions
    torch.set_num_threads(1)
    # code of an earlier run would make the first call look cheap
    torch._inductor.config.force_disable_caches = True
    kind = "bf16" if DTYPE else "float32"
    print(f"{platform.processor() or platform.machine()}, one thread, {kind}, torch {torch.__version__}\n")
    print("| what | eager (s) | compiled (s) | times faster | first compiled call (s) |")
    print("| :--- | ---: | ---: | ---: | ---: |")
    for name, make, kind_of_call, function in cases():
        torch.manual_seed(0)
        model = make()
        other = copy.deepcopy(model)
        compile_blocks(other)
        eager, compiled = kind_of_call(model, function), kind_of_call(other, function)
        first = seconds(compiled, time.perf_counter)
        eager()
        times = [(seconds(eager), seconds(compiled)) for _ in range(repetitions)]
        best, better = (min(column) for column in zip(*times, strict=True))
        print(f"| {name} | {best:.4f} | {better:.4f} | {best / better:.2f} | {first:.1f} |", flush=True)


if __name__ == "__main__":
    main()
