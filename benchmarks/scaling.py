"""What more processes bring here, measured, and what pretraining on a large data set takes elsewhere, by calculation.

python -m benchmarks.scaling [measure] [calculate] [--gpus 8] [--steps 10] prints Markdown tables, both by default.

measure: training steps of the same global batch by one process and by two (gloo), each with one thread, and by one
process with two threads; samples are ready in memory. The median of the steps counts.

calculate: LESS ViT base and its decoder as in `experiment=hyper_mae_ssl4eo`, on all of SSL4EO-S12's Sentinel-2 L1C.
Multiply-adds of one tile are counted in a forward pass; a training sample costs three of them. Bytes kept for the
backward pass are counted for one tile and for two, under bf16 autocast on the CPU: what one more tile keeps, and what
is kept once a step, copies of weights in bf16. Kernels of a GPU may keep other things, and the allocator wastes some.
Reading, communication and validation are left out of the hours.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import vision_lowrank.models  # noqa: F401  registers the models
from benchmarks.gfm_bench_cost import TERAFLOPS, hours
from vision_lowrank.instantiate import instantiate
from vision_lowrank.models import HyperMAE, LessViT
from vision_lowrank.processes import share_of

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# arXiv 2211.07044: places, dates of each, pixels along a side of an image
PLACES, DATES, SIDE = 251_079, 4, 264
# weight, gradient and the two moments of AdamW, float32
STATE_BYTES = 16


class Classifier(nn.Module):
    """LoLA-SpecViT small on patches of Indian Pines' size, as a loss."""

    samples = 32

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("lola_specvit_small", in_chans=30, num_classes=16, img_size=13)

    def data(self) -> Tensor:
        """Returns a global batch."""
        return torch.randn(self.samples, 30, 13, 13)

    def forward(self, image: Tensor) -> Tensor:
        """Maps patches (batch, 30, 13, 13) to the loss."""
        return F.cross_entropy(self.model(image), torch.arange(len(image)) % 16)


class Pretraining(nn.Module):
    """Hyper-MAE in the size of `experiment=hyper_mae_indian_pines`, on 50 bands, as a loss."""

    samples = 16

    def __init__(self) -> None:
        super().__init__()
        encoder = LessViT(patch_size=2, embed_dim=128, depth=3, num_heads=16, field_radius=60, radar=False)
        self.model = HyperMAE(encoder, 128, 2, 16, channel_mask_ratio=0.75)

    def data(self) -> Tensor:
        """Returns a global batch."""
        return torch.randn(self.samples, 50, 8, 8)

    def forward(self, image: Tensor) -> Tensor:
        """Maps tiles (batch, 50, 8, 8) to the loss."""
        patches = self.model.encoder.patches(image, torch.linspace(400, 2500, 50), 20.0)
        return self.model.reconstruct(patches, "optical", self.model.draw_noise(patches, "optical")).loss


KINDS: dict[str, Callable[[], Classifier | Pretraining]] = {
    "LoLA-SpecViT small, batch of 32": Classifier,
    "Hyper-MAE, batch of 16": Pretraining,
}


def train(kind: str, rank: int, processes: int, threads: int, steps: int, folder: str) -> None:
    """Trains in one of the processes; the first leaves the median seconds of a step."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    module = KINDS[kind]()
    image = share_of(module.data(), (rank, processes)).contiguous()
    dist.init_process_group("gloo", f"file://{folder}/{processes}-{threads}", rank=rank, world_size=processes)
    model = DistributedDataParallel(module) if processes > 1 else module
    optimizer = torch.optim.AdamW(model.parameters())
    taken = []
    for _ in range(steps + 2):
        begun = time.perf_counter()
        optimizer.zero_grad()
        model(image).backward()
        optimizer.step()
        taken.append(time.perf_counter() - begun)
    dist.destroy_process_group()
    if rank == 0:
        Path(folder, "seconds").write_text(str(statistics.median(taken[2:])))


def step_seconds(kind: str, processes: int, threads: int, steps: int) -> float:
    """Returns the seconds of a step of the same global batch by so many processes with so many threads each."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            context.Process(target=train, args=(kind, rank, processes, threads, steps, folder))
            for rank in range(processes)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return float(Path(folder, "seconds").read_text())


@dataclass(frozen=True)
class Cost:
    """What pretraining takes, by calculation.

    Attributes:
        parameters: of encoder and decoder.
        gmacs: 1e9 multiply-adds of a tile in a forward pass.
        tile_bytes: kept of each tile for the backward pass.
        step_bytes: kept once a step.
        tiles: in an epoch.
        batch: tiles of a step, on all GPUs together.
        hours: of the whole training.
        ddp_bytes: on each GPU, weights, gradients, moments, gradients in flight, and what is kept.
        fsdp_bytes: likewise where all but what is kept is shared out, and one block gathered.
    """

    parameters: int
    gmacs: float
    tile_bytes: int
    step_bytes: int
    tiles: int
    batch: int
    hours: float
    ddp_bytes: float
    fsdp_bytes: float


