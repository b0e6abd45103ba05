"""LoRA-Composer beside the plain pipeline and a slow reference, on a random UNet of SD 1.5's layout; see INTRODUCTION.

python -m benchmarks.composer [--quick | --full] [--output FILE] writes docs/composer_benchmark.md. --quick is a smoke
run of small sizes that only prints, unless a file is given; otherwise one core takes about ten minutes, with --full, SD
1.5's own channels, half an hour and 16 GB. OMP_NUM_THREADS=1 on a busy machine: then it counts processor time.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from benchmarks.less_attention import Times, clock, number, peak_kilobytes, processor, race, ratio, table
from benchmarks.slow_composer import SlowComposer, check
from vision_lowrank.composer.attention import regional_unet
from vision_lowrank.composer.layout import Box, Region, Scene, Text, UNet
from vision_lowrank.composer.lora_files import LowRank
from vision_lowrank.composer.sampler import Settings, guide, reinitialise
from vision_lowrank.precision import processor_has_bf16
from vision_lowrank.runs import atomic_path

INTRODUCTION = """\
A random UNet with the blocks of Stable Diffusion 1.5, channels {channels} ({parameters:.0f} M parameters), composes one
image of {latent} x {latent} latents from prompts of {tokens} tokens; every concept has a LoRA of rank {rank} and a box,
all boxes together {share:.0%} of the image. A denoising pass runs the negative and the positive prompts. A guidance
pass computes the losses of the positive ones and their gradient at the latents; a layout pass re-initialises the noise.
The plain pipeline has denoising passes only, so ratios to it are to one of these.

The slow reference (benchmarks/slow_composer.py) is the method as its formulas read, after what the original code does:
keys and values of all prompts in each layer and step, merged weights, every region over the whole image, a dense mask
for every head, probabilities of all layers kept, the whole UNet forward and backward. It leaves out what only wastes
time (anomaly detection, copies to the CPU, whole pipelines for each concept, a mask filled in Python loops). Before the
timing its predictions, maps, losses and gradients must agree with ours, to {tolerance:g} of their largest value.
Contestants take turns and the best of the repetitions counts. Times are those of {clock}."""

TOKENS, TEXT_WIDTH, RANK, STEPS, SIDE = 77, 768, 4, 50, 0.8
TOLERANCE = 1e-3
CONTESTANTS = ("plain", "ours", "slow")
HALVES = ("plain bf16", "ours bf16")
RATIOS = {"slow/ours": ("slow", "ours"), "ours/plain": ("ours", "plain")}
PASSES = ("denoising", "guidance", "layout")
Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Plan:
    """How much is run."""

    channels: tuple[int, ...] = (64, 128, 256, 256)
    latent: int = 64
    concepts: tuple[int, ...] = (2, 4)
    memory: tuple[int, ...] = (2, 4, 8)
    seconds: float = 20.0


PLANS = {"default": Plan(), "quick": Plan((32, 32, 32, 32), 16, (2,), (2,), 0.1), "full": Plan((320, 640, 1280, 1280))}


def build_unet(channels: tuple[int, ...]) -> UNet:
    """Returns a random UNet with SD 1.5's blocks; diffusers calls the number of heads attention_head_dim."""
    torch.manual_seed(0)
    unet: UNet = UNet2DConditionModel(
        block_out_channels=channels, cross_attention_dim=TEXT_WIDTH, attention_head_dim=8, sample_size=64
    )
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            # attention that has preferences, else all maps are flat
            if "to_q" in name or "to_k" in name:
                parameter.mul_(3)
    return unet.eval()


def share_weights(unet: UNet) -> UNet:
    """Returns a second UNet on the same memory, so that other attention layers can stay in it."""
    with torch.device("meta"):
        other: UNet = UNet2DConditionModel.from_config(unet.config)
    other.load_state_dict(unet.state_dict(), assign=True)
    return other.eval()


