"""The attention of LESS ViT beside a plain implementation, a channel-wise ViT and joint attention; see INTRODUCTION.

python -m benchmarks.less_attention [--quick] [--output FILE] takes about twenty minutes of one core. --quick is a smoke
run of small sizes that only prints, unless a file is given. OMP_NUM_THREADS=1 on a busy machine: then it counts
processor time.
"""

import argparse
import itertools
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models import vision_transformer
from torch import Tensor, nn

from vision_lowrank.models.layers.grid_block import Block, initialise, make_attention
from vision_lowrank.models.layers.kronecker_attention import (
    Branch,
    Context,
    LessAttention,
    LowRankAttention,
    SingleQueryPool,
)
from vision_lowrank.precision import processor_has_bf16
from vision_lowrank.runs import atomic_path

INTRODUCTION = """\
One block of LESS ViT (ours) is timed beside (a) a plain implementation of the same block with the same weights, which
forms the Kronecker products with their rank axis, projects keys and values in the pools and runs the pools' linear
layers one by one, (b) a channel-wise ViT block (timm's, attention over the positions within each channel) and (c) a
block with joint attention over all channels and positions (PyTorch's fused attention). All get the same grid of C rows,
a model's class row being one of them, and {positions} positions in batches of one, but where a table tells otherwise; r
is the rank, and the channel's share of a head's {width} numbers is {share}. Contestants take turns and the best of the
repetitions counts; before they are timed, the output of (a) must agree with ours to {tolerance:g}.

Forward runs without autograd; forward + backward differentiates the mean of squares by the input and all weights. Calls
of more than about {limits[0]:.0f} GFLOP forward, or {limits[1]:.0f} with backward, are left out ("-"). Times are
milliseconds of {clock}.

The MLP is the same in ours and in (c). Were the attention of ours free, the block would still be no more than
1.5 + T / 4D times as fast as (c), counted in multiplications, with T tokens: for C = 64, 9.7 times at D = 384 and 5.6
at D = 768."""

HEAD_WIDTH, CHANNEL_SHARE, MLP_RATIO = 64, 4, 4
RANKS = (1, 4)
CONTESTANTS = ("ours r1", "plain r1", "ours r4", "plain r4", "channel-wise", "joint")
PARTS = {"attention": "Attention alone", "block": "The whole block"}
MODES = {False: "forward", True: "forward + backward"}
TOLERANCE = 1e-4
LIMITS = {False: 700e9, True: 350e9}
COMPILE_SECONDS = 150


@dataclass(frozen=True)
class Case:
    """What is timed: a width and a grid, forward or with backward, the attention or the block."""

    dim: int
    channels: int
    positions: int
    training: bool
    part: str
    batch: int = 1


@dataclass(frozen=True)
class Settings:
    """How much is run."""

    dims: tuple[int, ...] = (384, 768)
    channels: tuple[int, ...] = (2, 4, 13, 32, 64, 128, 202)
    positions: int = 197
    memory: tuple[int, ...] = (13, 64, 202)
    # samples, channels, positions of what is timed in bf16, too; the first also compiled
    formats: tuple[tuple[int, int, int], ...] = ((1, 64, 197), (16, 13, 65), (64, 13, 5))
    compiled_dim: int = 384
    seconds: float = 0.8

    def cases(self) -> Iterator[Case]:
        """Yields what is timed in float32."""
        for part in PARTS:
            for training in MODES:
                for dim in self.dims:
                    for channels in self.channels:
                        yield Case(dim, channels, self.positions, training, part)


QUICK = Settings((384,), (2, 4), 50, (4,), ((1, 4, 50), (4, 3, 5)), 384, 0.1)
Times = dict[str, float]


