"""Methods that come from peft by name: each against its formula, on a small ViT and on convolutions; refusals."""

import copy
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import timm
import torch
import torchvision
from adapter_zoo import perturb
from safetensors.torch import load_file, save_file
from torch import nn

from vision_lowrank import adapters
from vision_lowrank.adapters.peft_methods import PEFT_METHODS, inject_peft, load_peft
from vision_lowrank.errors import AdapterError

RANK = 4
TARGETS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(3))

LORA_LIKE = ["lora", "rslora", "dora", "pissa", "olora", "eva", "orthogonal"]
REWRITES_BASE = {"pissa", "olora"}
EQUAL_TO_ROUNDING = {*REWRITES_BASE, "orthogonal"}


def make_vit(**settings):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = timm.models.vision_transformer.VisionTransformer(**sizes, **settings).eval()
    nn.init.normal_(model.head.weight, std=0.2)
    return model


def adapt(name, model=None, targets=TARGETS, rank=RANK, **settings):
    return inject_peft(model or make_vit(), name, targets, rank=rank, inputs=[IMAGES], **settings)


def shapes(targets=TARGETS):
    """Outputs and inputs of the targeted layers."""
    model = make_vit()
    return [tuple(model.get_submodule(path).weight.shape) for path in adapters.targets.find_targets(model, targets)]


def balanced(number):
    """The two factors of a number nearest to its root, the smaller one first."""
    small = max(divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0)
    return small, number // small


def count_lokr(m, n, r):
    (m1, m2), (n1, n2) = balanced(m), balanced(n)
    return m1 * n1 + (r * (m2 + n2) if r < max(m2, n2) / 2 else m2 * n2)


COUNTS = dict.fromkeys(["lora", "rslora", "pissa", "olora", "orthogonal", "hira"], lambda m, n, r: r * (m + n)) | {
    "dora": lambda m, n, r: r * (m + n) + m,
    "randlora": lambda m, n, r: math.ceil(min(m, n) / r) * (r + min(m, n)),
    "vera": lambda m, n, r: r + m,
    "miss": lambda m, n, r: r * m,
    "bat": lambda m, n, r: r * m,
    "loha": lambda m, n, r: 2 * r * (m + n),
    "lokr": count_lokr,
}


def low_rank(layer, scale):
    return layer.base_layer.weight + scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight


def dora(layer, scale):
    direction = low_rank(layer, scale)
    length = layer.lora_magnitude_vector["default"].weight
    return length[:, None] * direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True)


def randlora(layer, scale):
    """Sum over j of B_j L_j A G_j; peft numbers the random columns of B by (rank, base), not by (base, rank)."""
    weight = layer.base_layer.weight
    small, large = sorted(weight.shape)
    bases, rank = math.ceil(small / RANK), RANK
    up = layer.randlora_B["default"][:large, :bases].reshape(large, rank, bases)
    down = layer.randlora_A["default"][:, 0, :small]
    inner, outer = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    delta = sum(up[:, :, j] @ torch.diag(inner[:, j]) @ down @ torch.diag(outer[j]) for j in range(bases))
    return weight + scale * (delta if weight.shape[0] >= weight.shape[1] else delta.T)


def vera(layer, scale):
    m, n = layer.base_layer.weight.shape
    up, down = layer.vera_B["default"][:m, :RANK], layer.vera_A["default"][:RANK, :n]
    left, right = torch.diag(layer.vera_lambda_b["default"]), torch.diag(layer.vera_lambda_d["default"])
    return layer.base_layer.weight + left @ up @ right @ down


