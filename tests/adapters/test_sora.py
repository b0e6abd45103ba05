"""SoRA: the gated product against a slow sum, the proximal step against a grid, pruning and its file in peft."""

import copy

import peft
import pytest
import torch
from adapter_zoo import IMAGES, adapted_layer, perturb
from torch import nn

from vision_lowrank import adapters
from vision_lowrank.adapters import AdaptedLayer, LoRA, SoRA, inject, save_adapter
from vision_lowrank.adapters.sora import active_ranks, proximal_step, prune
from vision_lowrank.errors import AdapterError

KINDS = ["linear tokens, no bias", "conv2d", "conv2d groups", "conv3d"]


def set_gate(layer, values):
    with torch.no_grad():
        layer.adapters["default"].sora_gate.copy_(torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_output_is_that_of_a_dense_layer_with_gated_ranks(kind):
    model, x = adapted_layer(kind, SoRA(4, 6))
    base, adapter = model[0].base, model[0].adapters["default"]
    assert torch.equal(model(x), base(x))
    assert adapter.sora_gate.shape == (4,)
    perturb(model)
    adapters.set_strength(model, 0.7)
    layer = copy.deepcopy(base)
    for i in range(4):
        rank_one = torch.outer(adapter.lora_B.weight.flatten(1)[:, i], adapter.lora_A.weight[i].flatten())
        layer.weight.data += 0.7 * 1.5 * adapter.sora_gate[i] * rank_one.view(base.weight.shape)
    torch.testing.assert_close(model(x), layer(x), rtol=1e-10, atol=1e-10)
    adapters.merge(model)
    torch.testing.assert_close(model(x), layer(x), rtol=1e-10, atol=1e-10)
    adapters.unmerge(model)
    adapters.set_strength(model, 0.0)
    assert torch.equal(model(x), base(x))


def test_gate_starts_standard_normal_and_is_trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, "0", SoRA(4000, 1))
    gate = model[0].adapters["default"].sora_gate
    assert gate.requires_grad
    assert abs(gate.mean().item()) < 0.08
    assert gate.std().item() == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_proximal_step_minimises_its_objective(kind):
    model, _ = adapted_layer(kind, SoRA(7, 6))
    perturb(model)
    start = torch.tensor([-0.3, -0.1, 0.0, 0.05, 0.15, 0.199, 0.21], dtype=torch.float64)
    set_gate(model[0], start.tolist())
    adapter = model[0].adapters["default"]
    factors = adapter.lora_A.weight.clone(), adapter.lora_B.weight.clone()
    proximal_step(model, 0.1)
    grid = torch.linspace(-0.5, 0.5, 100001, dtype=torch.float64)
    objective = 0.5 * (grid - start[:, None]) ** 2 + 0.1 * grid.abs()
    torch.testing.assert_close(adapter.sora_gate.data, grid[objective.argmin(1)], rtol=0, atol=1e-5)
    # gates between one and two thresholds stay
    assert adapter.sora_gate.count_nonzero() == 4
    assert torch.equal(adapter.lora_A.weight, factors[0])
    assert torch.equal(adapter.lora_B.weight, factors[1])
    assert adapter.sora_gate.requires_grad
    before = adapter.sora_gate.clone()
    proximal_step(model, 0.0)
    assert torch.equal(adapter.sora_gate, before)


def test_training_with_the_proximal_step_finds_the_rank_of_the_target():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).double()
    x = torch.randn(256, 8, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(8, 2, dtype=torch.float64))[0] for _ in range(2))
    target = model(x).detach() + x @ right @ left.T
    inject(model, "0", SoRA(6, 6))
    parameters = dict(model[0].adapters["default"].named_parameters())
    gate = parameters.pop("sora_gate")
    # a gate alone could shrink for ever while its factors grow
    groups = [{"params": [gate], "weight_decay": 0.0}, {"params": list(parameters.values()), "weight_decay": 0.01}]
    optimizer = torch.optim.SGD(groups, lr=0.2)
    for _ in range(400):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        proximal_step(model, 0.004)
    assert active_ranks(model) == {"0": 2}
    assert loss.item() < 0.01 * target.var().item()


