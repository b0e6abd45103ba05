"""What every registered method promises, in one table: a method that is registered without a row fails here."""

import copy
import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable

import peft
import pytest
import torch
import torch.multiprocessing as mp
from adapter_zoo import LAYERS, perturb
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vision_lowrank import adapters
from vision_lowrank.adapters import (
    METHODS,
    NOLA,
    DyLoRA,
    FlyLoRA,
    GatedLoRA,
    Hydra,
    LoRA,
    LoRAXS,
    SoRA,
    export_lora,
    inject,
    load_adapter,
    save_adapter,
)
from vision_lowrank.adapters.diagnostics import layer_intruders
from vision_lowrank.adapters.methods import Method
from vision_lowrank.errors import AdapterError


@dataclasses.dataclass(frozen=True)
class Row:
    """A method and what it promises.

    `count` takes the sides m and n of the flattened weight and whether there is a bias. Kinds are refused by a word in
    their name. A method whose output jumps with its input (`smooth` False) cannot be near itself in low precision.
    """

    method: Method
    count: Callable[[int, int, bool], int]
    identity: bool = True
    mergeable: bool = True
    exports: bool = False
    refuses: tuple[str, ...] = ()
    smooth: bool = True


ROWS = {
    "LoRA": Row(LoRA(3, 6), lambda m, n, _: 3 * (m + n), exports=True),
    "GatedLoRA": Row(GatedLoRA(2, 4, gate_rank=1), lambda m, n, _: (2 + 1 + 1) * (m + n), mergeable=False),
    "GatedLoRA dense": Row(GatedLoRA(2, 4, None), lambda m, n, _: 2 * (m + n) + 2 * m * n, mergeable=False),
    "Hydra": Row(
        Hydra(2, 0.5),
        lambda m, n, bias: 2 * (n + m) + 2 * (m + m) + 2 * (2 + m) * bias,
        refuses=("groups", "depthwise"),
    ),
    "NOLA": Row(NOLA(2, 4, terms=5), lambda *_: 2 * 5, exports=True),
    # their steps and cuts are of whole layers
    "DyLoRA": Row(DyLoRA(3, 6), lambda m, n, _: 3 * (m + n), refuses=("parts",)),
    "SoRA": Row(SoRA(3, 6), lambda m, n, _: 3 * (m + n) + 3, refuses=("parts",)),
    "LoRAXS": Row(LoRAXS(3, 6), lambda *_: 3 * 3, identity=False, exports=True),
    "FlyLoRA": Row(
        FlyLoRA(4, 8, active=2), lambda m, *_: 4 * m, mergeable=False, refuses=("groups", "depthwise"), smooth=False
    ),
}

# layers as they are, and parts of a fused one
KINDS = [*LAYERS, "parts of qkv", "parts of qkv, no bias"]
PAIRS, REFUSED = (
    [
        pytest.param(row, kind, id=f"{name}-{kind}")
        for name, row in ROWS.items()
        for kind in KINDS
        if any(word in kind for word in row.refuses) == refused
    ]
    for refused in (False, True)
)


def make(kind, dtype=torch.float64):
    """Returns a model of one layer, an input, the target, and how many adapters of which layer shape that makes."""
    torch.manual_seed(4)
    if kind.startswith("parts"):
        layer, shape, target, parts = nn.Linear(6, 15, bias="no" not in kind), (3, 4, 6), "qkv[q,v]", 2
        model = nn.Sequential(OrderedDict(qkv=layer))
        rows = 5
    else:
        build, shape = LAYERS[kind]
        layer, target, parts = build(), "0", 1
        model = nn.Sequential(layer)
        rows = layer.weight.shape[0]
    sides = rows, layer.weight[0].numel(), layer.bias is not None
    return model.to(dtype).eval(), torch.randn(shape, dtype=dtype), target, parts, sides


def adapt(row, kind, dtype=torch.float64, name="default"):
    """Returns a model with an adapter that is as if trained, and an input."""
    model, x, target, *_ = make(kind, dtype)
    inject(model, target, row.method, name=name)
    return perturb(model), x


def layer_of(model):
    return model[0]


def test_every_method_has_a_row():
    assert {type(row.method).__name__ for row in ROWS.values()} == set(METHODS)
    assert all(METHODS[type(row.method).__name__] is type(row.method) for row in ROWS.values())


@pytest.mark.parametrize(("row", "kind"), REFUSED)
def test_refused_with_the_reason(row, kind):
    model, _, target, *_ = make(kind)
    with pytest.raises(AdapterError, match=r"groups|whole layers"):
        inject(model, target, row.method)
    assert not any(isinstance(module, adapters.AdaptedLayer) for module in model.modules())


@pytest.mark.parametrize(("row", "kind"), PAIRS)
def test_start_gradients_and_count(row, kind):
    model, x, target, parts, (m, n, bias) = make(kind, torch.float32)
    before = model(x)
    base = list(model.parameters())
    inject(model, target, row.method)
    if row.identity:
        assert torch.equal(model(x), before)
        assert torch.equal(model.train()(x), before)
    else:
        torch.testing.assert_close(model(x), before, atol=1e-3, rtol=0)
    perturb(model.train())
    model(x).square().sum().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in base)
    found = adapters.adapter_parameters(model)
    assert all(parameter.grad.abs().max() > 0 for parameter in found)
    assert sum(parameter.numel() for parameter in found) == parts * row.count(m, n, bias)
    assert adapters.count_parameters(model).trainable == parts * row.count(m, n, bias)


