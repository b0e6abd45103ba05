"""Diagnostics against peft, closed forms and gradients taken one by one."""

import copy
import math
import re

import pytest
import torch
from adapter_zoo import VOLUME, make_toy, perturb
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vision_lowrank import adapters
from vision_lowrank.adapters import GatedLoRA, LoRA, inject
from vision_lowrank.adapters.diagnostics import (
    effective_rank,
    intruder_dimensions,
    kernel_alignment,
    layer_intruders,
    representation_alignment,
    tangent_kernel,
    tangent_kernel_alignment,
)
from vision_lowrank.errors import AdapterError


def test_an_unchanged_weight_has_no_intruders():
    weight = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    found = intruder_dimensions(weight, weight, top=5)
    assert found.count == 0
    torch.testing.assert_close(found.similarity, torch.eye(9)[:5], atol=1e-4, rtol=0)


def test_representations_are_compared_in_full_within_autocast():
    before, after = torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = representation_alignment(before, after)
    kernels = [(x.double() @ x.double().T).flatten() for x in (before, after)]
    assert within == pytest.approx(torch.cosine_similarity(*kernels, dim=0).item(), abs=1e-6)


def test_a_planted_direction_is_found():
    weight = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 0.0, 0.0]))[:, :4]
    # orthogonal to all that the weight reaches
    planted = weight + 20 * torch.outer(torch.tensor([0.0, 0, 0, 0, 0.6, 0.8]), torch.tensor([1.0, 0, 0, 0]))
    assert intruder_dimensions(weight, planted, top=1).count == 1
    found = intruder_dimensions(weight, planted, top=4)
    assert found.count == 1
    assert found.similarity[0].max() < 0.3
    # the threshold is of the largest cosine of a row
    assert intruder_dimensions(weight, planted, top=4, threshold=0.2).count == 0
    turned = torch.tensor([[math.cos(0.3), -math.sin(0.3)], [math.sin(0.3), math.cos(0.3)]]) @ torch.diag(
        torch.tensor([3.0, 1.0])
    )
    straight = torch.diag(torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(
        intruder_dimensions(straight, turned).similarity,
        torch.tensor([[math.cos(0.3), math.sin(0.3)], [math.sin(0.3), math.cos(0.3)]]),
    )


@pytest.mark.parametrize(("top", "threshold"), [(10, 0.5), (4, 0.7)])
def test_counts_are_pefts(top, threshold):
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(24, 24) for _ in range(4)))
    ours = copy.deepcopy(plain)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0", "1", "2", "3"])
    theirs = get_peft_model(plain, config)
    inject(ours, ["0", "1", "2", "3"], LoRA(3, 6))
    with torch.no_grad():
        for number, layer in enumerate(theirs.base_model.model):
            layer.lora_B["default"].weight.normal_(std=(0.0, 0.1, 0.4, 2.0)[number])
            adapter = ours[number].adapters["default"]
            adapter.lora_A.weight.copy_(layer.lora_A["default"].weight)
            adapter.lora_B.weight.copy_(layer.lora_B["default"].weight)
    lines = []
    reduce_intruder_dimension(theirs, top_k=top, threshold_epsilon=threshold, logging_sink=lines.append)
    expected = {}
    for line in lines:
        if match := re.fullmatch(r".*model\.(\d): (?:No intruders|Intruders: (\d+))", line):
            expected[match[1]] = int(match[2] or 0)
    found = layer_intruders(ours, ours, ["0", "1", "2", "3"], top, threshold)
    assert {path: intruders.count for path, intruders in found.items()} == expected
    assert expected["0"] == 0 < expected["3"]


def test_models_are_compared_layer_by_layer():
    toy = make_toy()
    pretrained = copy.deepcopy(toy)
    targets = ["stem", "mlp.0"]
    inject(toy, targets, LoRA(2, 20))
    perturb(toy)
    adapters.set_strength(toy, 3.0)
    unmerged = layer_intruders(toy, toy, targets, top=3)
    assert list(unmerged) == targets
    adapters.merge(toy)
    merged = layer_intruders(toy, toy, targets, top=3)
    adapters.unmerge(toy)
    adapters.set_strength(toy, 1.0)
    scaled = layer_intruders(toy, toy, targets, top=3)
    full = copy.deepcopy(pretrained)
    adapters.merge_and_remove(toy)
    full.load_state_dict(toy.state_dict())
    trained = layer_intruders(pretrained, full, targets, top=3)
    for path in targets:
        torch.testing.assert_close(merged[path].similarity, unmerged[path].similarity)
        torch.testing.assert_close(trained[path].similarity, scaled[path].similarity)
        assert trained[path].similarity.shape == (3, min(toy.get_submodule(path).weight.flatten(1).shape))
        assert not torch.allclose(trained[path].similarity, unmerged[path].similarity)


