"""Hydra against its equation, its published merge, and LoRA where the two are the same."""

import pytest
import torch
from adapter_zoo import LAYERS, perturb
from torch import nn

from vision_lowrank import adapters
from vision_lowrank.adapters import Hydra, LoRA, folded_weight, inject
from vision_lowrank.errors import AdapterError

UNGROUPED = [kind for kind in LAYERS if "groups" not in kind and "depthwise" not in kind]


def adapted(kind, scale=0.7):
    make, shape = LAYERS[kind]
    torch.manual_seed(3)
    model = nn.Sequential(make()).double().eval()
    inject(model, "0", Hydra(2, scale))
    return perturb(model), torch.randn(shape, dtype=torch.float64)


def factors(adapter):
    """The factors as matrices, and the biases, zero where there are none."""
    matrices = [adapter.parallel.down, adapter.parallel.up, adapter.sequential.down, adapter.sequential.up]
    names = ("down_bias", "up_bias")
    biases = [getattr(branch, name) for branch in (adapter.parallel, adapter.sequential) for name in names]
    return [m.flatten(1) for m in matrices], [torch.zeros(1).double() if b is None else b for b in biases]


@pytest.mark.parametrize("kind", UNGROUPED)
def test_equation_in_two_branches(kind):
    model, x = adapted(kind)
    layer = model[0]
    adapters.set_strength(model, 0.3)
    (a_p, b_p, a_s, b_s), (bias_ap, bias_bp, bias_as, bias_bs) = factors(layer.adapters["default"])
    z = layer.base(x)
    inner = nn.utils.skip_init(type(layer.base), **_like(layer.base, len(a_p))).double()
    inner.weight.data = layer.adapters["default"].parallel.down.data
    channel = -1 if isinstance(layer.base, nn.Linear) else 1
    hidden = inner(x).movedim(channel, -1) + bias_ap
    parallel = hidden @ b_p.T + bias_bp
    sequential = (z.movedim(channel, -1) @ a_s.T + bias_as) @ b_s.T + bias_bs
    expected = z + 0.3 * 0.7 * (parallel + sequential).movedim(-1, channel)
    torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=1e-10)


def _like(base, out):
    if isinstance(base, nn.Linear):
        return {"in_features": base.in_features, "out_features": out, "bias": False}
    keys = ("in_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")
    return {"out_channels": out, "bias": False, **{key: getattr(base, key) for key in keys}}


@pytest.mark.parametrize("kind", ["linear", "conv2d dilated, reflected"])
def test_published_merge_of_weight_and_bias(kind):
    model, _ = adapted(kind)
    base = model[0].base
    weight, bias, s = base.weight.detach().clone().flatten(1), base.bias.detach().clone(), 0.7
    (a_p, b_p, a_s, b_s), (bias_ap, bias_bp, bias_as, bias_bs) = factors(model[0].adapters["default"])
    turn = torch.eye(len(weight)).double() + s * b_s @ a_s
    expected_bias = turn @ bias + s * (b_p @ bias_ap + bias_bp) + s * (b_s @ bias_as + bias_bs)
    folded = folded_weight(model[0])
    adapters.merge(model)
    for found in ((base.weight, base.bias), folded):
        torch.testing.assert_close(found[0].flatten(1), turn @ weight + s * b_p @ a_p, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(found[1], expected_bias, atol=1e-12, rtol=1e-12)


def test_sequential_branch_alone_on_the_identity_is_lora():
    torch.manual_seed(0)
    x = torch.randn(4, 5).double()
    models = []
    for method in (Hydra(3, 2.0), LoRA(3, 6)):
        model = nn.Sequential(nn.Linear(5, 5, bias=False)).double()
        nn.init.eye_(model[0].weight)
        inject(model, "0", method)
        models.append(perturb(model))
    hydra, lora = (model[0].adapters["default"] for model in models)
    with torch.no_grad():
        hydra.parallel.up.zero_()
        hydra.sequential.down.copy_(lora.lora_A.weight)
        hydra.sequential.up.copy_(lora.lora_B.weight)
    torch.testing.assert_close(models[0](x), models[1](x))


def test_several_read_the_layers_own_output_and_their_order_does_not_matter():
    x = torch.randn(4, 5).double()
    outputs = []
    for names in (("a", "b"), ("b", "a")):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6)).double().eval()
        for name in names:
            inject(model, "0", Hydra(2, 1.0), name=name)
        for name in ("a", "b"):
            torch.manual_seed(ord(name))
            for parameter in adapters.adapter_parameters(model, name):
                nn.init.normal_(parameter)
        alone = []
        for name in ("a", "b"):
            adapters.set_strength(model, 0.0)
            adapters.set_strength(model, 1.0, name)
            alone.append(model(x) - model[0].base(x))
        adapters.set_strength(model, 1.0)
        torch.testing.assert_close(model(x), model[0].base(x) + sum(alone))
        outputs.append(model(x))
        adapters.merge(model)
        torch.testing.assert_close(model(x), outputs[-1])
    torch.testing.assert_close(*outputs)


def test_dropout_between_the_factors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6))
    inject(model, "0", Hydra(2, 1.0, dropout=0.5))
    perturb(model)
    adapter, x = model[0].adapters["default"], torch.randn(64, 5)
    assert not torch.equal(model(x), model(x))
    up = torch.cat([adapter.parallel.up, adapter.sequential.up], 1)
    (a_p, _, a_s, _), (bias_ap, bias_bp, bias_as, bias_bs) = factors(adapter)
    z = model[0].base(x)
    hidden = torch.cat([x @ a_p.T + bias_ap, z @ a_s.T + bias_as], 1)
    added = model.train()(x) - z - bias_bp - bias_bs
    solved = torch.linalg.lstsq(up, added.T).solution.T
    # each value of the four between the factors is twice itself or gone
    kept = (solved - 2 * hidden).abs() < 1e-3
    assert (kept | (solved.abs() < 1e-3)).all()
    assert 0.3 < kept.float().mean() < 0.7
    assert folded_weight(model[0]) is None
    assert folded_weight(model.eval()[0]) is not None


def test_groups_and_settings_out_of_range_are_refused():
    with pytest.raises(AdapterError, match="mixes all outputs"):
        inject(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), "0", Hydra(2, 1.0))
    for settings in ({"rank": 0, "scale": 1.0}, {"rank": 1, "scale": float("inf")}):
        with pytest.raises(AdapterError, match="give a"):
            Hydra(**settings)
    with pytest.raises(AdapterError, match=r"dropout=1\.0"):
        Hydra(1, 1.0, dropout=1.0)


def test_published_number_of_parameters_of_vit_b():
    """Output projection and second feed-forward layer of 12 blocks of width 768 at rank 2: 239 712."""
    with torch.device("meta"):
        blocks = nn.ModuleList(
            nn.ModuleDict({"proj": nn.Linear(768, 768), "fc2": nn.Linear(3072, 768)}) for _ in range(12)
        )
        inject(blocks, ["proj", "fc2"], Hydra(2, 1.0))
    assert adapters.count_parameters(blocks).adapter == 239_712