@pytest.mark.parametrize(("row", "kind"), PAIRS)
def test_merging(row, kind):
    model, x = adapt(row, kind)
    base = layer_of(model).base
    bits = {key: value.clone() for key, value in base.state_dict().items()}
    before, expected = base(x), model(x)
    assert not torch.allclose(before, expected, atol=1e-3)
    if not row.mergeable:
        with pytest.raises(AdapterError, match="cannot be merged"):
            adapters.merge(model)
        assert torch.equal(model(x), expected)
        return
    adapters.merge(model)
    torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(base(x), expected, atol=1e-10, rtol=1e-10)
    twin = copy.deepcopy(model)
    adapters.unmerge(model)
    assert all(torch.equal(value, bits[key]) for key, value in base.state_dict().items())
    assert torch.equal(model(x), expected)
    # the copy is merged still, and by itself
    torch.testing.assert_close(twin(x), expected, atol=1e-10, rtol=1e-10)
    adapters.unmerge(twin)
    assert all(torch.equal(value, bits[key]) for key, value in layer_of(twin).base.state_dict().items())


@pytest.mark.parametrize(("row", "kind"), PAIRS)
def test_saving_and_loading(row, kind, tmp_path):
    model, x = adapt(row, kind)
    expected = model(x)
    adapters.set_strength(model, 0.5)
    save_adapter(model, tmp_path / "own")
    again, *_ = make(kind)
    load_adapter(again, tmp_path / "own", name="other")
    assert torch.equal(again(x), expected)
    assert layer_of(again).methods == {"other": layer_of(model).methods["default"]}
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]

    base = layer_of(model).base
    if not row.exports or not (isinstance(base, nn.Linear) or (base.groups == 1 and set(base.dilation) == {1})):
        with pytest.raises(AdapterError, match=r"which is no LoRA|computes something else"):
            export_lora(model, tmp_path / "peft")
        return
    export_lora(model, tmp_path / "peft")
    plain, *_ = make(kind)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "peft", autocast_adapter_dtype=False)
    torch.testing.assert_close(theirs.eval()(x), expected, atol=1e-10, rtol=1e-10)
    load_adapter(plain, tmp_path / "peft")
    torch.testing.assert_close(plain(x), expected, atol=1e-10, rtol=1e-10)
    assert isinstance(layer_of(plain).methods["default"], LoRA)


@pytest.mark.parametrize(("row", "kind"), PAIRS)
def test_strength_is_linear_and_copies_stand_alone(row, kind):
    model, x = adapt(row, kind)
    full, base = model(x), layer_of(model).base(x)
    twin = copy.deepcopy(model)
    adapters.set_strength(model, 0.0)
    assert torch.equal(model(x), base)
    adapters.set_strength(model, -1.5)
    torch.testing.assert_close(model(x), base - 1.5 * (full - base), atol=1e-10, rtol=1e-10)
    assert torch.equal(twin(x), full)


@pytest.mark.parametrize(("row", "kind"), PAIRS)
def test_rows_are_samples_alone(row, kind):
    model, x = adapt(row, kind, name="a")
    inject(model, make(kind)[2], LoRA(1, 1), name="b")
    perturb(model)
    weights = torch.randn(len(x), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    weights[0] = torch.tensor([0.0, 1.0])
    with adapters.rows(model, weights):
        mixed = model(x)
    for sample, (a, b) in enumerate(weights.tolist()):
        adapters.set_strength(model, a, "a")
        adapters.set_strength(model, b, "b")
        torch.testing.assert_close(mixed[sample], model(x[sample : sample + 1])[0], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("row", "kind"), PAIRS)
def test_bf16_autocast(row, kind):
    model, x = adapt(row, kind, torch.float32)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
        output.float().square().mean().backward()
    assert output.dtype == torch.bfloat16
    if row.smooth:
        torch.testing.assert_close(output.float(), expected, atol=0.03 * expected.abs().max().item(), rtol=0.03)
    for parameter in adapters.adapter_parameters(model):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize(("row", "kind"), [pair for pair in PAIRS if pair.values[1] in ("linear", "parts of qkv")])
def test_weights_that_stay_are_not_rounded_by_autocast(row, kind, tmp_path):
    model, _ = adapt(row, kind, torch.float32)
    twin = copy.deepcopy(model)
    if row.mergeable:
        before, _, target, *_ = make(kind, torch.float32)
        adapters.merge(model)
        similarity = layer_intruders(before, twin, target.partition("[")[0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            adapters.merge(twin)
        state = layer_of(model).base.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in layer_of(twin).base.state_dict().items())
        adapters.unmerge(twin)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = layer_intruders(before, twin, target.partition("[")[0])
        assert all(torch.equal(found.similarity, similarity[path].similarity) for path, found in again.items())
    if row.exports:
        export_lora(twin, tmp_path / "alone")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            export_lora(twin, tmp_path / "within")
        weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("alone", "within")]
        assert weights[0] == weights[1]


class Small(nn.Module):
    """A fused projection, of which each method gets the whole, and a head trained beside it."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 12)
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.qkv(x)))


def _train(row, halves, wrap):
    """Takes three steps on this process's share of the batch and returns the trained numbers."""
    torch.manual_seed(0)
    model = Small().double()
    inject(model, "qkv", row.method, train="head")
    perturb(model)
    wrapped = wrap(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x, y = (torch.randn(8, k, dtype=torch.float64, generator=generator)[halves] for k in (6, 2))
        optimizer.zero_grad()
        nn.functional.mse_loss(wrapped(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def _worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    half = slice(4 * rank, 4 * rank + 4)
    torch.save({name: _train(row, half, DistributedDataParallel) for name, row in ROWS.items()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, row in ROWS.items():
        assert torch.equal(first[name], second[name])
        assert math.isfinite(first[name].sum().item())
        if row.smooth:
            alone = _train(row, slice(None), lambda model: model)
            torch.testing.assert_close(first[name], alone, atol=1e-10, rtol=1e-10)
