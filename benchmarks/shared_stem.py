"""LoLA-SpecViT's front-end over a tile: one map for each class of positions, beside the patches by themselves.

python -m benchmarks.shared_stem [--sizes tiny small base] [--patches 3 5 7 9 11 13 15] [--repeats 3] prints a table.
Weights are random, 30 components, bf16 autocast, tiles of 32 x 32 pixels, one thread: the best of the repetitions,
which take turns. With a ratio below 1 sharing pays; `models/dense_lola.py` chooses by the classes.
"""

import argparse
import time

import timm
import torch

import vision_lowrank.models  # noqa: F401  registers the models
from vision_lowrank.inference import AUTOCAST
from vision_lowrank.models.dense_lola import DenseLola

COMPONENTS, CLASSES = 30, 16


@torch.inference_mode()
def measure(name: str, patch: int, tile: int, repeats: int) -> tuple[float, float]:
    """Returns the seconds of maps by class and of patches."""
    model = timm.create_model(f"lola_specvit_{name}", in_chans=COMPONENTS, num_classes=CLASSES, img_size=patch)
    dense = DenseLola(model.eval())
    image = torch.randn(COMPONENTS, tile + patch - 1, tile + patch - 1)
    ways = (lambda: dense._tokens(image, tile, tile), lambda: dense._tokens_by_patch(image))
    seconds = [float("inf")] * 2
    with torch.autocast("cpu", AUTOCAST["bf16-mixed"]):
        for _ in range(repeats):
            for number, way in enumerate(ways):
                start = time.perf_counter()
                way()
                seconds[number] = min(seconds[number], time.perf_counter() - start)
    return seconds[0], seconds[1]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small", "base"])
    parser.add_argument("--patches", nargs="+", type=int, default=[3, 5, 7, 9, 11, 13, 15])
    parser.add_argument("--tile", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | patch | by class, s | by patch, s | ratio |\n| :--- | ---: | ---: | ---: | ---: |")
    for name in options.sizes:
        for patch in options.patches:
            shared, apart = measure(name, patch, options.tile, options.repeats)
            print(f"| {name} | {patch} | {shared:.3f} | {apart:.3f} | {shared / apart:.2f} |", flush=True)


if __name__ == "__main__":
    main()
