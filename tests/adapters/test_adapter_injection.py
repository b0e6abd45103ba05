"""Which layers a target means, what is refused, and that a refusal leaves the model as it was."""

import re

import peft
import pytest
import timm
import torch
from adapter_zoo import VOLUME, make_toy, perturb
from torch import nn
from torch.nn.utils import parametrizations

from vision_lowrank import adapters
from vision_lowrank.adapters import AdaptedLayer, LoRA, inject
from vision_lowrank.adapters.peft_methods import inject_peft
from vision_lowrank.errors import AdapterError


@pytest.fixture
def toy():
    return make_toy()


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval()


def adapted(model):
    return [path for path, module in model.named_modules() if isinstance(module, AdaptedLayer)]


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        ("attn.qkv", ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]),
        ("attn.proj", ["blocks.0.attn.proj", "blocks.1.attn.proj"]),
        ("patch_embed.proj", ["patch_embed.proj"]),
        ("blocks.1.mlp.fc1", ["blocks.1.mlp.fc1"]),
        (["fc2", "fc1"], ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]),
        ("*.proj", ["patch_embed.proj", "blocks.0.attn.proj", "blocks.1.attn.proj"]),
        ("blocks.1.*", [f"blocks.1.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]),
        (
            re.compile(r"blocks\.\d\.attn\.(qkv|proj)"),
            [f"blocks.{i}.attn.{n}" for i in (0, 1) for n in ("qkv", "proj")],
        ),
        (lambda path, layer: isinstance(layer, nn.Conv2d), ["patch_embed.proj"]),
        (lambda path, layer: getattr(layer, "out_features", 0) == 5, ["head"]),
    ],
)
def test_targets(vit, targets, paths):
    assert inject(vit, targets, LoRA(2, 4)) == paths
    assert adapted(vit) == paths


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            "proj",
            r"'proj' matches linear layers \('blocks.0.attn.proj', 2 in all\) and convolutions \('patch_embed.proj'",
        ),
        ("query", r"'query' matches no layer; n.*\bqkv\b"),
        ("atn.qkv", r"near names: attn.qkv"),
        ("roj", "matches no layer"),
        ("norm1", "matches 'blocks.0.norm1', a LayerNorm; adapters are for Linear"),
        (["attn.qkv", "fc3"], r"'fc3' matches no layer; near names: .*fc1"),
        (re.compile("qkv"), "matches no layer"),
        ("qkv[x]", "parts x of layer 'blocks.0.attn.qkv': parts are letters of the layer's name"),
        (
            "fc1[q]",
            "parts q of layer 'blocks.0.mlp.fc1': parts are letters of the layer's name, which is one of kv, qk",
        ),
        (["attn.qkv[q]", "blocks.1.attn.qkv"], "'blocks.1.attn.qkv' is targeted as a whole and in part"),
        (lambda path, layer: False, "matches no layer"),
    ],
)
def test_targets_refused(vit, targets, message):
    with pytest.raises(AdapterError, match=message):
        inject(vit, targets, LoRA(2, 4))
    assert adapted(vit) == []
    assert all(parameter.requires_grad for parameter in vit.parameters())


def test_plain_name_inside_and_outside_an_embedding_is_refused():
    model = nn.ModuleDict(
        {"patch_embed": nn.ModuleDict({"proj": nn.Linear(4, 4)}), "attn": nn.ModuleDict({"proj": nn.Linear(4, 4)})}
    )
    with pytest.raises(AdapterError, match=r"embedding \('patch_embed.proj', 1 in all\) and others \('attn.proj', 1"):
        inject(model, "proj", LoRA(1, 1))
    assert inject(model, "attn.proj", LoRA(1, 1)) == ["attn.proj"]
    assert inject(model, "*.proj", LoRA(1, 1), name="both") == ["patch_embed.proj", "attn.proj"]


