"""LoRA-Pro's gradients against the full gradient of a dense layer, least squares and scipy's Sylvester solver."""

import pytest
import torch
from adapter_zoo import LAYERS, VOLUME, make_toy, perturb
from scipy.linalg import solve_sylvester
from torch import nn
from torch.func import functional_call

from vision_lowrank import adapters
from vision_lowrank.adapters import GatedLoRA, LoRA, inject
from vision_lowrank.adapters.lora_pro import adjust_gradients, adjusted_gradients
from vision_lowrank.errors import AdapterError


def matrices(rank=3, out=6, inputs=8):
    """Factors and a full gradient."""
    torch.manual_seed(5)
    shapes = ((rank, inputs), (out, rank), (out, inputs))
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def adjust(down, up, full, scaling):
    return adjusted_gradients(down, up, scaling * up.T @ full, scaling * full @ down.T, scaling)


def change(down, up, new_down, new_up, scaling):
    return scaling * (up @ new_down + new_up @ down)


@pytest.mark.parametrize("kind", LAYERS)
def test_product_follows_the_full_gradient_up_to_what_no_factor_reaches(kind):
    make, shape = LAYERS[kind]
    torch.manual_seed(3)
    model = nn.Sequential(make()).double()
    base = model[0]
    inject(model, "0", LoRA(rank=2, alpha=5))
    perturb(model)
    adapters.set_strength(model, 0.6)
    adapter = model[0].adapters["default"]
    x = torch.randn(shape, dtype=torch.float64)
    model(x).pow(2).sum().backward()
    adjust_gradients(model)

    weight = (base.weight + adapter.delta_weight()).detach().requires_grad_()
    functional_call(base, {"weight": weight}, x).pow(2).sum().backward()
    full = weight.grad.flatten(1)
    a, b = adapter.lora_A.weight, adapter.lora_B.weight
    assert a.grad.shape == a.shape
    found = change(*(t.flatten(1) for t in (a, b, a.grad, b.grad)), 2.5 * 0.6).detach()
    a, b = a.detach().flatten(1), b.detach().flatten(1)
    beside = (torch.eye(len(b)) - b @ torch.linalg.pinv(b)) @ full @ (torch.eye(a.shape[1]) - torch.linalg.pinv(a) @ a)
    torch.testing.assert_close(found, full - beside, rtol=1e-9, atol=1e-9)


def test_parts_of_a_fused_layer_each_follow_their_rows():
    torch.manual_seed(3)
    model = nn.ModuleDict({"qkv": nn.Linear(6, 12)}).double()
    inject(model, "qkv[q,v]", LoRA(rank=2, alpha=3))
    perturb(model)
    adapters.set_strength(model, 0.6)
    whole = model["qkv"].adapters["default"]
    x = torch.randn(5, 6, dtype=torch.float64)
    model["qkv"](x).pow(2).sum().backward()
    weight = (model["qkv"].base.weight + whole.delta(model["qkv"].base)[0]).detach().requires_grad_()
    nn.functional.linear(x, weight, model["qkv"].base.bias).pow(2).sum().backward()
    adjust_gradients(model)
    for part, rows in (("q", slice(0, 4)), ("v", slice(8, 12))):
        a, b = whole.parts[part].lora_A.weight, whole.parts[part].lora_B.weight
        found = change(a, b, a.grad, b.grad, 1.5 * 0.6)
        full = weight.grad[rows]
        beside = (torch.eye(4) - b @ torch.linalg.pinv(b)) @ full @ (torch.eye(6) - torch.linalg.pinv(a) @ a)
        torch.testing.assert_close(found, full - beside, rtol=1e-9, atol=1e-9)


def test_nothing_in_the_tangent_space_is_nearer_to_the_full_gradient():
    down, up, full = matrices()
    scaling = 1.7
    new_down, new_up = adjust(down, up, full, scaling)
    # columns: the change by every single entry of both factors
    moves = [
        torch.kron(scaling * up, torch.eye(8, dtype=torch.float64)),
        torch.kron(torch.eye(6, dtype=torch.float64), scaling * down.T.contiguous()),
    ]
    design = torch.cat(moves, dim=1)
    best = torch.linalg.lstsq(design, full.flatten(), driver="gelsd").solution
    found = change(down, up, new_down, new_up, scaling)
    torch.testing.assert_close(found.flatten(), design @ best)
    plain = change(down, up, scaling * up.T @ full, scaling * full @ down.T, scaling)
    plain *= (plain * full).sum() / plain.square().sum()
    assert (found - full).norm() < 0.9 * (plain - full).norm()
    assert (found * full).sum() > 0


