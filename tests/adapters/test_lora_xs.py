"""LoRA-XS and LoRA-SB against singular value decompositions and the projection that training R amounts to."""

import numpy as np
import pytest
import scipy.linalg
import torch
from adapter_zoo import LAYERS, make_toy, perturb
from torch import nn

from vision_lowrank import adapters
from vision_lowrank.adapters import LoRAXS, inject, load_adapter, lora_sb_gradients, save_adapter
from vision_lowrank.errors import AdapterError


def linear(seed=0, out=7, inputs=5):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, out)).double()


def truncated(matrix, rank):
    """The best approximation of a rank, by SciPy."""
    u, s, vh = scipy.linalg.svd(np.asarray(matrix, dtype=np.float64), full_matrices=False)
    return torch.from_numpy((u[:, :rank] * s[:rank]) @ vh[:rank])


@pytest.mark.parametrize("kind", LAYERS)
def test_factors_are_the_leading_triplets_of_the_weight(kind):
    make, _ = LAYERS[kind]
    torch.manual_seed(1)
    model = nn.Sequential(make()).double()
    weight = model[0].weight.detach().clone()
    inject(model, "0", LoRAXS(3, 6))
    adapter = model[0].adapters["default"]
    b, a = adapter.xs_B.flatten(1), adapter.xs_A.flatten(1)
    torch.testing.assert_close(b @ a, truncated(weight.flatten(1), 3))
    torch.testing.assert_close(b.T @ b, torch.eye(3).double())
    assert torch.equal(model[0].base.weight, weight)
    assert 1e-6 < adapter.xs_R.std() < 1e-4
    with torch.no_grad():
        adapter.xs_R.copy_(torch.eye(3))
    torch.testing.assert_close(adapter.delta_weight().flatten(1), 2 * truncated(weight.flatten(1), 3))


def test_only_the_square_is_trained():
    model = linear()
    inject(model, "0", LoRAXS(4, 4))
    assert [tuple(parameter.shape) for parameter in adapters.adapter_parameters(model)] == [(4, 4)]


def batches():
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(6, 5, generator=generator).double(), torch.randn(6, 7, generator=generator).double())] * 2


def losses(model, data):
    return (nn.functional.mse_loss(torch.tanh(model(x)), y) for x, y in data)


@pytest.mark.parametrize("alpha", [2, 3.0])
def test_start_from_gradients_is_the_truncated_first_step_whatever_alpha(alpha):
    model = linear()
    weight = model[0].weight.detach().clone().requires_grad_()
    total = sum(
        nn.functional.mse_loss(torch.tanh(nn.functional.linear(x, weight, model[0].bias)), y) for x, y in batches()
    )
    (gradient,) = torch.autograd.grad(total, weight)
    lora_sb_gradients(model, "0", losses(model, batches()))
    torch.testing.assert_close(model[0].weight.grad, gradient)
    inject(model, "0", LoRAXS(2, alpha, init="gradient", step=0.01))
    assert model[0].base.weight.grad is None
    step = truncated(-0.01 * gradient.sign(), 2)
    torch.testing.assert_close(model[0].adapters["default"].delta_weight(), step)
    x = batches()[0][0]
    torch.testing.assert_close(model(x), model[0].base(x) + x @ step.T)


def test_training_r_is_the_gradient_projected_from_both_sides():
    model = linear()
    lora_sb_gradients(model, "0", losses(model, batches()))
    inject(model, "0", LoRAXS(2, 2, init="gradient", step=0.01))
    adapter = model[0].adapters["default"]
    next(losses(model, batches())).backward()
    a, b = adapter.xs_A, adapter.xs_B
    weight = (model[0].base.weight + adapter.delta_weight()).detach().requires_grad_()
    x, y = batches()[0]
    loss = nn.functional.mse_loss(torch.tanh(nn.functional.linear(x, weight, model[0].base.bias)), y)
    (gradient,) = torch.autograd.grad(loss, weight)
    onto_b, onto_a = (m @ torch.linalg.pinv(m) for m in (b, a.T))
    torch.testing.assert_close(b @ adapter.xs_R.grad @ a, onto_b @ gradient @ onto_a)