def test_gradients_of_frozen_weights_are_dropped(toy):
    toy(VOLUME).sum().backward()
    inject(toy, "mlp.0", LoRA(1, 1), train="head")
    assert {name for name, p in toy.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(4, 4)
        self.decode = nn.Linear(4, 4)
        self.decode.weight = self.encode.weight


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("model", "target", "message"),
    [
        (nn.MultiheadAttention(4, 2), "out_proj", "MultiheadAttention, which reads its weight without calling it"),
        (nn.TransformerEncoderLayer(4, 2), "linear1", "TransformerEncoderLayer, which reads its weight"),
        (nn.TransformerEncoderLayer(4, 2), "self_attn", "a MultiheadAttention; adapters are for"),
        (nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))), "0", "computed from other tensors"),
        (Shared(), "decode", r"shared \(encode.weight, decode.weight\)"),
        (nn.Sequential(OwnForward(4, 4)), "0", "OwnForward, whose forward is not that of Linear"),
        (nn.Sequential(nn.ConvTranspose2d(4, 4, 1)), "0", "a ConvTranspose2d; adapters are for"),
        (nn.Sequential(nn.GELU()), "0.proj", "the model has no such layers"),
    ],
)
def test_layers_refused(model, target, message):
    with pytest.raises(AdapterError, match=message):
        inject(model, target, LoRA(2, 4))
    assert adapted(model) == []


def test_same_module_at_two_places_is_shared():
    layer = nn.Linear(4, 4)
    with pytest.raises(AdapterError, match="is shared"):
        inject(nn.Sequential(layer, layer), "0", LoRA(1, 1))


def test_layer_in_a_block_registered_twice_is_one_place():
    block = nn.Sequential(nn.Linear(4, 4))
    model = nn.ModuleDict({"encoder": nn.Sequential(block), "blocks": nn.ModuleList([block])})
    assert inject(model, "0.0", LoRA(1, 1)) == ["encoder.0.0"]
    perturb(model)
    x = torch.randn(2, 4)
    assert torch.equal(model["blocks"][0](x), model["encoder"](x))
    assert not torch.equal(model["encoder"](x), block[0].base(x))


def test_name_taken_and_bad_names(vit):
    inject(vit, "attn.qkv", LoRA(2, 4))
    with pytest.raises(AdapterError, match="has an adapter 'default' already"):
        inject(vit, ["fc1", "attn.qkv"], LoRA(2, 4))
    inject(vit, "attn.qkv", LoRA(2, 4), name="other")
    assert list(vit.blocks[0].attn.qkv.adapters) == ["default", "other"]
    for name in ("a.b", "", "keys", "training"):
        with pytest.raises(AdapterError, match="adapter name"):
            inject(vit, "fc1", LoRA(2, 4), name=name)
    adapters.merge(vit)
    with pytest.raises(AdapterError, match="is merged"):
        inject(vit, "attn.qkv", LoRA(2, 4), name="third")


def test_base_frozen_and_trained_modules_survive_a_second_injection(vit):
    inject(vit, "attn.qkv", LoRA(2, 4), train=("head", "blocks.*.norm1"))
    inject(vit, "fc1", LoRA(3, 6))
    trainable = {name for name, parameter in vit.named_parameters() if parameter.requires_grad}
    expected = {f"blocks.{i}.norm1.{p}" for i in (0, 1) for p in ("weight", "bias")} | {"head.weight", "head.bias"}
    for layer in ("attn.qkv", "mlp.fc1"):
        expected |= {f"blocks.{i}.{layer}.adapters.default.lora_{f}.weight" for i in (0, 1) for f in "AB"}
    assert trainable == expected


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("hed", "no module to train matches 'hed'; near names: head"),
        ("blocks.0", "'blocks.0' is to be trained as a whole"),
    ],
)
def test_modules_to_train_refused(vit, train, message):
    with pytest.raises(AdapterError, match=message):
        inject(vit, "attn.qkv", LoRA(2, 4), train=train)
    assert adapted(vit) == []


def test_counts_follow_the_formula(vit):
    total = sum(parameter.numel() for parameter in vit.parameters())
    inject(vit, ["attn.qkv", "attn.proj", "fc1", "fc2"], LoRA(8, 16), train="head")
    d = 192
    formula = 2 * 8 * ((d + 3 * d) + (d + d) + (d + 4 * d) + (4 * d + d))
    count = adapters.count_parameters(vit)
    assert (count.adapter, count.head, count.base) == (formula, 5 * d + 5, total - 5 * d - 5)
    assert count.total == total + formula
    assert count.trainable == formula + 5 * d + 5
    assert sum(parameter.numel() for parameter in adapters.adapter_parameters(vit)) == formula
    plain = adapters.count_parameters(nn.Linear(2, 3))
    assert (plain.base, plain.adapter, plain.head, plain.trainable) == (9, 0, 0, 9)


def test_adapter_parameters_of_one_name(vit):
    inject(vit, "fc1", LoRA(2, 4), name="a")
    inject(vit, "fc1", LoRA(3, 4), name="b")
    assert sum(p.numel() for p in adapters.adapter_parameters(vit, "a")) == 2 * 2 * 5 * 192
    with pytest.raises(AdapterError, match="no adapter 'c'; it has a, b"):
        adapters.adapter_parameters(vit, "c")
    with pytest.raises(AdapterError, match="has no adapters"):
        adapters.adapter_parameters(nn.Linear(2, 2))


