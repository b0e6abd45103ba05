"""The arithmetic of adapters against weights written down by hand and against dense layers."""

import copy
import math

import pytest
import torch
from adapter_zoo import LAYERS, VOLUME, make_toy, perturb, train_steps
from torch import nn
from torch._dynamo.testing import CompileCounter

from vision_lowrank import adapters
from vision_lowrank.adapters import AdaptedLayer, DyLoRA, GatedLoRA, Hydra, LoRA, SoRA, inject
from vision_lowrank.errors import AdapterError


@pytest.fixture
def toy():
    return make_toy()


METHODS = [LoRA(3, 6), LoRA(2, 8, dropout=0.4, rslora=True), GatedLoRA(3, 6, gate_rank=2), GatedLoRA(3, 6, None)]


def layer_model(kind, dtype=torch.float64):
    make, shape = LAYERS[kind]
    torch.manual_seed(3)
    model = nn.Sequential(make()).to(dtype).eval()
    return model, torch.randn(shape, dtype=dtype)


def dense(base, weight):
    """A layer like `base` with another weight."""
    other = copy.deepcopy(base)
    other.weight.data = weight
    return other


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_untrained_adapter_is_identity_to_the_bit(kind, method):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model, x = layer_model(kind, dtype)
        before = model(x)
        inject(model, "0", method)
        assert torch.equal(model(x), before)
        model.train()
        assert torch.equal(model(x), before)


BIG = {
    "linear": (lambda: nn.Linear(200, 60), 200),
    "conv2d": (lambda: nn.Conv2d(20, 60, (3, 4)), 20 * 12),
    "conv2d groups": (lambda: nn.Conv2d(80, 60, 3, groups=4), 20 * 9),
}
UNIFORM = {
    "LoRA": (LoRA(40, 6), ["lora_A.weight"]),
    "GatedLoRA": (GatedLoRA(40, 6, 40), ["lora_A.weight", "gate_A.weight", "residual_A.weight"]),
    "DyLoRA": (DyLoRA(40, 6), ["lora_A.weight"]),
    "SoRA": (SoRA(40, 6), ["lora_A.weight"]),
    "Hydra": (Hydra(40, 0.5), ["parallel.down", "sequential.down"]),
}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in UNIFORM for kind in BIG if (name, kind) != ("Hydra", "conv2d groups")]
)
def test_factors_start_uniform_with_the_bound_of_their_source(name, kind):
    torch.manual_seed(1)
    make, fan_in = BIG[kind]
    model = nn.Sequential(make())
    method, keys = UNIFORM[name]
    inject(model, "0", method)
    state = model[0].adapters["default"].state_dict()
    for key in keys:
        if name != "Hydra":
            bound = fan_in**-0.5  # as nn.Linear, and peft's LoRA, start
        elif key == "parallel.down":
            bound = math.sqrt(6 / (fan_in + 40 * (12 if kind == "conv2d" else 1)))  # Xavier's
        else:
            bound = math.sqrt(6 / (60 + 40))
        values = state[key]
        assert 0.99 * bound < values.abs().max() <= bound
        assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.04)
        assert values.mean().abs() < 0.06 * bound
    starts_at_zero = ("lora_B.weight", "gate_B.weight", "residual_B.weight", "parallel.up", "sequential.up")
    zero = [key for key in state if key in starts_at_zero]
    assert len(zero) == len(keys)
    assert not any(state[key].any() for key in zero)


@pytest.mark.parametrize("kind", LAYERS)
def test_lora_is_a_dense_layer_with_weight_plus_sBA(kind):
    model, x = layer_model(kind)
    base = model[0]
    inject(model, "0", LoRA(rank=3, alpha=12))
    perturb(model)
    state = model[0].adapters["default"].state_dict()
    a, b = state["lora_A.weight"], state["lora_B.weight"]
    assert a.shape == (3, *base.weight.shape[1:])
    assert b.shape == (base.weight.shape[0], 3, *[1] * (base.weight.ndim - 2))
    delta = torch.einsum("or,ri->oi", b.flatten(1), a.flatten(1)).reshape(base.weight.shape)
    torch.testing.assert_close(model(x), dense(base, base.weight + 4 * delta)(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("gate_rank", [2, None])
def test_gated_lora_follows_its_equation(kind, gate_rank):
    model, x = layer_model(kind)
    base = model[0]
    inject(model, "0", GatedLoRA(rank=3, alpha=6, gate_rank=gate_rank))
    perturb(model)
    adapters.set_strength(model, 0.7)
    state = {
        key: value.flatten(1) for key, value in model[0].adapters["default"].state_dict().items() if value.ndim > 1
    }

    def branch(weight):
        layer = dense(base, weight.reshape(base.weight.shape))
        layer.bias = None
        return layer(x)

    if gate_rank is None:
        gate, residual = state["gate.weight"], state["residual.weight"]
    else:
        gate = state["gate_B.weight"] @ state["gate_A.weight"]
        residual = state["residual_B.weight"] @ state["residual_A.weight"]
    low_rank = branch(state["lora_B.weight"] @ state["lora_A.weight"])
    expected = base(x) + 0.7 * (1 / (1 + torch.exp(-branch(gate))) * 2 * low_rank + branch(residual))
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_rank_of_update_and_full_rank_reaches_any_weight():
    model = nn.Sequential(nn.Linear(5, 4, bias=False)).double()
    inject(model, "0", LoRA(rank=4, alpha=4))
    target = torch.randn(4, 5, dtype=torch.float64)
    with torch.no_grad():
        model[0].adapters["default"].lora_A.weight.copy_(target)
        model[0].adapters["default"].lora_B.weight.copy_(torch.eye(4))
    torch.testing.assert_close(model(torch.eye(5, dtype=torch.float64)).T, model[0].base.weight + target)


def test_scaling():
    assert LoRA(rank=4, alpha=6).scaling == 1.5
    assert LoRA(rank=4, alpha=6, rslora=True).scaling == 3.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: LoRA(0, 1),
        lambda: LoRA(2.0, 1),
        lambda: LoRA(True, 1),
        lambda: LoRA(2, math.nan),
        lambda: LoRA(2, 1, dropout=1.0),
        lambda: LoRA(2, 1, dropout=-0.1),
        lambda: GatedLoRA(2, 1, gate_rank=0),
        lambda: GatedLoRA(-1, 1, gate_rank=None),
    ],
)
def test_settings_out_of_range(make):
    with pytest.raises(AdapterError, match="give a"):
        make()


