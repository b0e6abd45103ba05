"""DyLoRA against dense layers with the truncated product written out, and its export to ordinary LoRA and peft."""

import copy

import peft
import pytest
import torch
from adapter_zoo import IMAGES, adapted_layer, perturb

from vision_lowrank import adapters
from vision_lowrank.adapters import DyLoRA, LoRA, inject, save_adapter
from vision_lowrank.adapters.dylora import sample_rank, truncate
from vision_lowrank.errors import AdapterError

KINDS = ["linear tokens, no bias", "conv2d", "conv2d groups", "conv3d"]


def nested(model, x, rank, scale):
    """Output of a dense layer whose weight holds the first `rank` of the factors."""
    adapter = model[0].adapters["default"]
    up, down = adapter.lora_B.weight.flatten(1), adapter.lora_A.weight.flatten(1)
    layer = copy.deepcopy(model[0].base)
    for i in range(rank):
        layer.weight.data += scale * torch.outer(up[:, i], down[i]).view(layer.weight.shape)
    return layer(x)


@pytest.mark.parametrize("kind", KINDS)
def test_each_rank_is_its_slice_at_scale_alpha_over_rank(kind):
    model, x = adapted_layer(kind, DyLoRA(4, 6))
    assert torch.equal(model(x), model[0].base(x))
    perturb(model)
    for rank in (1, 2, 3, 4):
        model.train()
        model[0].adapters["default"].sampled_rank = rank
        torch.testing.assert_close(model(x), nested(model, x, rank, 6 / rank), rtol=1e-10, atol=1e-10)
        model.eval()
        torch.testing.assert_close(model(x), nested(model, x, 4, 6 / 4), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_reach_the_ranks_in_use_or_only_the_last(kind, frozen):
    model, x = adapted_layer(kind, DyLoRA(4, 6, frozen=frozen))
    perturb(model).train()
    adapter = model[0].adapters["default"]
    adapter.sampled_rank = 3
    output = model(x)
    torch.testing.assert_close(output, nested(model, x, 3, 2.0), rtol=1e-10, atol=1e-10)
    output.square().sum().backward()
    down = adapter.lora_A.weight.grad.flatten(1).abs().amax(1) > 0
    up = adapter.lora_B.weight.grad.reshape(8, 4).abs().amax(0) > 0
    expected = [False, False, True, False] if frozen else [True, True, True, False]
    assert down.tolist() == up.tolist() == expected


def test_strength_is_linear_and_merging_restores_the_bits(vit):
    inject(vit, ["attn.qkv", "patch_embed.proj"], DyLoRA(4, 6))
    perturb(vit)
    layer, x = vit.blocks[0].attn.qkv.double(), torch.randn(2, 5, 16, dtype=torch.float64)
    base, full = layer.base(x), layer(x)
    adapters.set_strength(vit, 0.0)
    assert torch.equal(layer(x), base)
    adapters.set_strength(vit, -0.6)
    torch.testing.assert_close(layer(x), base - 0.6 * (full - base), rtol=1e-10, atol=1e-10)
    vit.float()
    unmerged, weight = vit(IMAGES), vit.patch_embed.proj.base.weight.clone()
    adapters.merge(vit)
    torch.testing.assert_close(vit(IMAGES), unmerged, rtol=1e-5, atol=1e-5)
    adapters.unmerge(vit)
    assert torch.equal(vit.patch_embed.proj.base.weight, weight)


def test_sampled_rank_is_one_for_the_model_and_uniform(vit):
    inject(vit, "attn.qkv", DyLoRA(4, 6))
    inject(vit, "fc1", DyLoRA(2, 6))
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for _ in range(2000):
        drawn.append(sample_rank(vit, generator))
        assert {block.attn.qkv.adapters["default"].sampled_rank for block in vit.blocks} == {drawn[-1]}
        assert vit.blocks[1].mlp.fc1.adapters["default"].sampled_rank == min(2, drawn[-1])
    counts = torch.bincount(torch.tensor(drawn), minlength=5)
    assert counts[0] == 0
    # five standard deviations of a binomial count
    assert (counts[1:] - 500).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5
    torch.manual_seed(5)
    first = [sample_rank(vit) for _ in range(20)]
    torch.manual_seed(5)
    assert [sample_rank(vit) for _ in range(20)] == first


def test_a_rank_sampled_for_training_is_not_that_of_evaluation_and_not_merged(vit):
    inject(vit, "fc1", DyLoRA(4, 6))
    perturb(vit)
    expected = vit(IMAGES)
    for block in vit.blocks:
        block.mlp.fc1.adapters["default"].sampled_rank = 1
    assert torch.equal(vit(IMAGES), expected)
    vit.train()
    assert not torch.allclose(vit(IMAGES), expected, atol=1e-3)
    assert adapters.folded_weight(vit.blocks[0].mlp.fc1) is None
    with pytest.raises(AdapterError, match="DyLoRA"):
        adapters.merge(vit)
    vit.eval()
    adapters.merge(vit)
    torch.testing.assert_close(vit(IMAGES), expected, rtol=1e-5, atol=1e-5)


def test_truncated_model_is_an_ordinary_lora_that_peft_reads(vit, tmp_path):
    plain = copy.deepcopy(vit)
    targets = ["attn.qkv", "fc2", "patch_embed.proj"]
    inject(vit, targets, DyLoRA(4, 6), train="head")
    assert adapters.count_parameters(vit).adapter == 4 * (2 * (16 + 48 + 64 + 16) + 3 * 64 + 16)
    perturb(vit).train()
    for layer in (vit.patch_embed.proj, *(block.attn.qkv for block in vit.blocks), *(b.mlp.fc2 for b in vit.blocks)):
        layer.adapters["default"].sampled_rank = 3
    expected = vit(IMAGES)
    adapters.set_strength(vit, 0.5)
    truncate(vit, 3)
    layer = vit.blocks[0].attn.qkv
    assert layer.methods == {"default": LoRA(3, 6)}
    assert type(layer.adapters["default"]).__name__ == "LoRAAdapter"
    assert layer.adapters["default"].strength == 0.5
    assert layer.adapters["default"].training
    adapters.set_strength(vit, 1.0)
    torch.testing.assert_close(vit(IMAGES), expected, rtol=1e-6, atol=1e-6)
    count = adapters.count_parameters(vit)
    assert count.adapter == 3 * (2 * (16 + 48 + 64 + 16) + 3 * 64 + 16)
    assert count.trainable == count.adapter + count.head
    save_adapter(vit, tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(theirs(IMAGES), expected, rtol=1e-6, atol=1e-6)


def test_only_the_named_dylora_is_truncated(vit):
    inject(vit, "fc1", DyLoRA(4, 6), name="a")
    inject(vit, "fc1", DyLoRA(3, 6), name="b")
    inject(vit, "fc2", LoRA(2, 4), name="a")
    truncate(vit, 2, "a")
    assert vit.blocks[1].mlp.fc1.methods == {"a": LoRA(2, 6), "b": DyLoRA(3, 6)}
    assert list(vit.blocks[1].mlp.fc1.adapters) == ["a", "b"]
    assert vit.blocks[1].mlp.fc2.methods == {"a": LoRA(2, 4)}
    with pytest.raises(AdapterError, match="no DyLoRA adapter named 'a'"):
        truncate(vit, 2, "a")


def test_refusals_leave_the_model_as_it_was(vit):
    with pytest.raises(AdapterError, match="no adapters"):
        sample_rank(vit)
    inject(vit, "fc1", DyLoRA(4, 6))
    inject(vit, "fc2", DyLoRA(2, 6))
    with pytest.raises(AdapterError, match=r"rank=3: adapter 'default' on layer 'blocks.0.mlp.fc2' has ranks up to 2"):
        truncate(vit, 3)
    with pytest.raises(AdapterError, match="rank=0"):
        truncate(vit, 0)
    adapters.merge(vit)
    with pytest.raises(AdapterError, match=r"is merged: call unmerge\(model\)"):
        truncate(vit, 2)
    adapters.unmerge(vit)
    assert vit.blocks[0].mlp.fc1.methods == {"default": DyLoRA(4, 6)}


def test_settings():
    assert DyLoRA(4, 6).scaling == 1.5
    with pytest.raises(AdapterError, match="rank=0"):
        DyLoRA(0, 6)
    with pytest.raises(AdapterError, match="alpha=inf"):
        DyLoRA(4, float("inf"))