def test_parts_of_a_fused_layer():
    torch.manual_seed(0)
    model = nn.ModuleDict({"qkv": nn.Linear(6, 12)})
    inject(model, "qkv[q,v]", LoRA(2, 8))
    perturb(model)
    layer = model["qkv"]
    expected = intruder_dimensions(layer.base.weight, layer(torch.eye(6)).T - layer.base.bias[:, None])
    found = layer_intruders(model, model, "qkv")["qkv"]
    torch.testing.assert_close(found.similarity, expected.similarity, atol=1e-3, rtol=0)
    assert found.similarity.diagonal().min() < 0.9


def test_what_has_no_weight_and_what_does_not_fit():
    toy = make_toy()
    inject(toy, "mlp.0", GatedLoRA(2, 4, gate_rank=1))
    with pytest.raises(AdapterError, match=r"'mlp\.0' depends on the input"):
        layer_intruders(toy, toy, "mlp.0")
    with pytest.raises(AdapterError, match=r"\(2, 3\) and \(3, 2\)"):
        intruder_dimensions(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(AdapterError, match="two axes"):
        intruder_dimensions(torch.ones(2), torch.ones(2))


def test_effective_rank():
    basis = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    assert effective_rank(basis[:, :5]) == pytest.approx(5)
    assert effective_rank(torch.outer(torch.arange(3.0), torch.arange(4.0))) == pytest.approx(1, abs=1e-3)
    quarter = basis @ torch.diag(torch.tensor([3.0, 1, 0, 0, 0, 0, 0], dtype=torch.float64))
    assert effective_rank(quarter) == pytest.approx(4 / 3**0.75)
    assert effective_rank(torch.ones(2, 1, 3, 3)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.zeros(3, 2)) == 0
    assert effective_rank(basis.to(torch.bfloat16)) == pytest.approx(7, rel=0.01)


def test_representation_alignment():
    torch.manual_seed(0)
    before, after = torch.randn(6, 4), torch.randn(6, 2, 5)
    assert representation_alignment(before, before) == pytest.approx(1)
    turned = 3 * before @ torch.linalg.qr(torch.randn(4, 4)).Q
    assert representation_alignment(before, turned) == pytest.approx(1, abs=1e-5)
    old = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in before.tolist()] for x in before.tolist()]
    flat = after.flatten(1).tolist()
    new = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in flat] for x in flat]
    cells = [(a, b) for one, other in zip(old, new, strict=True) for a, b in zip(one, other, strict=True)]
    expected = sum(a * b for a, b in cells) / math.sqrt(sum(a * a for a, _ in cells) * sum(b * b for _, b in cells))
    assert representation_alignment(before, after) == pytest.approx(expected, rel=1e-5)
    # representations of orthogonal groups of samples have nothing in common
    assert kernel_alignment(torch.diag(torch.tensor([1.0, 0])), torch.diag(torch.tensor([0.0, 1]))) == 0
    with pytest.raises(AdapterError, match="6 and 5 samples"):
        representation_alignment(before, after[:5])


def test_tangent_kernel_of_a_linear_model_is_its_inputs():
    model = nn.Linear(4, 3).eval()
    x = torch.randn(5, 4)
    torch.testing.assert_close(tangent_kernel(model, x), 3 * (x @ x.T + 1))
    model.bias.requires_grad_(False)
    torch.testing.assert_close(tangent_kernel(model, x), 3 * x @ x.T)


def test_tangent_kernel_of_adapters_in_a_vit():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=3).eval()
    inject(model, ["attn.qkv", "fc1"], LoRA(2, 4), train="head")
    start = copy.deepcopy(model)
    perturb(model)
    x = torch.randn(3, 3, 16, 16)
    trained = [p for p in model.parameters() if p.requires_grad]
    slopes = [
        [torch.cat([g.flatten() for g in torch.autograd.grad(model(x[i : i + 1])[0, c], trained)]) for c in range(3)]
        for i in range(3)
    ]
    expected = torch.tensor([[sum(float(a @ b) for a, b in zip(i, j, strict=True)) for j in slopes] for i in slopes])
    torch.testing.assert_close(tangent_kernel(model, x), expected, rtol=1e-3, atol=1e-3)
    assert not any(p.grad is not None for p in model.parameters())
    assert tangent_kernel_alignment(start, start, x) == pytest.approx(1)
    assert tangent_kernel_alignment(start, model, x) < 0.999


def test_a_frozen_or_training_model_has_no_tangent_kernel():
    toy = make_toy()
    with pytest.raises(AdapterError, match="eval"):
        tangent_kernel(toy.train(), VOLUME)
    toy.eval().requires_grad_(False)
    with pytest.raises(AdapterError, match="frozen"):
        tangent_kernel(toy, VOLUME)