def test_pruned_model_is_an_ordinary_lora_that_peft_reads(vit, tmp_path):
    plain = copy.deepcopy(vit)
    inject(vit, ["attn.qkv", "patch_embed.proj", "fc1"], SoRA(4, 6), train="head")
    formula = 4 * (2 * (16 + 48 + 16 + 64) + 3 * 64 + 16) + 5 * 4
    assert adapters.count_parameters(vit).adapter == formula
    perturb(vit)
    set_gate(vit.patch_embed.proj, [0.0, 0.4, 0.0, -1.3])
    set_gate(vit.blocks[0].attn.qkv, [0.5, 0.0, 0.0, 0.0])
    set_gate(vit.blocks[0].mlp.fc1, [0.0, 0.0, 0.0, 0.0])
    expected = vit(IMAGES)
    adapters.set_strength(vit, 0.5)
    ranks = {"patch_embed.proj": 2, "blocks.0.attn.qkv": 1, "blocks.0.mlp.fc1": 0}
    ranks |= {"blocks.1.attn.qkv": 4, "blocks.1.mlp.fc1": 4}
    assert active_ranks(vit) == ranks
    assert prune(vit) == ranks
    assert vit.blocks[0].attn.qkv.methods == {"default": LoRA(1, 1.5)}
    assert vit.blocks[0].attn.qkv.adapters["default"].strength == 0.5
    assert not isinstance(vit.blocks[0].mlp.fc1, AdaptedLayer)
    # a gate and (in + out) factors less for each zero, and a gate less for each rank kept
    deducted = formula - 5 * 4 - 3 * 64 - 4 * (16 + 64) - 2 * (3 * 64 + 16)
    count = adapters.count_parameters(vit)
    assert count.adapter == deducted
    assert count.trainable == count.adapter + count.head
    adapters.set_strength(vit, 1.0)
    torch.testing.assert_close(vit(IMAGES), expected, rtol=1e-6, atol=1e-6)
    save_adapter(vit, tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(theirs(IMAGES), expected, rtol=1e-6, atol=1e-6)


def test_a_layer_keeps_its_other_adapters(vit):
    inject(vit, "fc1", SoRA(3, 6))
    inject(vit, "fc1", LoRA(2, 4), name="other")
    set_gate(vit.blocks[0].mlp.fc1, [0.0, 0.0, 0.0])
    prune(vit)
    assert vit.blocks[0].mlp.fc1.methods == {"other": LoRA(2, 4)}
    assert list(vit.blocks[0].mlp.fc1.adapters) == ["other"]
    assert list(vit.blocks[1].mlp.fc1.adapters) == ["default", "other"]


def test_refusals_leave_the_model_as_it_was(vit):
    inject(vit, "fc1", SoRA(3, 6))
    inject(vit, "fc2", LoRA(3, 6), name="other")
    with pytest.raises(AdapterError, match="no SoRA adapter named 'other'"):
        proximal_step(vit, 0.1, "other")
    for threshold in (-0.1, float("nan"), float("inf")):
        with pytest.raises(AdapterError, match="give a finite number"):
            proximal_step(vit, threshold)
    gates = [block.mlp.fc1.adapters["default"].sora_gate.clone() for block in vit.blocks]
    adapters.merge(vit)
    for call in (lambda: proximal_step(vit, 0.1), lambda: prune(vit)):
        with pytest.raises(AdapterError, match="is merged"):
            call()
    adapters.unmerge(vit)
    assert all(torch.equal(b.mlp.fc1.adapters["default"].sora_gate, g) for b, g in zip(vit.blocks, gates, strict=True))
    proximal_step(vit, 100.0)
    with pytest.raises(AdapterError, match="all gates of adapter 'default' are zero"):
        prune(vit)
    assert vit.blocks[0].mlp.fc1.methods == {"default": SoRA(3, 6)}


def test_settings():
    assert SoRA(4, 6).scaling == 1.5
    with pytest.raises(AdapterError, match="rank=0"):
        SoRA(0, 6)
    with pytest.raises(AdapterError, match="alpha=nan"):
        SoRA(4, float("nan"))