class PlainAttention(nn.Module):
    """The attention of a LESS block as its definition reads, on the weights of ours."""

    def __init__(self, ours: LessAttention) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Maps (B, C, N, D) to the same shape."""
        pool, attention = self.ours.low_dim_pool, self.ours.attn
        assert isinstance(attention, LowRankAttention)
        channel, spatial = pool.channel_linear(x), pool.spatial_linear(x)
        x_c = channel[:, :, 0] + self.pool(pool.channel_pool, pool.channel_norm(channel))
        x_s = spatial[:, 0] + self.pool(pool.spatial_pool, pool.spatial_norm(spatial).transpose(1, 2))
        xc = self.branch(attention.channel_branch, self.ours.channel_norm(x_c))
        xs = self.branch(attention.spatial_branch, self.ours.spatial_norm(x_s))
        product = rearrange(xc, "b r h c a -> b r h c 1 a 1") * rearrange(xs, "b r h n s -> b r h 1 n 1 s")
        y: Tensor = attention.proj(rearrange(product.mean(1), "b h c n a s -> b c n (h a s)"))
        return y

    def pool(self, pool: SingleQueryPool, x: Tensor) -> Tensor:
        """Maps (B, M, tokens, E) to (B, M, E)."""
        q = rearrange(pool.q(x[:, :, :1]), "b m l (h e) -> b m h l e", h=pool.num_heads)
        k, v = rearrange(pool.kv(x), "b m l (two h e) -> two b m h l e", two=2, h=pool.num_heads)
        y: Tensor = pool.proj(F.scaled_dot_product_attention(q, k, v).flatten(2))
        return y

    def branch(self, branch: Branch, x: Tensor) -> Tensor:
        """Maps (B, tokens, E) to (B, r, h, tokens, E / h)."""
        q, k = rearrange(branch.qk(x), "b l (two h r e) -> two b r h l e", two=2, h=branch.num_heads, r=branch.rank)
        v = rearrange(branch.v(x), "b l (h r e) -> b r h l e", h=branch.num_heads, r=branch.rank)
        return F.scaled_dot_product_attention(q, k, v)


class PerChannel(nn.Module):
    """Applies a module for (B, N, D) to every channel by itself."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Maps (B, C, N, D) to the same shape."""
        y: Tensor = self.module(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return y


def build(name: str, dim: int) -> dict[str, nn.Module]:
    """Returns the parts of a contestant; ours and the plain one of a rank have equal weights."""
    torch.manual_seed(0)
    heads = dim // HEAD_WIDTH
    if name == "channel-wise":
        theirs = vision_transformer.Block(dim, heads, MLP_RATIO, qkv_bias=True, init_values=1.0)
        return {"block": PerChannel(theirs), "attention": PerChannel(theirs.attn)}
    kind, _, rank = name.partition(" r")
    attention = make_attention(
        "full" if kind == "joint" else "less", dim, heads, CHANNEL_SHARE, int(rank or 1), False, True, 0.0
    )
    block = Block(dim, attention, MLP_RATIO)
    block.apply(initialise)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    if isinstance(attention, LessAttention) and kind == "plain":
        block.attn = PlainAttention(attention)
    return {"block": block, "attention": block.attn, "MLP": PerChannel(block.mlp)}


def operations(name: str, case: Case) -> float:
    """Returns roughly the floating-point operations of a call."""
    tokens, square = case.channels * case.positions, case.dim**2
    pairs = {"channel-wise": case.positions, "joint": tokens}
    attention = tokens * (8 * square + 4 * pairs[name] * case.dim if name in pairs else 3 * square)
    forward = attention + (4 * MLP_RATIO * tokens * square if case.part == "block" else 0)
    return case.batch * forward * (3 if case.training else 1)


def call(module: nn.Module, x: Tensor, training: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Runs a module once, with the gradients of input and weights if `training`."""
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        if not training:
            with torch.inference_mode():
                y: Tensor = module(x, Context())
            return y
        x = x.detach().requires_grad_()
        y = module(x, Context())
    torch.autograd.grad(y.float().square().mean(), [x, *module.parameters()])
    return y


def clock() -> Callable[[], float]:
    """Returns what measures seconds: of one thread the processor's time, which other programs hardly disturb."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def race(calls: dict[str, Callable[[], object]], seconds: float) -> Times:
    """Returns the shortest time of each call, in milliseconds; they take turns until the seconds are over."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    now = clock()
    begun, rounds = now(), 0
    while rounds < 3 or (rounds < 40 and now() - begun < seconds):
        for name in list(calls)[:: -1 if rounds % 2 else 1]:
            if rounds >= 2 and times[name][0] > 0.7:
                continue
            start = now()
            calls[name]()
            times[name].append(now() - start)
        rounds += 1
    return {name: min(values) * 1000 for name, values in times.items()}


def grid(case: Case) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(case.batch, case.channels, case.positions, case.dim)


def runners(case: Case, built: dict[str, dict[str, nn.Module]]) -> dict[str, Callable[[], object]]:
    """Returns what takes part in a case."""
    x = grid(case)
    modules = {
        name: parts[case.part] for name, parts in built.items() if operations(name, case) <= LIMITS[case.training]
    }
    if case.part == "block" and modules:
        modules["MLP"] = built["ours r1"]["MLP"]
    return {name: partial(call, module, x, case.training) for name, module in modules.items()}


def check(calls: dict[str, Callable[[], object]]) -> None:
    """Raises AssertionError where ours and the plain implementation differ."""
    for rank in RANKS:
        ours, plain = (calls.get(f"{name} r{rank}") for name in ("ours", "plain"))
        if ours is not None and plain is not None:
            torch.testing.assert_close(plain(), ours(), atol=TOLERANCE, rtol=0)


def format_times(settings: Settings, dim: int, compiled: bool, report: Callable[[Case, int, Times], None]) -> None:
    """Races ours and the plain one against themselves, in bf16 or compiled (whole blocks, which take long enough)."""
    parts, grids = (("block",), settings.formats[:1]) if compiled else (tuple(PARTS), settings.formats)
    for (batch, channels, positions), part, training, rank in itertools.product(grids, parts, MODES, RANKS):
        case = Case(dim, channels, positions, training, part, batch)
        x, calls = grid(case), dict[str, Callable[[], object]]()
        for name in ("ours", "plain"):
            module, other = (build(f"{name} r{rank}", dim)[part] for _ in range(2))
            if compiled:
                other.compile()
            calls[name] = partial(call, module, x, training)
            calls[f"{name} other"] = partial(call, other, x, training, None if compiled else torch.bfloat16)
        if not training:
            check({f"{name} r{rank}": calls[name] for name in ("ours", "plain")})
        report(case, rank, race(calls, settings.seconds))
        # the next one must not run into the limit of compilations of one function
        torch.compiler.reset()


def compile_worker(connection: Connection, settings: Settings) -> None:
    """Sends (case, rank, times) one by one, and text where something fails."""
    try:
        format_times(settings, settings.compiled_dim, True, lambda *row: connection.send(row))
    except Exception as error:  # a missing compiler has many names
        connection.send(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")


def compiled_times(settings: Settings) -> tuple[list[tuple[Case, int, Times]], str]:
    """Returns what could be compiled and timed within COMPILE_SECONDS, and a note on what could not."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=compile_worker, args=(sender, settings))
    process.start()
    sender.close()
    rows, note = [], ""
    end = time.monotonic() + COMPILE_SECONDS
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            found = receiver.recv()
            if isinstance(found, str):
                note = f"torch.compile failed: {found}"
            else:
                rows.append(found)
        note = note or f"Stopped after {COMPILE_SECONDS} s; what is missing was not reached."
    except EOFError:
        pass
    finally:
        process.kill()
        process.join()
    return rows, note


def peak_kilobytes() -> int:
    # resource.getrusage would start at the peak of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def memory_worker(name: str, case: Case) -> float:
    """Returns by how many MB a call raises the peak of this process."""
    module, x = build(name, case.dim)[case.part], grid(case)
    # what libraries load and start at the first call is not the contestant's
    call(module, x[:, :2, :8].clone(), case.training)
    before = peak_kilobytes()
    call(module, x, case.training)
    return (peak_kilobytes() - before) / 1000


def memory_times(settings: Settings) -> list[tuple[Case, Times]]:
    """Returns the rise of the peak for each contestant, each in a fresh process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm.models", "vision_lowrank.models.less_vit"])
    rows = []
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for part in PARTS:
            for training in MODES:
                for channels in settings.memory:
                    case = Case(settings.dims[0], channels, settings.positions, training, part)
                    names = [name for name in CONTESTANTS if operations(name, case) <= 2 * LIMITS[training]]
                    rows.append(
                        (case, dict(zip(names, pool.map(memory_worker, names, [case] * len(names)), strict=True)))
                    )
    return rows


def number(value: float | None, digits: int | None = None) -> str:
    """Returns a cell."""
    if value is None:
        return "-"
    return f"{value:.{(1 if value < 100 else 0) if digits is None else digits}f}"


def ratio(times: Times, first: str, second: str) -> float | None:
    return times[first] / times[second] if first in times and second in times else None


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---:"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def contest_table(found: list[tuple[Case, Times]]) -> str:
    """Returns times of all contestants and their ratios to ours, for the cases of one part and mode."""
    pairs = [("(a)/ours r1", "plain r1", "ours r1"), ("(a)/ours r4", "plain r4", "ours r4")]
    pairs += [
        (f"({letter})/ours {r}", n, f"ours {r}")
        for letter, n in zip("bc", CONTESTANTS[4:], strict=True)
        for r in ("r1", "r4")
    ]
    columns = ["D", "C", "ours r1", "(a) r1", "ours r4", "(a) r4", "(b)", "(c)", *(title for title, *_ in pairs)]
    share = any("MLP" in times for _, times in found)
    rows = []
    for case, times in found:
        row = [str(case.dim), str(case.channels), *(number(times.get(name)) for name in CONTESTANTS)]
        row += [number(ratio(times, first, second), 2) for _, first, second in pairs]
        part = ratio(times, "MLP", "ours r1")
        rows.append(row + ([number(part and 100 * part, 0) + (" %" if part else "")] if share else []))
    return table(columns + (["MLP in ours r1"] if share else []), rows)


def format_table(found: list[tuple[Case, int, Times]], name: str) -> str:
    """Returns times in float32 and in another format or compiled."""
    columns = ["B", "C", "N", "part", "mode", "D", "r", "ours", f"ours {name}", "times faster", "(a)", f"(a) {name}"]
    rows = []
    for case, rank, times in found:
        row = [str(case.batch), str(case.channels), str(case.positions), case.part, MODES[case.training]]
        row += [str(case.dim), str(rank)]
        for who in ("ours", "plain"):
            row += [number(times[who]), number(times[f"{who} other"]), number(ratio(times, who, f"{who} other"), 2)]
        rows.append([*row, *(number(ratio(times, f"plain{kind}", f"ours{kind}"), 2) for kind in ("", " other"))])
    return table([*columns, "times faster", "(a)/ours", f"(a)/ours {name}"], rows)


def memory_table(found: list[tuple[Case, Times]]) -> str:
    columns = ["part", "mode", "C", "ours r1", "(a) r1", "ours r4", "(a) r4", "(b)", "(c)"]
    cells = [[number(rise.get(name), 0) for name in CONTESTANTS] for _, rise in found]
    heads = [[case.part, MODES[case.training], str(case.channels)] for case, _ in found]
    return table(columns, [head + row for head, row in zip(heads, cells, strict=True)])


def summary(found: list[tuple[Case, Times]]) -> str:
    """Returns the smallest ratios, and where they are."""

    def smallest(kind: str, ranks: tuple[int, ...], wanted: Callable[[Case], bool]) -> str:
        values = [
            (value, f"{case.part}, {MODES[case.training]}, D = {case.dim}, C = {case.channels}, r = {rank}")
            for case, times in found
            for rank in ranks
            if wanted(case) and (value := ratio(times, kind.format(rank), f"ours r{rank}")) is not None
        ]
        return " | ".join((f"{min(values)[0]:.2f}", min(values)[1]) if values else ("-", "-"))

    def large(case: Case) -> bool:
        return case.part == "attention" and case.channels >= 64

    lines = ["| smallest ratio of times | found | where |", "| :--- | ---: | :--- |"]
    for title, kind, ranks, wanted in (
        ("(a)/ours over everything", "plain r{}", RANKS, lambda case: True),
        ("(a)/ours, attention, C >= 64, rank 1", "plain r{}", (1,), large),
        ("(a)/ours, attention, C >= 64, rank 4", "plain r{}", (4,), large),
        ("(b)/ours over everything", "channel-wise", RANKS, lambda case: True),
        ("(c)/ours over everything", "joint", RANKS, lambda case: True),
        ("(c)/ours, whole block, C = 64", "joint", RANKS, lambda case: case.part == "block" and case.channels == 64),
    ):
        lines.append(f"| {title} | {smallest(kind, ranks, wanted)} |")
    return "\n".join(lines) + "\n"


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()


def contest(settings: Settings) -> list[tuple[Case, Times]]:
    """Times all contestants in float32."""
    built = {dim: {name: build(name, dim) for name in CONTESTANTS} for dim in settings.dims}
    found = []
    for case in settings.cases():
        calls = runners(case, built[case.dim])
        if not case.training:
            check(calls)
        found.append((case, race(calls, settings.seconds)))
        print(case, {name: round(value, 1) for name, value in found[-1][1].items()}, flush=True)
    return found


def report(settings: Settings) -> str:
    """Runs everything and returns the document."""
    # fresh processes are cheapest while this one is small
    memory = memory_times(settings) if Path("/proc/self/status").exists() else []
    found = contest(settings)
    halves: list[tuple[Case, int, Times]] = []
    if processor_has_bf16():
        for dim in settings.dims:
            format_times(settings, dim, False, lambda *row: halves.append(row))
    compiled, note = compiled_times(settings)
    introduction = INTRODUCTION.format(
        positions=settings.positions,
        width=HEAD_WIDTH,
        share=CHANNEL_SHARE,
        tolerance=TOLERANCE,
        limits=[limit / 1e9 for limit in LIMITS.values()],
        clock="the clock" if clock() is time.perf_counter else "processor time",
    )
    machine = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    text = [f"# LESS attention beside its alternatives\n\n{introduction}\n\nMachine: {machine}.\n"]
    text.append(f"## Smallest ratios\n\nAbove 1: ours is faster.\n\n{summary(found)}")
    for part, title in PARTS.items():
        for training, mode in MODES.items():
            cases = [(case, times) for case, times in found if (case.part, case.training) == (part, training)]
            text.append(f"## {title}, {mode}\n\n{contest_table(cases)}")
    text.append("## bf16 autocast, and small grids in batches\n\nB samples of C channels and N positions.\n")
    text.append(format_table(halves, "bf16") if halves else "This processor has no bf16 instructions.\n")
    text.append("## torch.compile, float32\n")
    text += [format_table(compiled, "compiled")] if compiled else []
    text += [f"{note}\n"] if note else []
    text.append("## Peak memory\n")
    text.append(
        f"MB by which one call raises the peak of a fresh process, D = {settings.dims[0]}, with its gradients.\n"
    )
    text.append(memory_table(memory) if memory else "Not measured: this system has no /proc.\n")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--output", type=Path, help="Markdown file; docs/benchmarks.md without --quick")
    arguments = parser.parse_args()
    text = report(QUICK if arguments.quick else Settings())
    output = arguments.output or (None if arguments.quick else Path("docs/benchmarks.md"))
    if output is None:
        print(text)
        return
    with atomic_path(output) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
