"""Factorised linear layers against dense ones and numpy's singular values."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapter_zoo import VOLUME, make_toy
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vision_lowrank.adapters import LoRA, inject
from vision_lowrank.adapters.low_rank_linear import (
    LostStyleLinear,
    LowRankLinear,
    refactorise,
    reset_moments,
    to_dense,
    to_lost_style,
    to_low_rank,
)
from vision_lowrank.errors import AdapterError


def linear(inputs=9, outputs=7, bias=True):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(inputs, outputs, bias=bias)).double()


def test_low_rank_layer_is_the_dense_layer_of_its_weight():
    model = linear()
    bias = model[0].bias
    assert to_low_rank(model, "0", rank=3, alpha=6) == ["0"]
    layer = model[0]
    assert layer.bias is bias
    assert sum(p.numel() for p in layer.parameters()) == 3 * (9 + 7) + 7
    weight = 2 * np.einsum("or,ri->oi", layer.up.detach().numpy(), layer.down.detach().numpy())
    np.testing.assert_allclose(layer.weight.detach().numpy(), weight)
    assert np.linalg.matrix_rank(weight) == 3
    x = torch.randn(2, 5, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, torch.from_numpy(weight), bias))


def test_both_factors_start_spread_and_get_gradients():
    model = linear(bias=False)
    to_low_rank(model, "0", rank=4, alpha=4)
    assert model[0].bias is None
    model(torch.randn(5, 9, dtype=torch.float64)).square().sum().backward()
    assert model[0].down.abs().max() <= 9**-0.5
    assert model[0].up.abs().max() <= 4**-0.5
    assert all(p.grad.any() and p.std() > 0.1 for p in model.parameters())


@pytest.mark.parametrize("sizes", [(9, 7), (4, 11)])
def test_refactorising_balances_the_factors_of_the_same_product(sizes):
    model = linear(*sizes)
    to_low_rank(model, "0", rank=4, alpha=2)
    layer = model[0]
    with torch.no_grad():
        layer.up *= 30
    x = torch.randn(3, sizes[0], dtype=torch.float64)
    before, weight = model(x), layer.weight.detach()
    layer.refactorise_()
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)
    gram = layer.up.T @ layer.up
    torch.testing.assert_close(gram, layer.down @ layer.down.T, rtol=1e-10, atol=1e-10)
    values = np.linalg.svd(weight.numpy() / layer.scaling, compute_uv=False)[:4]
    np.testing.assert_allclose(gram.detach().numpy(), np.diag(values), atol=1e-10)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_reset_moments_start_anew_and_others_go_on(kind):
    settings = {"lr": 0.1} if kind is torch.optim.AdamW else {"lr": 0.1, "momentum": 0.9}

    def step(model, optimizer):
        optimizer.zero_grad()
        (model(torch.linspace(-1, 1, 18, dtype=torch.float64).view(2, 9)) - 1).square().sum().backward()
        optimizer.step()

    model = linear()
    to_low_rank(model, "0", rank=3, alpha=3)
    optimizer = kind(model.parameters(), **settings)
    for _ in range(3):
        step(model, optimizer)
    kept = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    refactorise(model, optimizer)
    fresh = copy.deepcopy(model)
    step(fresh, kind(fresh.parameters(), **settings))
    step(model, optimizer)
    assert torch.equal(model[0].down, fresh[0].down)
    assert torch.equal(model[0].up, fresh[0].up)
    # the bias is not refactorised: it moves as it would have moved
    other, state = kept
    other[0].refactorise_()
    optimizer = kind(other.parameters(), **settings)
    optimizer.load_state_dict(state)
    step(other, optimizer)
    assert torch.equal(model[0].bias, other[0].bias)
    assert not torch.equal(model[0].up, other[0].up)
    reset_moments(optimizer, [other[0].bias])
    assert other[0].bias not in optimizer.state


def test_lost_style_keeps_leading_directions_and_the_columns_that_lose_most():
    model = linear()
    dense = copy.deepcopy(model[0])
    assert to_lost_style(model, "0", rank=2, columns=3) == ["0"]
    layer = model[0]
    left, values, right = np.linalg.svd(dense.weight.detach().numpy(), full_matrices=False)
    leading = left[:, :2] * values[:2] @ right[:2]
    rest = dense.weight.detach().numpy() - leading
    kept = np.sort(np.argsort(np.linalg.norm(rest, axis=0))[-3:])
    expected = leading.copy()
    expected[:, kept] += rest[:, kept]
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(layer.channels.numpy(), kept)
    torch.testing.assert_close(layer.up.T @ layer.up, layer.down @ layer.down.T, rtol=1e-10, atol=1e-10)
    assert sum(p.numel() for p in layer.parameters()) == 2 * (9 + 7) + 3 * 7 + 7
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, dense.bias))
    # with all columns nothing is lost
    whole = LostStyleLinear(dense, rank=2, columns=9)
    torch.testing.assert_close(whole(x), dense(x))


def test_lost_style_weight_within_autocast():
    model = linear().float()
    to_lost_style(model, "0", rank=2, columns=3)
    layer = model[0]
    expected = (layer.up @ layer.down).detach().index_add(1, layer.channels, layer.columns.detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = layer.weight
        dense = layer.dense()
    assert torch.equal(dense.weight, layer.weight)
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight.float(), expected, rtol=0.02, atol=0.01)
    weight.float().sum().backward()
    torch.testing.assert_close(layer.columns.grad, torch.ones(7, 3))


def test_back_to_dense():
    toy = make_toy()
    to_low_rank(toy, "mlp.0", rank=2, alpha=4)
    to_lost_style(toy, "mlp.2", rank=2, columns=2)
    before, biases = toy(VOLUME), (toy.mlp[0].bias, toy.mlp[2].bias)
    assert to_dense(toy) == ["mlp.0", "mlp.2"]
    assert type(toy.mlp[0]) is type(toy.mlp[2]) is nn.Linear
    assert (toy.mlp[0].bias, toy.mlp[2].bias) == biases
    torch.testing.assert_close(toy(VOLUME), before)
    assert not toy.mlp[0].training
    inject(toy, "mlp.0", LoRA(2, 4))
    with pytest.raises(AdapterError, match="no factorised layers"):
        to_dense(toy)


def test_a_vit_trains_and_its_state_comes_back():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3)
    twin = copy.deepcopy(model)
    targets = ["attn.qkv", "attn.proj"]
    paths = to_low_rank(model, targets, rank=4, alpha=4)
    assert paths == [f"blocks.{block}.attn.{name}" for block in range(2) for name in ("qkv", "proj")]
    to_lost_style(model, ["fc1", "fc2"], rank=4, columns=3)
    x, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for step in range(10):
        if step == 5:
            refactorise(model, optimizer)
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    to_low_rank(twin, targets, rank=4, alpha=4)
    to_lost_style(twin, ["fc1", "fc2"], rank=4, columns=3)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.eval()(x), model.eval()(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(x).float(), twin(x).float())


def test_what_cannot_be_replaced_leaves_the_model_as_it_was():
    toy = make_toy()
    before = str(toy)
    for targets, rank, message in (
        (["mlp.0", "proj"], 2, "'proj' is a Conv1d; name linear"),
        (["mlp.0", "head"], 4, "rank=4 for a layer with 6 inputs and 3 outputs"),
        ("mlp.0", 0, "rank=0"),
        ("mlp.0", 2.5, "rank=2.5: give a whole number"),
        ("nothing", 2, "matches no layer"),
    ):
        with pytest.raises(AdapterError, match=message):
            to_low_rank(toy, targets, rank, alpha=1)
    with pytest.raises(AdapterError, match="alpha=nan: give a finite number"):
        to_low_rank(toy, "mlp.0", 2, alpha=float("nan"))
    with pytest.raises(AdapterError, match="columns=7: give from 1 to 6"):
        to_lost_style(toy, "mlp.0", rank=2, columns=7)
    assert str(toy) == before
    with pytest.raises(AdapterError, match="no low-rank layers"):
        refactorise(toy, torch.optim.SGD(toy.parameters()))
    inject(toy, "mlp.0", LoRA(2, 4))
    with pytest.raises(AdapterError, match="has adapters"):
        to_low_rank(toy, "mlp.0", 2, alpha=1)
    with pytest.raises(AdapterError, match="reads its weight without calling"):
        to_low_rank(nn.MultiheadAttention(4, 2), "out_proj", 2, alpha=1)


def test_factors_given_by_hand():
    layer = LowRankLinear(
        nn.Linear(3, 2, bias=False), torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0], [-2.0]]), 0.5
    )
    assert layer(torch.tensor([2.0, 0.0, 0.0])).tolist() == [1.0, -2.0]