def pretraining_cost(gpus: int) -> Cost:
    """Returns what `experiment=hyper_mae_ssl4eo` takes on so many GPUs that sustain `TERAFLOPS` each."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", ["experiment=hyper_mae_ssl4eo"])
    source = config.data.sources.sentinel2
    torch.manual_seed(0)
    model: HyperMAE = instantiate(config.model).train()

    def loss(tiles: int) -> Tensor:
        image = torch.randn(tiles, len(source.wavelengths), source.size, source.size)
        patches = model.encoder.patches(image, list(source.wavelengths), source.gsd)
        return model.reconstruct(patches, "optical", model.draw_noise(patches, "optical")).loss

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        loss(1)
    one, two = (kept_bytes(model, lambda tiles=tiles: loss(tiles)) for tiles in (1, 2))
    per_side = (SIDE - source.size) // source.stride + 1
    tiles = round(PLACES * DATES * per_side**2 * (1 - source.validation - source.test))
    parameters = sum(value.numel() for value in model.parameters())
    block = max(sum(value.numel() for value in part.parameters()) for part in model.encoder.blocks)
    gmacs, batch = counter.get_total_flops() / 2e9, config.data.batch_size
    kept = 2 * one - two + (two - one) * batch / gpus
    return Cost(
        parameters,
        gmacs,
        two - one,
        2 * one - two,
        tiles,
        batch,
        hours(gmacs, tiles, config.trainer.max_epochs) / gpus,
        (STATE_BYTES + 4) * parameters + kept,
        STATE_BYTES * parameters / gpus + 2 * 4 * block + kept,
    )


def kept_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Returns the bytes of all memory that a forward pass keeps for the backward pass, weights left out."""
    weights = {value.untyped_storage().data_ptr() for value in model.parameters()}
    kept: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value), torch.autocast("cpu", torch.bfloat16):
        # held, so that no memory is counted for two tensors after one another
        held = loss()
    total = sum(kept.values())
    del held
    return total


def measure(steps: int) -> None:
    """Prints the table of what was measured."""
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}\n")
    print("| training | processes x threads | step (s) | samples a second | times one process, one thread |")
    print("| :--- | ---: | ---: | ---: | ---: |")
    for kind, module in KINDS.items():
        alone = None
        for processes, threads in ((1, 1), (1, 2), (2, 1)):
            taken = step_seconds(kind, processes, threads, steps)
            alone = alone or taken
            rate = module.samples / taken  # type: ignore[attr-defined]
            print(f"| {kind} | {processes} x {threads} | {taken:.3f} | {rate:.1f} | {alone / taken:.2f} |", flush=True)


def calculate(gpus: int) -> None:
    """Prints the table of what was calculated."""
    cost = pretraining_cost(gpus)
    steps = cost.tiles // cost.batch
    print(f"| Hyper-MAE, LESS ViT base, SSL4EO-S12, {gpus} GPUs | |")
    print("| :--- | ---: |")
    print(f"| parameters, decoder included | {cost.parameters / 1e6:.1f} M |")
    print(f"| tiles in an epoch | {cost.tiles:,} |")
    print(f"| steps in an epoch, {cost.batch} tiles each | {steps:,} |")
    print(f"| forward pass of a tile | {cost.gmacs:.2f} GMACs |")
    print(f"| kept of a tile for the backward pass | {cost.tile_bytes / 1e6:.0f} MB |")
    print(f"| kept once a step, weights in bf16 | {cost.step_bytes / 1e6:.0f} MB |")
    print(f"| weights, gradients and moments | {STATE_BYTES * cost.parameters / 1e9:.2f} GB |")
    print(f"| hours at {TERAFLOPS} TFLOP/s a GPU | {cost.hours:.0f} |")
    print(f"| memory a GPU, trainer=ddp | {cost.ddp_bytes / 1e9:.1f} GB |")
    print(f"| memory a GPU, trainer=fsdp | {cost.fsdp_bytes / 1e9:.1f} GB |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["measure", "calculate"], help="measure, calculate or both")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    if unknown := set(options.parts) - {"measure", "calculate"}:
        parser.error(f"{', '.join(sorted(unknown))}: give measure, calculate or both")
    if "measure" in options.parts:
        measure(options.steps)
    if "calculate" in options.parts:
        print()
        calculate(options.gpus)


if __name__ == "__main__":
    main()
