"""Queries, keys and values of fused layers, each with an adapter of its own, against layers taken apart."""

import copy
import json

import peft
import pytest
import timm
import torch
from adapter_zoo import perturb
from timm.layers import Attention
from torch import nn
from torch._dynamo.testing import CompileCounter

from vision_lowrank import adapters
from vision_lowrank.adapters import GatedLoRA, Hydra, LoRA, LoRAXS, export_lora, inject, load_adapter, save_adapter
from vision_lowrank.adapters.slices import Sliced
from vision_lowrank.errors import AdapterError


class Apart(nn.Module):
    """Attention of timm with a linear layer for each of queries, keys and values."""

    def __init__(self, fused):
        super().__init__()
        dim, self.heads = fused.qkv.in_features, fused.num_heads
        self.q, self.k, self.v = (nn.Linear(dim, dim).double() for _ in range(3))
        for i, layer in enumerate((self.q, self.k, self.v)):
            layer.weight.data = fused.qkv.weight.data[i * dim : (i + 1) * dim].clone()
            layer.bias.data = fused.qkv.bias.data[i * dim : (i + 1) * dim].clone()
        self.proj = copy.deepcopy(fused.proj)

    def forward(self, x):
        q, k, v = (m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("method", [LoRA(2, 6), GatedLoRA(2, 4, gate_rank=1), Hydra(2, 0.5)], ids=str)
def test_parts_are_the_layers_of_attention_taken_apart(method):
    torch.manual_seed(0)
    fused = Attention(8, num_heads=2, qkv_bias=True).double().eval()
    apart, x = Apart(fused), torch.randn(2, 5, 8).double()
    torch.testing.assert_close(apart(x), fused(x))
    inject(apart, ["q", "v"], method)
    perturb(apart)
    keys = set(fused.state_dict())
    assert inject(fused, "qkv[v,q]", method) == ["qkv"]
    parts = fused.qkv.adapters["default"].parts
    assert list(parts) == ["q", "v"]
    for part in parts:
        parts[part].load_state_dict(getattr(apart, part).adapters["default"].state_dict())
    torch.testing.assert_close(fused(x), apart(x), atol=1e-12, rtol=1e-12)
    adapters.set_strength(fused, 0.3)
    adapters.set_strength(apart, 0.3)
    torch.testing.assert_close(fused(x), apart(x), atol=1e-12, rtol=1e-12)
    if not isinstance(method, GatedLoRA):
        adapters.merge(fused)
        torch.testing.assert_close(fused(x), apart(x), atol=1e-12, rtol=1e-12)
        adapters.unmerge(fused)
    assert adapters.count_parameters(fused).adapter == adapters.count_parameters(apart).adapter
    (fused(x).sin().sum() + apart(x).sin().sum()).backward()
    for part in parts:
        for one, other in zip(parts[part].parameters(), getattr(apart, part).adapters.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    adapters.remove(fused)
    assert set(fused.state_dict()) == keys


def test_each_part_starts_from_the_gradient_of_its_rows():
    torch.manual_seed(0)
    fused, x = Attention(8, num_heads=2).double().eval(), torch.randn(2, 5, 8).double()
    before = fused.qkv.weight.detach().clone()
    (gradient,) = torch.autograd.grad(fused(x).sin().sum(), fused.qkv.weight)
    adapters.lora_sb_gradients(fused, "qkv[q,v]", (fused(x).sin().sum() for _ in range(2)))
    inject(fused, "qkv[q,v]", LoRAXS(3, 6, "gradient", 0.01))
    expected = torch.zeros(24, 8).double()
    for rows in (slice(0, 8), slice(16, 24)):
        u, values, vh = torch.linalg.svd(-0.01 * gradient[rows].sign())
        expected[rows] = u[:, :3] * values[:3] @ vh[:3]
    adapters.merge(fused)
    torch.testing.assert_close(fused.qkv.base.weight - before, expected)


def make_vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=3
    ).eval()


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def test_files_and_what_peft_computes(tmp_path):
    base = make_vit()
    ours = copy.deepcopy(base)
    inject(ours, "attn.qkv[q,v]", LoRA(2, 6, rslora=True), train="head")
    inject(ours, ["fc1", "attn.proj"], LoRA(3, 6))
    perturb(ours)
    expected = ours(IMAGES)
    save_adapter(ours, tmp_path / "own")
    again = copy.deepcopy(base)
    assert load_adapter(again, tmp_path / "own")[0] == "blocks.0.attn.qkv"
    assert torch.equal(again(IMAGES), expected)
    assert again.blocks[0].attn.qkv.methods == {"default": Sliced(LoRA(2, 6, rslora=True), "qv", "qkv")}

    export_lora(ours, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft").eval()
    torch.testing.assert_close(theirs(IMAGES), expected)
    layer = theirs.base_model.model.blocks[1].attn.qkv
    assert layer.r["default"] == 4
    change = layer.get_delta_weight("default")
    assert not change[24:48].any()
    assert torch.linalg.matrix_rank(change) == 4
    assert torch.linalg.matrix_rank(change[:24]) == torch.linalg.matrix_rank(change[48:]) == 2
    whole = copy.deepcopy(base)
    load_adapter(whole, tmp_path / "peft")
    torch.testing.assert_close(whole(IMAGES), expected)


def test_damaged_slice_is_refused(tmp_path):
    base = make_vit()
    ours = copy.deepcopy(base)
    inject(ours, "attn.qkv[k]", LoRA(2, 6))
    save_adapter(ours, tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for part, message in (({"parts": "x", "order": "qkv"}, "parts 'x'"), ({"rows": 3}, "do not belong to adapter")):
        config["layers"]["blocks.0.attn.qkv"]["slice"] = part
        path.write_text(json.dumps(config))
        with pytest.raises(AdapterError, match=message):
            load_adapter(base, tmp_path)


def test_targets_add_up_and_names_are_independent():
    model = make_vit()
    inject(model, ["blocks.*.attn.qkv[k]", "blocks.0.attn.qkv[q]"], LoRA(1, 1))
    assert [list(block.attn.qkv.adapters["default"].parts) for block in model.blocks] == [["q", "k"], ["k"]]
    inject(model, "qkv", LoRA(1, 1), name="whole")
    perturb(model)
    expected = model(IMAGES)
    with pytest.raises(AdapterError, match="has an adapter 'default' already"):
        inject(model, "qkv[v]", LoRA(1, 1))
    adapters.merge(model)
    torch.testing.assert_close(model(IMAGES), expected, atol=1e-5, rtol=1e-5)


def test_values_of_a_kv_layer():
    model = nn.ModuleDict({"kv": nn.Linear(3, 8)})
    inject(model, "kv[v]", LoRA(1, 1))
    perturb(model)
    change, bias = model["kv"].adapters["default"].delta(model["kv"].base)
    assert not change[:4].any()
    assert change[4:].any()
    assert not bias.any()


@pytest.mark.parametrize(
    ("attributes", "layer", "message"),
    [
        ({"head_first": True}, nn.Linear(4, 12), "head by head"),
        ({"key_dim": 2}, nn.Linear(4, 12), "head by head"),
        ({"num_heads": 2, "head_dim": 3}, nn.Linear(6, 12), "not 3 parts of 2 heads of 3"),
        ({}, nn.Linear(4, 10), "10 rows are not 3 equal parts"),
        ({}, nn.Conv2d(4, 12, 1), "only the rows of linear layers"),
    ],
)
def test_layers_fused_otherwise_are_refused(attributes, layer, message):
    owner = nn.Module()
    owner.qkv = layer
    for key, value in attributes.items():
        setattr(owner, key, value)
    with pytest.raises(AdapterError, match=message):
        inject(owner, "qkv[q]", LoRA(1, 1))
    inject(owner, "qkv", LoRA(1, 1))


@pytest.mark.parametrize("name", ["tiny_vit_5m_224", "maxvit_rmlp_pico_rw_256"])
def test_models_of_timm_with_rows_by_head_are_refused(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(AdapterError, match="head by head"):
        inject(model, "*.qkv[q]", LoRA(1, 1))


def test_compile_without_graph_breaks():
    torch.manual_seed(0)
    model = Attention(8, num_heads=2, qkv_bias=True).eval()
    inject(model, "qkv[q,v]", Hydra(1, 1.0))
    inject(model, "qkv", LoRA(1, 1), name="whole")
    perturb(model)
    x = torch.randn(2, 5, 8)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for strength in (1.0, 0.25):
        adapters.set_strength(model, strength)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1