def test_dropout_only_in_training_and_only_on_the_adapters_input():
    model = nn.Sequential(nn.Linear(40, 3)).eval()
    inject(model, "0", LoRA(2, 2, dropout=0.5))
    perturb(model)
    x = torch.randn(400, 40)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    base = model[0].base(x)
    dropped = (model(x) - base).mean(0)
    model.eval()
    torch.testing.assert_close(dropped, (model(x) - base).mean(0), atol=0.3, rtol=0)
    model.train()
    with torch.no_grad():
        model[0].adapters["default"].lora_B.weight.zero_()
    assert torch.equal(model(x), base)


def test_several_adapters_sum_and_strength_scales_each(toy):
    layer = nn.Sequential(nn.Linear(5, 4)).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    base = layer(x)
    inject(layer, "0", LoRA(2, 4), name="first")
    inject(layer, "0", GatedLoRA(1, 3, gate_rank=1), name="second")
    perturb(layer)

    def output(first, second):
        adapters.set_strength(layer, first, "first")
        adapters.set_strength(layer, second, "second")
        return layer(x)

    assert torch.equal(output(0, 0), base)
    first, second = output(1, 0) - base, output(0, 1) - base
    assert first.abs().max() > 0.01 < second.abs().max()
    torch.testing.assert_close(output(0.3, -2.0), base + 0.3 * first - 2.0 * second)


def test_only_adapters_get_gradients_and_training_reduces_the_loss(toy):
    inject(toy, ["mlp.0", "mlp.2", "stem"], LoRA(2, 4), train="head")
    toy.train()
    adapters.freeze_statistics(toy)
    before = {name: tensor.clone() for name, tensor in toy.state_dict().items()}
    losses = train_steps(toy, VOLUME, [0, 2], 0.1, 15)
    assert losses[-1] < 0.5 * losses[0]
    changed = {name for name, tensor in toy.state_dict().items() if not torch.equal(tensor, before[name])}
    factors = {f"{p}.adapters.default.lora_{f}.weight" for p in ("mlp.0", "mlp.2", "stem") for f in "AB"}
    assert changed == factors | {"head.weight", "head.bias"}


def test_bf16_autocast(toy):
    inject(toy, ["mlp.0", "mlp.2"], LoRA(2, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with adapters.disabled(toy):
            base = toy(VOLUME)
        assert torch.equal(toy(VOLUME), base)
        perturb(toy)
        adapters.set_strength(toy, 0.5)
        output = toy(VOLUME)
        output.float().sum().backward()
    assert output.dtype == base.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), toy(VOLUME), atol=0.05, rtol=0.05)
    assert toy.mlp[0].adapters["default"].lora_A.weight.grad.dtype == torch.float32


def test_compile_without_graph_breaks_and_without_recompiling_for_strength(toy):
    inject(toy, ["mlp.0", "mix.0"], LoRA(2, 4))
    inject(toy, ["mlp.2"], GatedLoRA(2, 4, gate_rank=1))
    perturb(toy)
    counter = CompileCounter()
    compiled = torch.compile(toy, backend=counter, fullgraph=True)
    for strength in (1.0, 0.25, 0.0):
        adapters.set_strength(toy, strength)
        torch.testing.assert_close(compiled(VOLUME), toy(VOLUME))
    assert counter.frame_count == 1


def test_deepcopy_and_state_dict_round_trip(toy):
    inject(toy, ["mlp.0", "proj"], LoRA(2, 4), train="head")
    perturb(toy)
    adapters.set_strength(toy, 0.6)
    twin = copy.deepcopy(toy)
    assert torch.equal(twin(VOLUME), toy(VOLUME))
    adapters.set_strength(twin, 0.0)
    assert not torch.equal(twin(VOLUME), toy(VOLUME))
    twin.load_state_dict(toy.state_dict())
    assert torch.equal(twin(VOLUME), toy(VOLUME))


def test_reading_the_weight_of_an_adapted_layer_is_refused():
    layer = nn.Sequential(nn.Linear(2, 2))
    inject(layer, "0", LoRA(1, 1))
    assert isinstance(layer[0], AdaptedLayer)
    with pytest.raises(AttributeError, match="by-passes the adapters"):
        nn.functional.linear(torch.ones(1, 2), layer[0].weight)