def miss(layer, scale):
    weight = layer.base_layer.weight
    return weight + torch.cat([layer.miss_block["default"].T] * (weight.shape[1] // RANK), dim=1)


def bat(layer, scale):
    weight = layer.base_layer.weight.clone()
    for i, block in enumerate(layer.miss_block["default"]):
        rows = slice(i * RANK, (i + 1) * RANK)
        for j in range(0, weight.shape[1], RANK):
            weight[rows, j : j + RANK] += weight[rows, j : j + RANK].clone() @ block + block
    return weight


def loha(layer, scale):
    one = layer.hada_w1_a["default"] @ layer.hada_w1_b["default"]
    other = layer.hada_w2_a["default"] @ layer.hada_w2_b["default"]
    return layer.base_layer.weight + scale * one * other


def lokr(layer, scale):
    if "default" in layer.lokr_w2:
        right = layer.lokr_w2["default"]
    else:
        right = layer.lokr_w2_a["default"] @ layer.lokr_w2_b["default"]
    return layer.base_layer.weight + scale * torch.kron(layer.lokr_w1["default"], right)


def hira(layer, scale):
    return layer.base_layer.weight * (1 + layer.hira_B["default"] @ layer.hira_A["default"])


WEIGHTS = dict.fromkeys(LORA_LIKE, low_rank) | {
    "dora": dora,
    "randlora": randlora,
    "vera": vera,
    "miss": miss,
    "bat": bat,
    "loha": loha,
    "lokr": lokr,
    "hira": hira,
}


def test_the_tables_hold_every_method():
    assert set(PEFT_METHODS) == set(WEIGHTS) == {*COUNTS, "eva"}


@pytest.mark.parametrize("name", PEFT_METHODS)
def test_start_count_and_gradients(name):
    base = make_vit()
    model = adapt(name, copy.deepcopy(base), train="head").eval()
    difference = (model(IMAGES) - base(IMAGES)).abs().max().item()
    assert difference <= (1e-5 if name in EQUAL_TO_ROUNDING else 0)

    trainable = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    head = {key for key in trainable if ".head.modules_to_save." in key}
    assert sum(trainable[key].numel() for key in head) == 48 * 5 + 5
    count = sum(parameter.numel() for key, parameter in trainable.items() if key not in head)
    if name == "eva":
        # ranks move between layers, their sum stays
        layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
        ranks = [layer.r["default"] for layer in layers]
        assert (sum(ranks), max(ranks) > RANK, max(ranks) <= 2 * RANK) == (8 * RANK, True, True)
        assert count == sum(
            rank * sum(layer.base_layer.weight.shape) for rank, layer in zip(ranks, layers, strict=True)
        )
    else:
        assert count == sum(COUNTS[name](m, n, RANK) for m, n in shapes())

    perturb(model)
    model(IMAGES).square().mean().backward()
    assert {key for key, parameter in model.named_parameters() if parameter.grad is not None} == set(trainable)
    assert all(parameter.grad.abs().max() > 0 for parameter in trainable.values())


@pytest.mark.parametrize("name", PEFT_METHODS)
def test_merged_weights_are_the_formula(name):
    settings = {"alpha": 6.0} if "alpha" in PEFT_METHODS[name].settings else {}
    model = spread(adapt(name, **settings)).double()
    scale = 6 / math.sqrt(RANK) if name == "rslora" else 6 / RANK
    tuned = {path: module for path, module in model.named_modules() if hasattr(module, "base_layer")}
    expected = {}
    for path, layer in tuned.items():
        # eva changes rank and alpha together
        expected[path.removeprefix("base_model.model.")] = WEIGHTS[name](layer, scale).detach()
    outputs = model(IMAGES.double())
    merged = model.merge_and_unload()
    assert len(expected) == (len(shapes()) if name != "eva" else len(tuned))
    for path, weight in expected.items():
        torch.testing.assert_close(merged.get_submodule(path).weight.detach(), weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(merged(IMAGES.double()), outputs, rtol=0, atol=1e-10)


def spread(model):
    """Moves every trainable value by N(0, 0.02^2), as in the specification's table of merge errors."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("name", PEFT_METHODS)
def test_merge_in_single_precision(name):
    base = make_vit()
    model = spread(adapt(name, copy.deepcopy(base), train="head"))
    before = model(IMAGES)
    assert (before - base(IMAGES)).abs().max() > 1e-3
    model.merge_adapter()
    merged = model(IMAGES)
    model.unmerge_adapter()
    bound = 2e-5 if name == "randlora" else 5e-6
    assert (merged - before).abs().max() <= bound
    assert (model(IMAGES) - before).abs().max() <= bound


@pytest.mark.parametrize("name", PEFT_METHODS)
def test_folder_of_peft(name, tmp_path):
    base = make_vit()
    model = spread(adapt(name, copy.deepcopy(base), train="head"))
    expected = model(IMAGES)
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(again(IMAGES), expected, rtol=0, atol=1e-5 if name in REWRITES_BASE else 0)
    merged = load_peft(copy.deepcopy(base), tmp_path).eval()
    assert {path for path, _ in merged.named_modules()} == {path for path, _ in base.named_modules()}
    torch.testing.assert_close(merged(IMAGES), expected, rtol=0, atol=2e-5)
    # what is plain LoRA is read by our own core, the rest is refused there
    if name in LORA_LIKE and name not in {"dora", *REWRITES_BASE}:
        adapters.load_adapter(base, tmp_path)
        torch.testing.assert_close(base(IMAGES), expected, rtol=0, atol=1e-5)
    else:
        with pytest.raises(AdapterError, match=r"with peft|merge it there|from peft"):
            adapters.load_adapter(base, tmp_path)


def without(name):
    """Function that takes the entries out whose name holds this."""

    def change(folder):
        path = folder / "adapter_model.safetensors"
        save_file({key: value for key, value in load_file(path).items() if name not in key}, path)

    return change


def configured(**changes):
    """Function that changes the file of settings."""

    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def astray(folder):
    path = folder / "adapter_model.safetensors"
    save_file(
        {key: value * (math.nan if "0.attn.qkv.lora_B" in key else 1) for key, value in load_file(path).items()}, path
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("blocks.1.attn.proj.lora_B"), r"1 entries differ .*blocks\.1\.attn\.proj\.lora_B\.weight is missing"),
        (without("head.weight"), r"head\.weight is missing"),
        (configured(target_modules=["proj"]), r"entries differ .*is not of this model"),
        (configured(r=3), "no adapters of peft for this model"),
        (configured(r=10**13), r"rank 10000000000000 is above 192, the largest side of its tensors"),
        (configured(rank_pattern={"qkv": 10**13}), "rank 10000000000000 is above 192"),
        (configured(r="4"), "rank='4': give a whole number"),
        (configured(rank_pattern=["qkv"]), "no adapters of peft for this model"),
        (configured(target_modules="("), "no adapters of peft for this model"),
        (configured(lora_alpha=10**400), "no adapters of peft for this model"),
        (configured(lora_alpha=math.nan), r"with its adapters blocks\.0\.attn\.qkv\.weight is not finite"),
        (astray, r"with its adapters blocks\.0\.attn\.qkv\.weight is not finite"),
        (configured(peft_type="PROMPT_TUNING"), "no adapters of peft|which is none of"),
        (configured(use_dora=False, megatron_config={"a": 1}, megatron_core="this"), "its megatron_config has code"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "no adapters of peft for this model"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"0" * 40), "no adapters of peft for this"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapters of peft for this model"),
    ],
)
def test_folders_that_do_not_fit_are_refused(spoil, message, tmp_path):
    adapt("dora", train="head").save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(AdapterError, match=message):
        load_peft(make_vit(), tmp_path)


def test_a_folder_without_settings_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("peft.config.hf_hub_download", lambda *args, **kwargs: asked.append(args))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match=r"runs.last has no adapter_config\.json: give a folder"):
        load_peft(make_vit(), "runs/last")
    assert not asked


def test_start_values():
    weight = make_vit().blocks[1].attn.proj.weight.detach().double()
    u, s, vh = torch.linalg.svd(weight)
    leading = u[:, :RANK] * s[:RANK] @ vh[:RANK]
    q, r = torch.linalg.qr(weight)
    for name, product in (("pissa", leading), ("olora", q[:, :RANK] @ r[:RANK])):
        layer = adapt(name).base_model.model.blocks[1].attn.proj
        up, down = layer.lora_B["default"].weight.double(), layer.lora_A["default"].weight.double()
        torch.testing.assert_close(up @ down, product, rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.base_layer.weight.double(), weight - product, rtol=0, atol=1e-6)
    layer = adapt("orthogonal").base_model.model.blocks[1].attn.proj
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    assert min(up.abs().max(), down.abs().max()) > 0.01
    assert (up @ down).abs().max() < 1e-6


def test_eva_starts_at_principal_components():
    base = make_vit()
    seen = []
    with base.blocks[0].mlp.fc1.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        base(IMAGES)
    rows = seen[0].detach().flatten(0, 1)
    components = torch.linalg.svd(rows - rows.mean(0)).Vh
    model = adapt("eva", base)
    found = model.base_model.model.blocks[0].mlp.fc1.lora_A["default"].weight
    assert len(found) >= 2
    similarity = (found @ components.T).abs()
    torch.testing.assert_close(similarity[:2, :2], torch.eye(2), rtol=0, atol=0.02)


def test_default_scale():
    assert adapt("lora").base_model.model.blocks[0].attn.qkv.scaling == {"default": 1.0}
    assert adapt("randlora").base_model.model.blocks[0].attn.qkv.scaling == {"default": 20.0}
    assert adapt("lora", alpha=2).base_model.model.blocks[0].attn.qkv.scaling == {"default": 0.5}


def test_seed_dropout_and_factor():
    bases = [adapt("randlora", seed=seed).base_model.randlora_B["default"] for seed in (1, 1, 2)]
    assert torch.equal(bases[0], bases[1])
    assert not torch.equal(bases[0], bases[2])
    for name in ("lora", "randlora", "vera", "miss", "hira"):
        model = spread(adapt(name, dropout=0.5))
        assert torch.equal(model(IMAGES), model(IMAGES))
        model.train()
        assert not torch.equal(model(IMAGES), model(IMAGES))
    assert adapt("lokr", factor=2).base_model.model.blocks[0].attn.qkv.lokr_w1["default"].shape == (2, 2)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept(training):
    for name in ("lora", "eva"):
        model = adapt(name, make_vit(proj_drop_rate=0.1).train(training), dropout=0.1)
        assert {module.training for module in model.modules()} == {training}


def names_of(model):
    return [path.removeprefix("base_model.model.") for path, m in model.named_modules() if hasattr(m, "base_layer")]


def test_targets_are_ours():
    assert names_of(adapt("miss", targets="attn.proj")) == ["blocks.0.attn.proj", "blocks.1.attn.proj"]
    assert names_of(adapt("vera", targets=re.compile(r"blocks\.1\.mlp\..*"))) == [
        "blocks.1.mlp.fc1",
        "blocks.1.mlp.fc2",
    ]
    assert names_of(adapt("lora", targets="patch_embed.proj")) == ["patch_embed.proj"]
    # the whole name, although another name ends in it
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(8, 8))
    model.add_module("inner", nn.Sequential())
    model.inner.add_module("fc", nn.Linear(8, 8))
    assert names_of(adapt("hira", model, targets=lambda path, layer: path == "fc")) == ["fc"]


def test_several_inputs_for_eva():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x, y):
            return self.fc(x.transpose(1, 2) + y)

    batch = [torch.randn(3, 8, 7), torch.randn(3, 7, 8)]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch), batch_size=3)
    model = inject_peft(Sum(), "eva", "fc", rank=2, inputs=loader)
    assert not any(parameter.is_meta for parameter in model.parameters())
    model(*batch).sum().backward()
    assert model.base_model.model.fc.lora_B["default"].weight.grad.abs().max() > 0


CONVOLUTIONS = {
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 2), padding="same", bias=False), (2, 6, 5, 5)),
    "conv2d 1x1": (lambda: nn.Conv2d(6, 8, 1, stride=2), (2, 6, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(6, 8, (3, 1, 2), stride=(1, 2, 1), padding=1), (2, 6, 4, 5, 5)),
    "dilation": (lambda: nn.Conv2d(6, 8, 3, padding=2, dilation=2), (2, 6, 7, 7)),
    "groups": (lambda: nn.Conv2d(6, 8, 3, groups=2), (2, 6, 5, 5)),
    "padding_mode": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (2, 6, 5, 5)),
    "kernel": (lambda: nn.Conv3d(6, 8, (1, 1, 3)), (2, 6, 3, 3, 4)),
}
PLAIN = {"conv1d", "conv2d", "conv2d 1x1"}
TAKES = {
    **dict.fromkeys(["lora", "rslora", "dora"], PLAIN | {"conv3d"}),
    "hira": PLAIN | {"conv3d", "dilation"},
    **dict.fromkeys(["loha", "lokr"], PLAIN | {"dilation", "groups"}),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("name", PEFT_METHODS)
def test_convolutions(name, case):
    make, shape = CONVOLUTIONS[case]
    torch.manual_seed(4)
    base, x = nn.Sequential(make(), nn.Flatten(2)).double().eval(), torch.randn(shape).double()
    if case not in TAKES.get(name, ()):
        with pytest.raises(AdapterError, match=f"'0' (is a Conv|has {case}|has the {case}).* adapters.inject"):
            inject_peft(base, name, "0", rank=2)
        assert all(parameter.requires_grad for parameter in base.parameters())
        return
    model = inject_peft(copy.deepcopy(base), name, "0", rank=2)
    torch.testing.assert_close(model(x), base(x), rtol=0, atol=1e-12)
    perturb(model.double())
    expected = model(x)
    assert (expected - base(x)).abs().max() > 1e-2
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=0, atol=1e-6)


def two_heads():
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(8, 8))
    model.add_module("head", nn.Linear(8, 2))
    model.add_module("aux_head", nn.Linear(2, 2))
    return model


def attention():
    return nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2)})


def with_zeros(rows):
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.data[:rows] = 0
    return model


REFUSED = [
    (make_vit, "randlor", {}, "near names: randlora"),
    (make_vit, "???", {}, "near names: lora, rslora"),
    (make_vit, "miss", {"alpha": 8}, "miss has no setting 'alpha'; it has rank, dropout"),
    (make_vit, "lora", {"rnk": 8}, "lora has no setting 'rnk'"),
    (make_vit, "lora", {"rank": 0}, "rank=0"),
    (make_vit, "vera", {"rank": 2.0}, "rank=2.0"),
    (make_vit, "lora", {"alpha": math.nan}, "alpha=nan"),
    (make_vit, "hira", {"dropout": 1.0}, "dropout=1.0"),
    (make_vit, "lokr", {"factor": 0}, "factor=0"),
    (make_vit, "pissa", {"rank": 49}, r"rank=49 .*'blocks.0.attn.qkv'.* smaller side"),
    (make_vit, "olora", {"rank": 49}, "smaller side"),
    (make_vit, "orthogonal", {"rank": 3}, "even"),
    (make_vit, "miss", {"rank": 49}, "at most the inputs"),
    (make_vit, "bat", {"rank": 32}, "a divisor"),
    (make_vit, "eva", {"rank": 25}, "at most half the inputs"),
    (make_vit, "eva", {"inputs": ()}, "give batches as inputs"),
    (make_vit, "eva", {"inputs": iter([IMAGES])}, "in a list or a DataLoader"),
    (make_vit, "eva", {"inputs": [IMAGES[:1]], "rank": 12}, "brings 17 rows to layer 'blocks.0.attn.qkv'.* needs 24"),
    (make_vit, "lora", {"targets": "query"}, "matches no layer"),
    (make_vit, "lora", {"targets": "attn.qkv[q,v]"}, "leave out the brackets"),
    (make_vit, "lora", {"targets": "proj"}, "linear layers .* and convolutions"),
    (make_vit, "lora", {"train": "classifier"}, "no module to train"),
    (make_vit, "lora", {"targets": ["head", "qkv"], "train": "head"}, "leave out the target 'head'"),
    (two_heads, "lora", {"targets": "fc", "train": "head"}, "would train 'aux_head' with 'head'"),
    (attention, "lora", {"targets": "out_proj"}, "reads its weight without calling it"),
    (lambda: with_zeros(1), "dora", {"targets": "0"}, "'0' has rows of zeros, by whose norm dora would divide"),
    (lambda: with_zeros(8), "pissa", {"targets": "0"}, "weight of layer '0' is zero, and pissa of it could not learn"),
    (lambda: make_vit().double(), "pissa", {}, "'blocks.0.attn.qkv' is torch.float64, and pissa of peft.*model.float"),
    (lambda: make_vit().double(), "olora", {}, "'blocks.0.attn.qkv' is torch.float64, and olora of peft.*model.float"),
    (attention, "lora", {"targets": "mha"}, "a MultiheadAttention; adapters are for"),
]


@pytest.mark.parametrize(("make", "name", "settings", "message"), REFUSED)
def test_refusals(make, name, settings, message):
    model = make().train()
    before = copy.deepcopy(model.state_dict())
    chosen = {"targets": "attn.qkv", "rank": RANK, "inputs": [IMAGES], **settings}
    with pytest.raises(AdapterError, match=message):
        inject_peft(model, name, chosen.pop("targets"), **chosen)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def make_beit(**settings):
    return timm.models.beit.Beit(
        img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3, **settings
    )


def make_eva(**settings):
    return timm.models.eva.Eva(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3, **settings)


def make_swin_v2():
    return timm.models.swin_transformer_v2.SwinTransformerV2(
        img_size=16, patch_size=4, window_size=4, embed_dim=16, depths=(1,), num_heads=(2,), num_classes=3
    )


def make_torchvision_swin():
    return torchvision.models.swin_transformer.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=3)


def separate(model):
    model.blocks[0].attn.qkv_bias_separate = True
    return model


@pytest.mark.parametrize(
    ("make", "target", "owner"),
    [
        (make_beit, "attn.qkv", "Attention"),
        (make_eva, "attn.qkv", "EvaAttention"),
        (make_swin_v2, "attn.qkv", "WindowAttention"),
        (make_torchvision_swin, "attn.qkv", "ShiftedWindowAttention"),
        (make_torchvision_swin, "attn.proj", "ShiftedWindowAttention"),
    ],
)
def test_layers_whose_weight_is_read_are_refused(make, target, owner):
    with pytest.raises(AdapterError, match=f"{target}' belongs to a {owner}, whose forward reads its weight.*leave"):
        inject_peft(make(), "lora", target, rank=2)


class Casts(nn.Module):
    """Looks at the type of a weight and calls its layer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(768, 3)

    def forward(self, x):
        return self.fc(x.flatten(1).to(self.fc.weight.dtype))


# typed in, as in a shell: there is no source to look at
TYPED = {"Casts": Casts}
exec("class Typed(Casts):\n    def forward(self, x):\n        return self.fc(x.flatten(1))", TYPED)


@pytest.mark.parametrize(
    ("make", "target"),
    [
        (make_beit, "attn.proj"),
        (lambda: make_beit(qkv_bias=False), "attn.qkv"),
        (lambda: separate(make_beit()), "attn.qkv"),
        (lambda: make_eva(qkv_bias=False), "attn.qkv"),
        (Casts, "fc"),
        (TYPED["Typed"], "fc"),
    ],
)
def test_layers_that_are_called_are_taken(make, target):
    torch.manual_seed(0)
    model = inject_peft(make(), "lora", target, rank=2)
    model(IMAGES).square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters() if "lora_B" in key}
    assert len(gradients) == 1
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_one_kind_of_adapters_a_model():
    ours = make_vit()
    adapters.inject(ours, "attn.qkv", adapters.LoRA(2, 2))
    with pytest.raises(AdapterError, match="has adapters already"):
        adapt("lora", ours, targets="mlp.fc1")
    theirs = adapt("lora", targets="attn.qkv")
    with pytest.raises(AdapterError, match="has adapters already"):
        adapt("miss", theirs, targets="mlp.fc1")


def test_method_that_an_old_peft_lacks(monkeypatch):
    monkeypatch.delattr(peft, "HiraConfig")
    with pytest.raises(AdapterError, match="has no HiraConfig, which hira needs"):
        adapt("hira")


def test_guide(monkeypatch, tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in PEFT_METHODS)
    small = '"vit_tiny_patch16_224", img_size=32, depth=1'
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = "\n".join(blocks).replace('"vit_small_patch16_224", pretrained=True', small)
    assert code.count(small) == 1
    monkeypatch.chdir(tmp_path)
    scope = {"loader": [(torch.randn(2, 3, 32, 32), torch.tensor([1, 7]))]}
    exec(code, scope)
    assert isinstance(scope["model"], timm.models.VisionTransformer)
    assert (tmp_path / "flowers" / "adapter_model.safetensors").is_file()


def test_import_is_light():
    code = "import sys, vision_lowrank.adapters.peft_methods; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
