"""LoRA+ against peft's optimiser."""

import copy

import pytest
import torch
from adapter_zoo import make_toy
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from vision_lowrank.adapters import GatedLoRA, LoRA, inject
from vision_lowrank.adapters.lora_plus import lora_plus_groups
from vision_lowrank.errors import AdapterError


def train(model, optimizer, steps=4):
    torch.manual_seed(4)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(5, 6)) - 1).square().sum().backward()
        optimizer.step()


def test_same_steps_as_peft():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    theirs = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"]))
    ours = copy.deepcopy(plain)
    inject(ours, ["0", "2"], LoRA(2, 4))
    with torch.no_grad():
        for path in ("0", "2"):
            layer = theirs.base_model.model.get_submodule(path)
            ours.get_submodule(path).adapters["default"].lora_A.weight.copy_(layer.lora_A["default"].weight)
    train(ours, torch.optim.AdamW(lora_plus_groups(ours, 1e-2, 8.0, weight_decay=0.1)))
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1
    )
    train(theirs, optimizer)
    for path in ("0", "2"):
        layer, adapter = theirs.base_model.model.get_submodule(path), ours.get_submodule(path).adapters["default"]
        for factor in ("lora_A", "lora_B"):
            expected = getattr(layer, factor)["default"].weight
            torch.testing.assert_close(getattr(adapter, factor).weight, expected, rtol=1e-5, atol=1e-6)


def test_groups_hold_every_trained_parameter_once():
    toy = make_toy()
    inject(toy, "mlp.0", LoRA(2, 4), train="head")
    inject(toy, "mlp.2", GatedLoRA(2, 4, gate_rank=1))
    groups = lora_plus_groups(toy, 0.01, 16.0, weight_decay=0.2)
    names = {parameter: name for name, parameter in toy.named_parameters()}
    found = {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    assert set(found) == {name for name, parameter in toy.named_parameters() if parameter.requires_grad}
    fast = {name for name, (rate, _) in found.items() if rate == pytest.approx(0.16)}
    assert fast == {f"mlp.{place}.adapters.default.lora_B.weight" for place in (0, 2)}
    assert all(rate == 0.01 for name, (rate, _) in found.items() if name not in fast)
    assert {name for name, (_, decay) in found.items() if decay != 0.2} == {"head.bias"}


def test_errors():
    toy = make_toy()
    with pytest.raises(AdapterError, match="no adapters"):
        lora_plus_groups(toy, 0.01, 16.0)
    inject(toy, "mlp.0", LoRA(2, 4))
    for ratio in (0.5, float("nan")):
        with pytest.raises(AdapterError, match="at least 1"):
            lora_plus_groups(toy, 0.01, ratio)
    toy.requires_grad_(False)
    with pytest.raises(AdapterError, match="no adapter has a trainable factor"):
        lora_plus_groups(toy, 0.01, 16.0)
