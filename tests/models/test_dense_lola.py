"""Dense inference against the model applied to each pixel's patch, cut out by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vision_lowrank.adapters import GatedLoRA, LoRA, inject, merge_and_remove
from vision_lowrank.models import LolaSpecViT, dense_lola
from vision_lowrank.models.dense_lola import DenseLola

HEIGHT, WIDTH, CLASSES = 9, 7, 3


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Shares also where it does not pay on a CPU; returns how to choose as usual."""
    with monkeypatch.context() as patch:
        patch.setattr(dense_lola, "CPU_SHARE", 1)
        yield patch.undo


def build(size, components=4, **options):
    """A model whose normalisations and biases are no identities, so that a zero at an edge matters."""
    torch.manual_seed(size)
    settings = {"stem_channels": (2, 3, 4), "stem_depths": (3, 3, 1), "dim": 8, "num_heads": (2,)} | options
    model = LolaSpecViT(components, CLASSES, size, **settings).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.bias.normal_()
                module.weight.uniform_(0.5, 2)
        model.head.weight.normal_()
    return model


def border(image, size):
    """The image mirrored at its outer pixels, by numpy."""
    radius = size // 2
    return torch.from_numpy(np.pad(image, ((0, 0), (radius, radius), (radius, radius)), mode="reflect"))


def by_patch(model, padded, size):
    """Logits (height, width, classes) of patches cut out one by one."""
    rows, columns = (side - size + 1 for side in padded.shape[1:])
    patches = [padded[:, y : y + size, x : x + size] for y in range(rows) for x in range(columns)]
    return model(torch.stack(patches)).unflatten(0, (rows, columns))


def scene(size, components=4):
    generator = np.random.default_rng(size)
    height, width = max(HEIGHT, size), max(WIDTH, size)
    return border(generator.normal(size=(components, height, width)).astype(np.float32), size)


OPTIONS = {
    "one stage": {},
    "two stages": {"depths": (1, 1), "num_heads": (2, 2)},
    "windows that need padding": {"window_size": 3},
    "two convolutions": {"stem_channels": (2, 3), "stem_depths": (3, 1)},
    "five convolutions": {"stem_channels": (2, 2, 3, 2, 3), "stem_depths": (3, 1, 3, 1, 1)},
    "one component": {"components": 1},
    "kernels longer than the components": {"components": 2, "stem_depths": (7, 5, 3)},
}


@pytest.mark.parametrize("size", [1, 3, 5, 7, 9, 11, 13, 15])
@torch.inference_mode()
def test_every_pixel_as_its_patch_by_itself_at_every_patch_size(size):
    model, padded = build(size), scene(size)
    expected = by_patch(model, padded, size)
    assert expected.std() > 0.1
    torch.testing.assert_close(DenseLola(model)(padded), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("size", "shares"), [(1, False), (5, False), (7, False), (9, False), (11, True), (13, True)])
@torch.inference_mode()
def test_the_stem_is_shared_where_that_pays(size, shares, always):
    always()
    model, padded = build(size), scene(size)
    dense = DenseLola(model)
    torch.testing.assert_close(dense(padded), by_patch(model, padded, size), atol=1e-4, rtol=0)
    with FlopCounterMode(display=False) as apart:
        by_patch(model, padded, size)
    with FlopCounterMode(display=False) as found:
        dense(padded)
    # what follows the stem is the same
    assert (found.get_total_flops() < apart.get_total_flops()) == shares
    assert shares or found.get_total_flops() == apart.get_total_flops()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("size", [5, 9, 11])
@torch.inference_mode()
def test_every_pixel_as_its_patch_by_itself_with_every_option(name, size):
    components = OPTIONS[name].get("components", 4)
    model, padded = build(size, **OPTIONS[name]), scene(size, components)
    torch.testing.assert_close(DenseLola(model)(padded), by_patch(model, padded, size), atol=1e-4, rtol=0)


@torch.inference_mode()
def test_features_of_a_model_without_head():
    model, padded = build(9), scene(9)
    model.reset_classifier(0)
    found = DenseLola(model)(padded)
    assert found.shape[-1] == model.num_features
    torch.testing.assert_close(found, by_patch(model, padded, 9), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [9, 13])
@pytest.mark.parametrize("method", [LoRA(2, 4.0), GatedLoRA(2, 4.0, 1)])
def test_adapters_on_the_convolutions(method, size):
    model, padded = build(size), scene(size)
    inject(model, ["stem.convolutions.*", "stem.collapse", "attn.qkv"], method)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters" in name:
                parameter.normal_(std=0.3)
    dense = DenseLola(model.eval())
    # nothing is padded with patches of 13, so adapters do not hinder sharing there
    assert dense.shared == (size == 13)
    with torch.inference_mode():
        expected = by_patch(model, padded, size)
        torch.testing.assert_close(dense(padded), expected, atol=1e-4, rtol=0)
    if isinstance(method, LoRA):
        merge_and_remove(model)
        dense = DenseLola(model)
        assert dense.shared
        with torch.inference_mode():
            torch.testing.assert_close(dense(padded), expected, atol=2e-4, rtol=0)


@torch.inference_mode()
def test_features_inside_a_patch_do_not_hold_at_its_edges():
    """What makes classes of positions necessary: one map for all positions, as for valid convolutions, is wrong."""
    size = 9
    model, padded = build(size), scene(size)
    tokens = DenseLola(model)._tokens(padded, 9, 9).unflatten(0, (9, 9))
    # the same place of the scene, in the middle of one patch and in the corner of another
    assert (tokens[0, 0, 3, 3] - tokens[3, 3, 0, 0]).abs().max() > 1e-2
    # and two positions that no edge reaches: one class, the very same numbers
    assert torch.equal(tokens[1, 0, 2, 3], tokens[0, 0, 3, 3])


@pytest.mark.parametrize(("size", "least"), [(13, 15), (11, 3), (9, 1.5)])
@torch.inference_mode()
def test_the_stem_costs_a_fraction_of_its_cost_by_patch(size, least):
    model = build(size, stem_channels=(8, 16, 32), stem_depths=(3, 3, 3))
    image = torch.randn(4, 15 + size, 15 + size)
    dense = DenseLola(model)
    with FlopCounterMode(display=False) as together:
        dense._tokens(image, 16, 16)
    with FlopCounterMode(display=False) as apart:
        model.stem(image[None, :, :size, :size])
    assert 256 * apart.get_total_flops() > least * together.get_total_flops()