def test_factors_stay_as_near_to_their_own_gradients_as_they_can():
    down, up, full = matrices()
    scaling = 0.8
    grad_down, grad_up = scaling * up.T @ full, scaling * full @ down.T
    new_down, new_up = adjusted_gradients(down, up, grad_down, grad_up, scaling)
    # all solutions differ by (X A, -B X): the best X by least squares, from any of them
    start_down = new_down + torch.ones(3, 3).double() @ down
    start_up = new_up - up @ torch.ones(3, 3).double()
    columns = []
    for place in range(9):
        unit = torch.zeros(9, dtype=torch.float64)
        unit[place] = 1
        columns.append(torch.cat([(unit.view(3, 3) @ down).flatten(), -(up @ unit.view(3, 3)).flatten()]))
    wanted = torch.cat([(grad_down - start_down).flatten(), (grad_up - start_up).flatten()])
    best = torch.linalg.lstsq(torch.stack(columns, dim=1), wanted).solution.view(3, 3)
    torch.testing.assert_close(new_down, start_down + best @ down)
    torch.testing.assert_close(new_up, start_up - up @ best)


def test_the_free_part_solves_the_sylvester_equation():
    down, up, full = matrices()
    scaling = 2.0
    grad_down = scaling * up.T @ full
    inverse = torch.linalg.inv(up.T @ up)
    right = -(inverse @ grad_down @ down.T) / scaling**2
    free = torch.from_numpy(solve_sylvester((up.T @ up).numpy(), (down @ down.T).numpy(), right.numpy()))
    new_down, _ = adjust(down, up, full, scaling)
    torch.testing.assert_close(new_down, inverse @ grad_down / scaling**2 + free @ down)


def test_first_step_moves_only_b():
    toy = make_toy()
    inject(toy, ["mlp.0", "stem"], LoRA(2, 3))
    toy(VOLUME).square().sum().backward()
    before = {name: p.grad.clone() for name, p in toy.named_parameters() if p.grad is not None}
    adjust_gradients(toy)
    for path in ("mlp.0", "stem"):
        adapter = toy.get_submodule(path).adapters["default"]
        assert not adapter.lora_A.weight.grad.any()
        a = adapter.lora_A.weight.detach().flatten(1)
        plain = before[f"{path}.adapters.default.lora_B.weight"].flatten(1)
        expected = plain @ torch.linalg.inv(a @ a.T) / 1.5**2
        torch.testing.assert_close(adapter.lora_B.weight.grad.flatten(1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["equal columns", "rank above outputs"])
def test_factors_without_full_rank(case):
    down, up, full = matrices(rank=3, out=2 if case == "rank above outputs" else 6)
    if case == "equal columns":
        up[:, 1] = up[:, 0]
    found = change(down, up, *adjust(down, up, full, 1.3), 1.3)
    inside = up @ torch.linalg.pinv(up)
    rest = full - inside @ full
    torch.testing.assert_close(found, full - rest + rest @ torch.linalg.pinv(down) @ down, rtol=1e-9, atol=1e-9)


def test_single_precision_keeps_digits():
    down, up, full = matrices()
    up *= torch.tensor([1.0, 1e-2, 1e-3])
    found = change(down, up, *(t.double() for t in adjust(down.float(), up.float(), full.float(), 1.5)), 1.5)
    torch.testing.assert_close(found, change(down, up, *adjust(down, up, full, 1.5), 1.5), rtol=1e-3, atol=1e-3)


def test_what_is_left_alone():
    toy = make_toy()
    inject(toy, "mlp.0", LoRA(2, 3), name="one")
    inject(toy, "mlp.0", LoRA(2, 3), name="two")
    inject(toy, "mlp.2", GatedLoRA(2, 3, gate_rank=1), name="two", train="head")
    perturb(toy)
    toy(VOLUME).square().sum().backward()
    before = {name: p.grad.clone() for name, p in toy.named_parameters() if p.grad is not None}
    adjust_gradients(toy, "two")
    changed = {name for name, gradient in before.items() if not torch.equal(toy.get_parameter(name).grad, gradient)}
    assert changed == {f"mlp.0.adapters.two.lora_{factor}.weight" for factor in "AB"}

    toy.zero_grad()
    adjust_gradients(toy)
    adapters.set_strength(toy, 0.0)
    toy(VOLUME).square().sum().backward()
    adjust_gradients(toy)
    assert not toy.mlp[0].adapters["one"].lora_B.weight.grad.any()


def test_what_cannot_be_adjusted():
    toy = make_toy()
    inject(toy, "mlp.2", GatedLoRA(2, 3, gate_rank=1))
    with pytest.raises(AdapterError, match="no plain LoRA"):
        adjust_gradients(toy)
    inject(toy, "mlp.0", LoRA(2, 3), name="other")
    toy.mlp[0].adapters["other"].lora_A.weight.requires_grad_(False)
    toy(VOLUME).square().sum().backward()
    with pytest.raises(AdapterError, match=r"'mlp\.0'.*trains both"):
        adjust_gradients(toy)
