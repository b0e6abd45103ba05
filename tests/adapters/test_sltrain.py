"""SLTrain against the dense weight written out by loops."""

import pytest
import torch
import torch.nn.functional as F
from adapter_zoo import VOLUME, make_toy, train_steps
from torch import nn

from vision_lowrank.adapters.low_rank_linear import to_dense
from vision_lowrank.adapters.sltrain import SLTrainLinear, to_sltrain
from vision_lowrank.errors import AdapterError


@pytest.fixture
def layer():
    torch.manual_seed(2)
    layer = SLTrainLinear(nn.Linear(9, 7).double(), rank=2, alpha=6, density=0.2, seed=0)
    nn.init.normal_(layer.up)
    return layer


def dense_weight(layer):
    rows = []
    places = layer.support.tolist()
    for out in range(layer.out_features):
        row = []
        for place in range(layer.in_features):
            value = 3 * sum(layer.up[out, r].item() * layer.down[r, place].item() for r in range(2))
            if out * layer.in_features + place in places:
                value += layer.values[places.index(out * layer.in_features + place)].item()
            row.append(value)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def test_weight_is_low_rank_plus_sparse(layer):
    assert len(layer.values) == len(set(layer.support.tolist())) == int(0.2 * 63)
    weight = dense_weight(layer)
    torch.testing.assert_close(layer.weight, weight)
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias))
    assert sum(p.numel() for p in layer.parameters()) == 2 * (9 + 7) + 12 + 7


def test_gradients_are_those_of_the_dense_weight_at_the_places(layer):
    weight = dense_weight(layer).requires_grad_()
    x = torch.randn(5, 9, dtype=torch.float64)
    layer(x).pow(3).sum().backward()
    F.linear(x, weight, layer.bias.detach()).pow(3).sum().backward()
    torch.testing.assert_close(layer.values.grad, weight.grad.flatten()[layer.support])
    torch.testing.assert_close(layer.down.grad, 3 * layer.up.detach().T @ weight.grad)
    torch.testing.assert_close(layer.up.grad, 3 * weight.grad @ layer.down.detach().T)


def test_start():
    torch.manual_seed(2)
    layer = SLTrainLinear(nn.Linear(100, 80), rank=4, alpha=8, density=0.05, seed=1)
    assert not layer.up.any()
    assert 0.09 < layer.values.abs().max() <= 0.1
    assert 0.09 < layer.down.abs().max() <= 0.1
    assert int((layer.weight != 0).sum()) == 400
    # places all over the weight
    assert torch.bincount(layer.support // 100, minlength=80).max() < 20
    assert layer.support.max() > 7900


def test_places_are_the_seeds_and_the_global_generator_is_left_alone():
    def make(seed):
        torch.manual_seed(3)
        layer = SLTrainLinear(nn.Linear(9, 7), rank=2, alpha=2, density=0.3, seed=seed)
        return layer, torch.rand(1)

    (first, after), (second, later), (third, _) = make(0), make(1), make(0)
    assert not torch.equal(first.support, second.support)
    assert torch.equal(first.support, third.support)
    assert torch.equal(first.values, second.values)
    assert torch.equal(after, later)


def test_a_model_trains_comes_back_and_becomes_dense():
    toy = make_toy()
    assert to_sltrain(toy, ["mlp.0", "mlp.2"], rank=2, alpha=4, density=0.2) == ["mlp.0", "mlp.2"]
    assert not torch.equal(toy.mlp[0].support, toy.mlp[2].support)
    losses = train_steps(toy, VOLUME, [0, 2], 0.03, 12)
    assert losses[-1] < 0.5 * losses[0]
    twin = make_toy()
    # other places, which the state replaces
    to_sltrain(twin, ["mlp.0", "mlp.2"], rank=2, alpha=4, density=0.2, seed=5)
    twin.load_state_dict(toy.state_dict())
    before = toy(VOLUME)
    assert torch.equal(twin(VOLUME), before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(toy(VOLUME).float(), before, atol=0.1, rtol=0.1)
    assert to_dense(toy) == ["mlp.0", "mlp.2"]
    torch.testing.assert_close(toy(VOLUME), before)


def test_errors():
    toy = make_toy()
    for density in (0.0, 1.5, float("nan")):
        with pytest.raises(AdapterError, match="density"):
            to_sltrain(toy, "mlp.0", rank=2, alpha=2, density=density)
    with pytest.raises(AdapterError, match="alpha=inf: give a finite number"):
        to_sltrain(toy, "mlp.0", rank=2, alpha=float("inf"), density=0.1)
    with pytest.raises(AdapterError, match="rank=7"):
        to_sltrain(toy, "mlp.0", rank=7, alpha=2, density=0.1)
    with pytest.raises(AdapterError, match="Conv1d; name linear"):
        to_sltrain(toy, "proj", rank=2, alpha=2, density=0.1)
