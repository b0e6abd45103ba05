"""LoLA-SpecViT and its layers against slow references that spell the definitions out."""

import copy
import math

import numpy as np
import pytest
import timm
import torch
from timm.models._manipulate import group_parameters
from torch import nn

from vision_lowrank.adapters import LoRA, count_parameters, inject, merge
from vision_lowrank.errors import ConfigError
from vision_lowrank.models import LolaSpecViT
from vision_lowrank.models.layers.spectral_stem import SpectralStem
from vision_lowrank.models.layers.window_attention import WindowAttention


def slow_convolution(x, weight, margin):
    """3D convolution of (channels, depth, height, width), padded by half the kernel in depth and `margin` in space."""
    out, _, depth, rows, columns = weight.shape
    x = np.pad(x, ((0, 0), (depth // 2, depth // 2), (margin, margin), (margin, margin)))
    shape = (out, x.shape[1] - depth + 1, x.shape[2] - rows + 1, x.shape[3] - columns + 1)
    y = np.zeros(shape)
    for d in range(shape[1]):
        for i in range(shape[2]):
            for j in range(shape[3]):
                window = x[:, d : d + depth, i : i + rows, j : j + columns]
                y[:, d, i, j] = (weight * window).sum(axis=(1, 2, 3, 4))
    return y


@pytest.mark.parametrize(("patch", "sides"), [(9, [7, 7]), (12, [10, 8]), (3, [3, 3])])
def test_stem_is_convolution_over_components_then_a_weight_for_each_component(patch, sides):
    torch.manual_seed(0)
    stem = SpectralStem(5, patch, channels=(2, 3), depths=(5, 3), dim=4).double().eval()
    for layer in stem.convolutions:
        if isinstance(layer, nn.BatchNorm3d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    # a marked array: patch side and number of components differ, so no axis can be taken for another
    x = torch.randn(2, 5, patch, patch, dtype=torch.float64)
    expected = []
    for sample in x.numpy():
        y = sample[None]
        side = patch
        for convolution, norm, target in zip(stem.convolutions[::3], stem.convolutions[1::3], sides, strict=True):
            y = slow_convolution(y, convolution.weight.detach().numpy(), (target - side + 2) // 2)
            side = target
            mean, variance = norm.running_mean.numpy(), norm.running_var.numpy()
            y = (y - mean[:, None, None, None]) / np.sqrt(variance + norm.eps)[:, None, None, None]
            y = y / (1 + np.exp(-y))
        weight = stem.collapse.weight.detach().numpy().reshape(4, 3, 5)
        collapsed = np.einsum("ocd,cdhw->ohw", weight, y) + stem.collapse.bias.detach().numpy()[:, None, None]
        expected.append(collapsed)
    assert stem.map_size == sides[-1]
    torch.testing.assert_close(stem(x), torch.from_numpy(np.stack(expected)), atol=1e-12, rtol=0)


def test_the_order_of_components_matters():
    # the original averages over depth after shared kernels: far from the borders it cannot tell the order
    torch.manual_seed(0)
    stem = SpectralStem(12, 7, channels=(4,), depths=(3,), dim=6).eval()
    x = torch.zeros(1, 12, 7, 7)
    x[:, 5] = 1
    moved = x.roll(1, dims=1)
    assert (stem(x) - stem(moved)).abs().max() > 0.01


def slow_window_attention(module, x):
    """One position after the other; keys are the real positions of the same window."""
    size, window, heads = x.shape[1], module.window_size, module.num_heads
    qkv = x @ module.qkv.weight.T + module.qkv.bias
    width = x.shape[-1] // heads
    mixed = torch.zeros_like(x)
    for b in range(len(x)):
        for i in range(size):
            for j in range(size):
                keys = [
                    (k, m)
                    for k in range(i // window * window, min(size, i // window * window + window))
                    for m in range(j // window * window, min(size, j // window * window + window))
                ]
                for h in range(heads):
                    part = slice(h * width, (h + 1) * width)
                    q, k, v = (qkv[..., part.start + n * x.shape[-1] : part.stop + n * x.shape[-1]] for n in range(3))
                    rows = [(i - a + window - 1) * (2 * window - 1) + j - c + window - 1 for a, c in keys]
                    logits = torch.stack([q[b, i, j] @ k[b, a, c] / math.sqrt(width) for a, c in keys])
                    weights = (logits + module.relative_bias[rows, h]).softmax(0)
                    mixed[b, i, j, part] = sum(w * v[b, a, c] for w, (a, c) in zip(weights, keys, strict=True))
    return mixed @ module.proj.weight.T + module.proj.bias


@pytest.mark.parametrize(("size", "window"), [(4, 4), (6, 3), (5, 3), (3, 7), (1, 7)])
def test_window_attention_with_padding_and_clipping(size, window):
    torch.manual_seed(0)
    module = WindowAttention(8, 2, window, size).double().eval()
    nn.init.normal_(module.relative_bias)
    x = torch.randn(2, size, size, 8, dtype=torch.float64, requires_grad=True)
    expected = slow_window_attention(module, x)
    actual = module(x)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    probe = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad((expected * probe).sum(), x)
    (found,) = torch.autograd.grad((actual * probe).sum(), x)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("size", "window"), [(7, 7), (6, 3), (5, 3), (1, 7)])
def test_window_attention_without_gradients(size, window, dtype, tolerance):
    torch.manual_seed(0)
    module = WindowAttention(32, 2, window, size).to(dtype).eval()
    nn.init.normal_(module.relative_bias)
    module.qkv.weight.data.mul_(2)
    x = torch.randn(2, size, size, 32, dtype=dtype)
    expected = slow_window_attention(copy.deepcopy(module).double(), x.double())
    with torch.no_grad():
        torch.testing.assert_close(module(x).double(), expected, atol=tolerance, rtol=0)
    spread = (expected - expected.mean((1, 2), keepdim=True)).abs().max()
    assert size == 1 or spread > 0.2, "values that hardly differ prove nothing"


@pytest.mark.parametrize(("size", "window"), [(7, 7), (5, 3)])
def test_gradients_of_window_attention_in_bfloat16_are_those_of_float64(size, window):
    torch.manual_seed(0)
    module = WindowAttention(32, 2, window, size)
    nn.init.normal_(module.relative_bias)
    x = torch.randn(4, size, size, 32, requires_grad=True)
    probe = torch.randn(4, size, size, 32)
    exact = copy.deepcopy(module).double()
    twin = x.detach().double().requires_grad_()
    wanted = torch.autograd.grad((slow_window_attention(exact, twin) * probe).sum(), [twin, *exact.parameters()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad((module(x).float() * probe).sum(), [x, *module.parameters()])
    for ours, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), right, atol=0.02 * right.abs().max().item(), rtol=0)


def test_the_first_convolution_is_that_of_float32_under_autocast():
    torch.manual_seed(0)
    stem = SpectralStem(6, 9, (4, 8), (3, 3), 16).eval()
    x = torch.randn(2, 6, 9, 9)
    seen = []
    stem.convolutions[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stem(x)
    exact = stem.convolutions[0](x[:, None])
    assert torch.equal(seen[0], exact.bfloat16())
    assert not torch.equal(stem.convolutions[0].bfloat16()(x[:, None].bfloat16()), exact.bfloat16())


def layer_norm(x, layer):
    """Over the last axis of an array."""
    centred = x - x.mean(-1, keepdims=True)
    normalised = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + layer.eps)
    return normalised * layer.weight.numpy() + layer.bias.numpy()


def linear(x, layer):
    return x @ layer.weight.numpy().T + layer.bias.numpy()


def slow_block(x, block):
    """Pre-norm attention and SwiGLU, each added to its input; the attention has a reference of its own above."""
    x = x + block.attn(torch.from_numpy(layer_norm(x, block.norm1))).numpy()
    normalised = layer_norm(x, block.norm2)
    gate = linear(normalised, block.mlp.fc1_g)
    return x + linear(gate / (1 + np.exp(-gate)) * linear(normalised, block.mlp.fc1_x), block.mlp.fc2)


def slow_downsample(x, layer):
    """A 3 x 3 convolution at every other position of the normalised map (batch, side, side, width)."""
    padded = np.pad(layer_norm(x, layer.norm), ((0, 0), (1, 1), (1, 1), (0, 0)))
    weight, side = layer.reduction.weight.numpy(), -(-x.shape[1] // 2)
    y = np.zeros((len(x), side, side, len(weight)))
    for i in range(side):
        for j in range(side):
            y[:, i, j] = np.einsum("bijc,ocij->bo", padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3], weight)
    return y + layer.reduction.bias.numpy()


@torch.no_grad()
def test_the_whole_model_is_stem_position_stages_and_pooled_head():
    torch.manual_seed(0)
    model = LolaSpecViT(
        5, 3, 11, stem_channels=(2, 3), stem_depths=(3, 3), dim=8, depths=(1, 2), num_heads=(2, 4), window_size=3
    )
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    model.double().eval()
    image = torch.randn(2, 5, 11, 11, dtype=torch.float64)
    # the stem, too, has a reference above
    x = model.stem(image).permute(0, 2, 3, 1).numpy() + model.pos_embed.numpy()
    assert x.shape[1:3] == (7, 7)
    first, (downsample, *second) = model.stages[0], model.stages[1]
    x = slow_block(x, first[0])
    x = slow_downsample(x, downsample)
    for block in second:
        x = slow_block(x, block)
    x = layer_norm(x, model.norm)
    pooled = np.concatenate([x.mean((1, 2)), x[:, 2, 2]], axis=1)
    assert x.shape[1:3] == (4, 4)
    np.testing.assert_allclose(model.forward_head(model.forward_features(image), pre_logits=True), pooled, rtol=1e-10)
    np.testing.assert_allclose(model(image), linear(pooled, model.head), rtol=1e-10)


def test_later_blocks_are_dropped_more_often():
    model = LolaSpecViT(5, 3, 9, depths=(2, 3), num_heads=(2, 4), drop_path_rate=0.4)
    rates = [module.drop_path.drop_prob for module in model.modules() if hasattr(module, "drop_path")]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_what_timm_could_not_read_of_it_is_refused():
    with pytest.raises(ConfigError, match="lola_specvit_tiny has no features_only; take forward_features"):
        timm.create_model("lola_specvit_tiny", in_chans=4, num_classes=2, img_size=5, features_only=True)


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="10 is no multiple of its 4 heads"):
        WindowAttention(10, 4, 7, 7)


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize(("channels", "patch", "classes"), [(1, 1, 2), (3, 5, 4), (17, 13, 3), (4, 22, 2)])
def test_any_bands_patch_and_classes(size, channels, patch, classes):
    torch.manual_seed(0)
    model = timm.create_model(f"lola_specvit_{size}", in_chans=channels, num_classes=classes, img_size=patch).eval()
    x = torch.randn(2, channels, patch, patch)
    logits = model(x)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    assert features.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(logits, features @ model.head.weight.T + model.head.bias)
    changed = x.clone()
    changed[:, :, patch // 2, patch // 2] += 1
    assert (model(changed) - logits).abs().max() > 1e-4
    model.reset_classifier(0)
    assert torch.equal(model(x), features)
    with pytest.raises(ConfigError, match=rf"\(batch, {channels}, {patch}, {patch}\)"):
        model(torch.zeros(1, channels, patch + 1, patch))


@pytest.mark.parametrize("components", [1, 2, 4, 6])
@pytest.mark.parametrize("patch", [1, 5, 9])
def test_gradients_of_kernels_in_bfloat16_are_those_of_float32(components, patch):
    # PyTorch's processor kernels have returned garbage for kernels longer than the axis that they run along
    torch.manual_seed(0)
    model = timm.create_model("lola_specvit_small", in_chans=components, num_classes=3, img_size=patch).eval()
    x, label = torch.randn(32, components, patch, patch), torch.randint(3, (32,))
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(x)
        loss = nn.functional.cross_entropy(logits.float(), label)
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    kernels = 0
    for (name, parameter), exact, rounded in zip(model.named_parameters(), *gradients, strict=True):
        if parameter.ndim > 3 and name != "pos_embed":
            kernels += 1
            assert (rounded - exact).norm() <= 0.1 * exact.norm() + 1e-5, name
    assert kernels == 3 + 1 + 1


def test_parameter_counts_of_the_sizes():
    def count(size):
        with torch.device("meta"):
            model = timm.create_model(f"lola_specvit_{size}", in_chans=30, num_classes=16, img_size=13)
        return sum(parameter.numel() for parameter in model.parameters())

    # tiny by hand: convolutions and their norms, collapse, position embedding, blocks, final norm, head
    stem = 8 * 63 + 2 * 8 + 16 * 8 * 45 + 2 * 16 + 32 * 16 * 27 + 2 * 32 + 32 * 30 * 64 + 64
    block = 2 * 128 + 3 * (64 * 64 + 64) + 64 * 64 + 64 + 13 * 13 * 4 + 2 * (64 * 128 + 128) + 128 * 64 + 64
    assert count("tiny") == stem + 7 * 7 * 64 + 2 * block + 128 + 128 * 16 + 16
    assert 0.5e6 < count("small") < 2e6 < 10e6 < count("base") < 30e6


def test_depths_and_heads_must_agree():
    with pytest.raises(ConfigError, match="differ in length"):
        LolaSpecViT(4, 2, 7, depths=(1, 1), num_heads=(2,))


def test_no_decay_for_tables_of_positions():
    model = LolaSpecViT(4, 2, 7)
    assert model.no_weight_decay() == {
        "pos_embed", "stages.0.0.attn.relative_bias", "stages.0.1.attn.relative_bias",
    }  # fmt: skip


def test_saved_and_loaded_model_is_the_same(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("lola_specvit_small", in_chans=6, num_classes=4, img_size=9).eval()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    loaded = LolaSpecViT.from_pretrained(tmp_path).eval()
    x = torch.randn(3, 6, 9, 9)
    assert torch.equal(loaded(x), model(x))


def test_a_model_with_another_head_is_saved_with_it(tmp_path):
    model = timm.create_model("lola_specvit_tiny", num_classes=5, in_chans=12, img_size=5).eval()
    model.reset_classifier(3)
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 12, 5, 5)
    assert torch.equal(LolaSpecViT.from_pretrained(tmp_path, strict=True).eval()(x), model(x))


def test_adapters_on_every_projection_merge_exactly():
    torch.manual_seed(0)
    model = timm.create_model("lola_specvit_tiny", in_chans=6, num_classes=4, img_size=9).double().eval()
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    before = model(x)
    targets = ["attn.qkv", "attn.proj", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2", "stem.collapse", "stem.convolutions.*"]
    paths = inject(model, targets, LoRA(2, 4), train="head")
    assert len(paths) == 2 * 5 + 1 + 3
    assert torch.equal(model(x), before)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted = model(x)
    assert (adapted - before).abs().max() > 1e-3
    merge(model)
    torch.testing.assert_close(model(x), adapted, atol=1e-10, rtol=0)
    assert count_parameters(model).head == 128 * 4 + 4


@pytest.mark.parametrize("coarse", [False, True])
def test_layers_of_different_rates_follow_one_another(coarse):
    model = LolaSpecViT(4, 3, 9, (2,), (3,), 8, (2, 1, 2), (2, 2, 2), window_size=3)
    layers = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    found = {}
    for name, number in layers.items():
        parts = name.split(".")
        found.setdefault(".".join(parts[: 3 if parts[0] == "stages" else 1]), set()).add(number)
    expected = {
        "pos_embed": 0, "stem": 0, "stages.0.0": 1, "stages.0.1": 2, "stages.1.0": 3, "stages.1.1": 3, "stages.2.0": 4,
        "stages.2.1": 4, "stages.2.2": 5, "norm": 5, "head": 6,
    }  # fmt: skip
    if coarse:
        expected = {"pos_embed": 0, "stem": 0, "norm": 3, "head": 4} | {
            name: 1 + int(name[7]) for name in expected if name.startswith("stages")
        }
    assert found == {name: {number} for name, number in expected.items()}