def boxes(count: int) -> list[Box]:
    """Returns boxes side by side, in two rows where they are more than two; their area does not depend on the count."""
    rows = 1 if count <= 2 else 2
    columns = count // rows
    edges = [((index // columns) / rows, (index % columns) / columns) for index in range(count)]
    start, end = (1 - SIDE) / 2, (1 + SIDE) / 2
    return [
        Box(top + start / rows, left + start / columns, top + end / rows, left + end / columns) for top, left in edges
    ]


def make_scene(unet: UNet, count: int) -> Scene:
    """Returns random prompts, boxes and LoRAs."""
    generator = torch.Generator().manual_seed(1)

    def text() -> Text:
        return Text(*torch.randn(2, 1, TOKENS, TEXT_WIDTH, generator=generator))

    def lora() -> dict[str, LowRank]:
        changes = {}
        for name, module in unet.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v", "attn2.to_out.0")):
                out, width = module.weight.shape
                down = torch.randn(RANK, width, generator=generator) / width**0.5
                changes[name] = LowRank(down, torch.randn(out, RANK, generator=generator) / 10, 1.0)
        return changes

    return Scene(text(), [Region(box, text(), (2, 3), [(lora(), 1.0)]) for box in boxes(count)])


def start(size: int) -> tuple[Any, Tensor, Tensor]:
    """Returns a scheduler, latents (1, 4, size, size) and their timestep."""
    scheduler: Any = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(2))
    return scheduler, latents, scheduler.timesteps[STEPS // 5]


@torch.no_grad()
def plain_step(unet: UNet, latents: Tensor, timestep: Tensor, text: Text) -> Tensor:
    """Returns the plain pipeline's prediction (2, ...) for the negative and the positive prompts."""
    sample = torch.cat([latents, latents]).to(unet.dtype)
    out: Tensor = unet(sample, timestep, torch.cat([text.negative, text.positive]).to(sample), return_dict=False)[0]
    return out


@contextmanager
def opened(kind: str, unet: UNet, scene: Scene, size: int) -> Iterator[Calls]:
    """Gives the passes of a contestant by name."""
    scheduler, latents, timestep = start(size)
    if kind.startswith("plain"):
        yield {"denoising": partial(plain_step, unet, latents, timestep, scene.text)}
    elif kind == "slow":
        slow = SlowComposer(unet, scene)
        methods = {"denoising": slow.noise, "guidance": slow.guide, "layout": slow.layout}
        yield {name: partial(method, latents, timestep) for name, method in methods.items()}
    else:
        settings = Settings()
        with regional_unet(unet, scene, **settings.attention) as model:

            def layout() -> Tensor:
                return reinitialise(latents, model.maps(latents, timestep, own=False), model, None)

            yield {
                "denoising": torch.no_grad()(partial(model.noise, latents, timestep)),
                "guidance": partial(guide, model, scheduler, latents, timestep, settings.weights),
                "layout": torch.no_grad()(layout),
            }


def open_once(unet: UNet, scene: Scene) -> None:
    """Does what ours does once an image: checks, keys and values of all prompts."""
    with opened("ours", unet, scene, 8):
        pass


def contest(plan: Plan) -> dict[int, Times]:
    """Returns, by number of concepts, milliseconds by "contestant pass", and of what ours does once an image."""
    unets = {"plain": build_unet(plan.channels)}
    unets |= {kind: share_weights(unets["plain"]) for kind in CONTESTANTS[1:]}
    if processor_has_bf16():
        half = share_weights(unets["plain"]).bfloat16()
        unets |= {"plain bf16": half, "ours bf16": share_weights(half)}
    found = {}
    for count in plan.concepts:
        scene = make_scene(unets["plain"], count)
        check(unets["ours"], unets["slow"], scene, *start(plan.latent)[1:], TOLERANCE)
        calls: Calls = {"ours once": partial(open_once, share_weights(unets["plain"]), scene)}
        with ExitStack() as stack:
            for kind, unet in unets.items():
                passes = stack.enter_context(opened(kind, unet, scene, plan.latent))
                calls |= {f"{kind} {name}": call for name, call in passes.items()}
            found[count] = race(calls, plan.seconds)
    return found


def memory_worker(kind: str, name: str, count: int, plan: Plan) -> float:
    """Returns by how many MB a pass, and what is done once an image, raise the peak of this process."""
    unet = build_unet(plan.channels)
    scene = make_scene(unet, count)
    # what libraries load and start at the first call is not the contestant's
    small = torch.randn(1, 4, 16, 16, requires_grad=True)
    torch.autograd.grad(unet(small, 0, scene.text.positive, return_dict=False)[0].sum(), small)
    before = peak_kilobytes()
    with opened(kind, unet, scene, plan.latent) as calls:
        calls[name]()
    return (peak_kilobytes() - before) / 1000


def memory(plan: Plan) -> dict[tuple[str, int], Times]:
    """Returns MB of each contestant by pass and number of concepts, each in a fresh process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffusers.models.unets.unet_2d_condition", "benchmarks.slow_composer"])
    found: dict[tuple[str, int], Times] = {}
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        plain = pool.submit(memory_worker, "plain", "denoising", 0, plan).result()
        for name in PASSES[:2]:
            for count in plan.memory:
                rises = {kind: pool.submit(memory_worker, kind, name, count, plan).result() for kind in CONTESTANTS[1:]}
                found[name, count] = {"plain": plain} | rises
    return found


def comparison(heads: list[str], rows: list[tuple[list[str], Times]], digits: int) -> str:
    """Returns a table of contestants and their ratios; rows are their first cells and times."""
    halves = HALVES if HALVES[0] in rows[0][1] else ()
    ratios = RATIOS | ({"ours/plain bf16": HALVES[::-1]} if halves else {})
    cells = []
    for head, times in rows:
        row = [*head, *(number(times[kind], digits) for kind in (*CONTESTANTS, *halves))]
        cells.append(row + [number(ratio(times, *pair), 2) for pair in ratios.values()])
    return table([*heads, *CONTESTANTS, *halves, *ratios], cells)


def of_pass(times: Times, name: str) -> Times:
    """Returns milliseconds by contestant; a pass of the plain pipeline is always a denoising one."""
    kinds = [key.removesuffix(" denoising") for key in times if key.endswith(" denoising")]
    return {kind: times.get(f"{kind} {name}", times[f"{kind} denoising"]) for kind in kinds}


def of_image(times: Times, guided: int) -> Times:
    """Returns seconds by contestant for an image with that many guidance passes."""
    seconds = {}
    for kind in of_pass(times, "denoising"):
        total = STEPS * times[f"{kind} denoising"]
        if not kind.startswith("plain"):
            total += times[f"{kind} layout"] + guided * times[f"{kind} guidance"]
        if kind.startswith("ours"):
            total += times["ours once"]
        seconds[kind] = total / 1000
    return seconds


def guidance_passes() -> tuple[int, int]:
    """Returns the largest and smallest number of guidance passes with default settings."""
    constants = Settings().constants
    most = STEPS if constants.last is None else min(constants.last + 1, STEPS)
    return most, min(max(constants.patience, 1) + 1, most)


def key_bytes(unet: UNet) -> int:
    """Returns the bytes of a concept's keys and values of both rows in all layers, in float32."""
    widths = sum(module.out_features for name, module in unet.named_modules() if name.endswith("attn2.to_k"))
    return widths * TOKENS * 2 * 2 * 4


def bound_table(found: dict[int, Times]) -> str:
    """Returns what is demanded, and the worst number found."""
    passes = {
        name: min(ratio(of_pass(times, name), "slow", "ours") or 0 for times in found.values()) for name in PASSES[:2]
    }
    image = max(ratio(of_image(times, guidance_passes()[0]), "ours", "plain") or 0 for times in found.values())
    rows = [[f"{name} pass, slow/ours", number(value, 2), "at least 3"] for name, value in passes.items()]
    rows.append([f"image of {STEPS} steps, ours/plain", number(image, 2), "at most 2"])
    return table(["ratio", "worst found", "bound"], rows)


def memory_table(found: dict[tuple[str, int], Times], concept: float) -> str:
    """Returns MB; `concept` is that of a concept's keys and values."""
    columns = ["pass", "concepts", *CONTESTANTS, "K, V of the concepts", "ours without them"]
    rows = []
    for (name, count), rise in found.items():
        values = [rise[kind] for kind in CONTESTANTS]
        values += [count * concept, rise["ours"] - count * concept]
        rows.append([name, str(count), *(number(value, 0) for value in values)])
    return table(columns, rows)


def report(plan: Plan) -> str:
    """Runs everything and returns the document."""
    # fresh processes are cheapest while this one is small
    rises = memory(plan) if Path("/proc/self/status").exists() else {}
    found = contest(plan)
    with torch.device("meta"):
        unet = build_unet(plan.channels)
    introduction = INTRODUCTION.format(
        channels="-".join(map(str, plan.channels)),
        parameters=sum(parameter.numel() for parameter in unet.parameters()) / 1e6,
        latent=plan.latent,
        tokens=TOKENS,
        rank=RANK,
        share=SIDE**2,
        tolerance=TOLERANCE,
        clock="the clock" if clock() is time.perf_counter else "the processor",
    )
    most, fewest = guidance_passes()
    once = ", ".join(f"{times['ours once']:.0f} ms for {count} concepts" for count, times in found.items())
    rows = [([name, str(count)], of_pass(times, name)) for name in PASSES for count, times in found.items()]
    images = [
        ([str(count), str(guided)], of_image(found[count], guided)) for count in found for guided in (most, fewest)
    ]
    machine = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    text = [f"# LoRA-Composer beside the plain pipeline\n\n{introduction}\n\nMachine: {machine}.\n"]
    text.append(f"## Bounds\n\n{bound_table(found)}")
    text.append(f"## A pass, milliseconds\n\n{comparison(['pass', 'concepts'], rows, 1)}")
    text.append(
        f"## An image of {STEPS} steps, seconds\n\nComputed from the passes: one of layout, {STEPS} of denoising and, "
        f"with default settings, {most} of guidance, or down to {fewest} where the loss grows; for ours also what it "
        f"does once ({once}). Text encoders and the autoencoder are left out.\n\n"
        f"{comparison(['concepts', 'guidance passes'], images, 2)}"
    )
    text.append(
        "## Peak memory\n\nMB by which a pass, with what comes once before it, raises the peak of a fresh process that "
        "has the UNet and the LoRAs.\n"
    )
    text.append(memory_table(rises, key_bytes(unet) / 1e6) if rises else "Not measured: this system has no /proc.\n")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    sizes.add_argument("--full", action="store_true", help="the channels of SD 1.5")
    parser.add_argument("--output", type=Path, help="Markdown file; docs/composer_benchmark.md without --quick")
    arguments = parser.parse_args()
    text = report(PLANS["quick" if arguments.quick else "full" if arguments.full else "default"])
    output = arguments.output or (None if arguments.quick else Path("docs/composer_benchmark.md"))
    if output is None:
        print(text)
        return
    with atomic_path(output) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