def test_remove_one_and_all(vit):
    x = torch.randn(1, 3, 32, 32)
    before, keys = vit(x), set(vit.state_dict())
    inject(vit, "attn.qkv", LoRA(2, 4), name="a", train="head")
    with torch.no_grad():
        with_a = perturb(vit)(x)
    inject(vit, ["attn.qkv", "fc1"], LoRA(2, 4), name="b")
    adapters.remove(vit, "b")
    assert adapted(vit) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert torch.equal(vit(x), with_a)
    adapters.merge(vit)
    adapters.remove(vit)
    assert set(vit.state_dict()) == keys
    assert adapters.count_parameters(vit).head == 0
    timm_head = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval()
    timm_head.load_state_dict(vit.state_dict())
    assert not torch.equal(timm_head(x), before)  # the trained head stays
    with torch.no_grad():
        features = vit.forward_features(x)
    inject(vit, "fc1", LoRA(2, 4))
    assert torch.equal(vit.forward_features(x), features)


def test_freeze_statistics(toy):
    inject(toy, "mlp.0", LoRA(2, 4))
    toy.train()
    mean = toy.mix[1].running_mean.clone()
    adapters.freeze_statistics(toy)
    toy(VOLUME)
    assert torch.equal(toy.mix[1].running_mean, mean)
    toy.train()
    toy(VOLUME)
    assert not torch.equal(toy.mix[1].running_mean, mean)


def test_statistics_of_a_normalisation_without_parameters_go_with_what_is_around_it():
    model = nn.ModuleDict(
        {
            "body": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)),
            "head": nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2)),
        }
    )
    adapters.freeze_statistics(model.train())
    assert model["body"][1].training
    assert model["head"][0].training
    inject(model, "body.0", LoRA(2, 4), train="head")
    adapters.freeze_statistics(model.train())
    assert not model["body"][1].training
    assert model["head"][0].training


def test_a_container_to_train_is_the_modules_in_it_as_peft_wants(tmp_path):
    def make():
        torch.manual_seed(0)
        model = nn.Module()
        model.fc, model.pools = (
            nn.Linear(4, 4),
            nn.ModuleList([nn.Linear(4, 4), nn.GELU(), nn.ModuleList([nn.Linear(4, 4)])]),
        )
        model.encoder = nn.ModuleDict({"head": nn.Identity()})
        model.head = nn.Linear(4, 2)
        model.forward = lambda x: model.head(model.pools[2][0](model.pools[0](model.fc(x))))
        return model

    model = make()
    inject(model, "fc", LoRA(2, 4), train=["pools", "head"])
    assert adapters.injection.trained_modules(model) == ["pools.0", "pools.2.0", "head"]
    perturb(model)
    adapters.save_adapter(model, tmp_path)
    x = torch.randn(3, 4)
    # the empty encoder.head is nothing that peft could train
    assert torch.equal(peft.PeftModel.from_pretrained(make(), tmp_path)(x), model(x))
    trained = inject_peft(make(), "lora", "fc", rank=2, train=["pools", "head"])
    assert (
        sum(p.numel() for name, p in trained.named_parameters() if p.requires_grad and "lora" not in name)
        == 2 * 20 + 10
    )


def test_no_target_leaves_the_model_as_it_was(vit):
    with pytest.raises(AdapterError, match="no target"):
        inject(vit, [], LoRA(2, 4), train="head")
    inject(vit, "fc1", LoRA(2, 4))
    assert not vit.head.weight.requires_grad


def test_freeze_except_leaves_gradients_to_the_named_modules(vit):
    adapters.freeze_except(vit, ["head", "blocks.1.norm1"])
    trained = {name for name, parameter in vit.named_parameters() if parameter.requires_grad}
    assert trained == {"head.weight", "head.bias", "blocks.1.norm1.weight", "blocks.1.norm1.bias"}
    adapters.freeze_except(vit, ["head"])
    assert {name for name, parameter in vit.named_parameters() if parameter.requires_grad} == {
        "head.weight",
        "head.bias",
    }
    with pytest.raises(AdapterError, match="heads"):
        adapters.freeze_except(vit, ["heads"])
    # a refusal leaves the model as it was
    assert vit.head.weight.requires_grad
