"""WeLore against numpy: every threshold that matters is tried, truncated weights are multiplied out."""

import copy

import numpy as np
import pytest
import torch
from adapter_zoo import LAYERS, VOLUME, make_toy, train_steps
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vision_lowrank.adapters import LoRA, freeze_except, inject
from vision_lowrank.adapters.low_rank_linear import LowRankLinear
from vision_lowrank.adapters.welore import factorise
from vision_lowrank.errors import AdapterError

TARGETS = ["attn.qkv", "attn.proj", "fc1", "fc2"]


def make_vit(kind=VisionTransformer):
    torch.manual_seed(0)
    model = kind(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3).double().eval()
    with torch.no_grad():
        for number, (name, weight) in enumerate(model.named_parameters()):
            if name.endswith(("qkv.weight", "fc1.weight")):
                # spectra that fall in different ways, as in trained models
                left, values, right = torch.linalg.svd(weight, full_matrices=False)
                weight.copy_(left * (values * torch.linspace(1, 0, len(values)) ** (1 + number % 3)) @ right)
    return model


def weights_of(model):
    return {
        name.removesuffix(".weight"): weight.detach().numpy()
        for name, weight in model.named_parameters()
        if name.endswith(tuple(f"{target}.weight" for target in TARGETS))
    }


def brute_force(weights, budget):
    """Ranks at the smallest threshold that meets the budget, among all singular values."""
    spectra = {name: np.linalg.svd(weight, compute_uv=False) for name, weight in weights.items()}
    spectra = {name: (values - values.min()) / (values.max() - values.min()) for name, values in spectra.items()}
    total = sum(weight.size for weight in weights.values())
    for threshold in sorted({0.0, *np.concatenate(list(spectra.values()))}):
        ranks, size = {}, 0
        for name, weight in weights.items():
            rank = int((spectra[name] >= threshold - 1e-9).sum())
            factors = rank * sum(weight.shape)
            size += min(factors, weight.size)
            if factors < weight.size:
                ranks[name] = rank
        if size <= budget * total:
            return ranks, size / total
    raise AssertionError


@pytest.mark.parametrize("budget", [0.9, 0.6, 0.3, 0.08])
def test_ranks_are_those_of_the_smallest_threshold(budget):
    model = make_vit()
    weights = weights_of(model)
    biases = {name: bias for name, bias in model.named_parameters() if name.endswith("bias")}
    result = factorise(model, TARGETS, budget)
    ranks, kept = brute_force(weights, budget)
    assert result.ranks == ranks
    assert len(ranks) > 0
    assert result.kept == pytest.approx(kept)
    assert result.kept <= budget
    size = 0
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert layer.bias is biases[f"{name}.bias"]
        if name in ranks:
            left, values, right = np.linalg.svd(weight, full_matrices=False)
            nearest = left[:, : ranks[name]] * values[: ranks[name]] @ right[: ranks[name]]
            np.testing.assert_allclose(layer.weight.detach().numpy(), nearest, atol=1e-10)
            assert ranks[name] < weight.size / sum(weight.shape)
            size += layer.down.numel() + layer.up.numel()
        else:
            assert type(layer) is nn.Linear
            np.testing.assert_array_equal(layer.weight.detach().numpy(), weight)
            size += weight.size
    assert size == pytest.approx(result.kept * sum(weight.size for weight in weights.values()))


def test_a_full_budget_changes_nothing():
    model = make_vit()
    layers = dict(model.named_modules())
    result = factorise(model, TARGETS, 1.0)
    assert (result.ranks, result.threshold, result.kept) == ({}, 0.0, 1.0)
    assert all(model.get_submodule(path) is layer for path, layer in layers.items())


def test_a_matrix_of_low_rank_is_kept_to_the_last_digit():
    model = make_toy().double()
    with torch.no_grad():
        model.mlp[0].weight.copy_(torch.outer(torch.arange(10.0), torch.arange(6.0)))
    before = model(VOLUME.double())
    result = factorise(model, "mlp.0", 0.5)
    assert result.ranks == {"mlp.0": 1}
    assert result.kept == 16 / 60
    torch.testing.assert_close(model(VOLUME.double()), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "kind", [kind for kind in LAYERS if kind in ("conv1d", "conv2d", "conv3d") or "reflect" in kind]
)
def test_convolutions(kind):
    make, shape = LAYERS[kind]
    torch.manual_seed(3)
    model = nn.Sequential(make()).double().eval()
    dense = copy.deepcopy(model[0])
    result = factorise(model, "0", 0.6)
    rank = result.ranks["0"]
    left, values, right = np.linalg.svd(dense.weight.detach().flatten(1).numpy(), full_matrices=False)
    dense.weight.data = torch.from_numpy(left[:, :rank] * values[:rank] @ right[:rank]).view_as(dense.weight)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(model(x), dense(x))
    numbers = sum(p.numel() for name, p in model.named_parameters() if name.endswith("weight"))
    assert numbers == pytest.approx(result.kept * dense.weight.numel())
    assert not model[0][1].training


class LargeConv2d(nn.Conv2d):
    """A convolution with a constructor of its own."""

    def __init__(self, width):
        super().__init__(width, width, 3)


def test_a_convolution_with_its_own_constructor():
    torch.manual_seed(3)
    model = nn.Sequential(LargeConv2d(6))
    plain = nn.Sequential(nn.Conv2d(6, 6, 3))
    plain.load_state_dict(model.state_dict())
    for either in (model, plain):
        factorise(either, "0", 0.6)
    x = torch.randn(2, 6, 5, 5)
    assert torch.equal(model(x), plain(x))


# the second reads qkv's weight and never calls the layer
@pytest.mark.parametrize("kind", [VisionTransformer, Beit])
def test_timm_models_work_and_only_the_factors_are_tuned(kind):
    model = make_vit(kind).float().train()
    x, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    result = factorise(model, TARGETS, 0.5)
    assert any("qkv" in path for path in result.ranks)
    freeze_except(model, list(result.ranks))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    losses = train_steps(model, x, labels.tolist(), 1e-2, 6)
    assert losses[-1] < losses[0]
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    factors = {f"{path}.{name}" for path in result.ranks for name in ("down", "up")}
    assert factors <= changed <= factors | {f"{path}.bias" for path in result.ranks}
    assert isinstance(model.get_submodule(next(iter(result.ranks))), LowRankLinear)


def test_a_layer_read_instead_of_called_computes_the_truncated_weight():
    model = make_vit(Beit)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    result = factorise(model, TARGETS, 0.5)
    low_rank = model(x)
    for path in result.ranks:
        layer = model.get_submodule(path)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.dense())
    torch.testing.assert_close(model(x), low_rank)


def test_errors_leave_the_model_as_it_was():
    toy = make_toy()
    before = str(toy)
    for budget in (0.0, -1.0, 1.2, float("nan")):
        with pytest.raises(AdapterError, match="share of the parameters"):
            factorise(toy, "mlp.0", budget)
    with pytest.raises(AdapterError, match=r"even rank 1 in every layer needs 0\.2667"):
        factorise(toy, ["mlp.0", "mlp.2"], 0.2)
    assert str(toy) == before
    with pytest.raises(AdapterError, match="in 2 groups"):
        factorise(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "0", 0.5)
    inject(toy, "mlp.0", LoRA(2, 4))
    with pytest.raises(AdapterError, match="has adapters"):
        factorise(toy, "mlp.0", 0.5)