def test_gradients_leave_the_rest_of_the_model_alone():
    model = make_toy().train()
    model.head.bias.grad = torch.ones(3)
    model.head.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    x = torch.randn(2, 1, 4, 6, 6)
    lora_sb_gradients(model, ["mlp.0", "stem"], (model(x).square().sum() for _ in range(1)))
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {"mlp.0.weight", "stem.weight", "head.bias"}
    assert torch.equal(model.head.bias.grad, torch.ones(3))
    assert [parameter.requires_grad for parameter in model.parameters()] == flags

    def fail():
        yield model(x).sum()
        raise KeyboardInterrupt

    model.zero_grad()
    with pytest.raises(KeyboardInterrupt):
        lora_sb_gradients(model, "mlp.0", fail())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.mlp[0].weight.grad is None


def test_gradients_of_parts_of_a_fused_layer():
    model = nn.Sequential()
    model.add_module("qkv", linear(out=9)[0])
    data = [(x, y.new_zeros(len(y), 9)) for x, y in batches()]
    lora_sb_gradients(model, "qkv[k]", losses(model, data))
    gradient = model.qkv.weight.grad.clone()
    inject(model, "qkv[k]", LoRAXS(2, 2, init="gradient", step=0.1))
    change, _ = model.qkv.adapters["default"].delta(model.qkv.base)
    torch.testing.assert_close(change[3:6], truncated(-0.1 * gradient[3:6].sign(), 2))
    assert not change[:3].any()
    assert not change[6:].any()


def test_files_hold_the_factors_and_need_no_gradient(tmp_path):
    model = linear()
    lora_sb_gradients(model, "0", losses(model, batches()))
    inject(model, "0", LoRAXS(2, 2, init="gradient", step=0.1))
    perturb(model)
    save_adapter(model, tmp_path)
    again = linear()
    load_adapter(again, tmp_path)
    x = batches()[0][0]
    assert torch.equal(again(x), model(x))
    assert again[0].methods == model[0].methods


def test_refused():
    for settings in (
        {"rank": 2, "alpha": 0},
        {"rank": 0, "alpha": 1},
        {"rank": 2, "alpha": 1, "init": "zeros"},
        {"rank": 2, "alpha": 1, "step": 0.1},
        {"rank": 2, "alpha": 1, "init": "gradient"},
        {"rank": 2, "alpha": 1, "init": "gradient", "step": -1.0},
    ):
        with pytest.raises(AdapterError, match=r"give|takes"):
            LoRAXS(**settings)
    model = linear()
    with pytest.raises(AdapterError, match=r"rank=6 on .* has 5 singular values"):
        inject(model, "0", LoRAXS(6, 6))
    start = LoRAXS(2, 2, init="gradient", step=0.1)
    with pytest.raises(AdapterError, match="call lora_sb_gradients"):
        inject(model, "0", start)
    model[0].weight.grad = torch.full_like(model[0].weight, torch.nan)
    with pytest.raises(AdapterError, match="not finite"):
        inject(model, "0", start)
    model[0].weight.grad.zero_()
    with pytest.raises(AdapterError, match="gradient is, as behind a head whose weight is, zero"):
        inject(model, "0", start)
    zero = linear()
    nn.init.zeros_(zero[0].weight)
    with pytest.raises(AdapterError, match="its weight is zero"):
        inject(zero, "0", LoRAXS(2, 2))
    with pytest.raises(AdapterError, match="got no loss"):
        lora_sb_gradients(model, "0", [])
    with pytest.raises(AdapterError, match="without gradient"):
        lora_sb_gradients(model, "0", [torch.ones(())])
    two = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(AdapterError, match="'1' has no part in the loss"):
        lora_sb_gradients(two, ["0", "1"], (two[0](torch.ones(1, 2)).sum() for _ in range(1)))
