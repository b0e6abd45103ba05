"""Attention whose gradient is taken in float32 on processors, against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch.overrides import TorchFunctionMode

from vision_lowrank.models.layers.fused_attention import LONGEST, FusedAttention, fused_attention

BF16 = torch.bfloat16


class Formats(TorchFunctionMode):
    """Collects the formats in which PyTorch's attention is asked for."""

    def __init__(self):
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.found.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else args[0].dtype)
        return func(*args, **(kwargs or {}))


def draw(queries=5, keys=7, width=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    parts = (torch.randn(2, 3, count, width, generator=generator) for count in (queries, keys, keys))
    return [part.to(BF16).to(dtype).requires_grad_() for part in parts]


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("autocast", [False, True])
def test_in_bf16_output_and_gradients_are_those_of_float32(mask, autocast):
    if mask is not None:
        mask = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.4
        mask[..., 0] = True
        if mask == "float":
            mask = torch.where(mask, 0.5, -2.0).to(BF16)
    exact = draw()
    expected = F.scaled_dot_product_attention(*exact, mask, scale=0.3).to(BF16)
    expected.float().square().sum().backward()
    found = draw(dtype=torch.float32 if autocast else BF16)
    with torch.autocast("cpu", BF16, enabled=autocast):
        y = fused_attention(*found, mask, scale=0.3)
    y.float().square().sum().backward()
    assert y.dtype == BF16
    assert torch.equal(y, expected)
    for ours, theirs in zip(found, exact, strict=True):
        assert torch.equal(ours.grad, theirs.grad.to(ours.dtype))


def test_the_plain_kernel_in_bf16_is_farther_from_float32():
    exact = draw()
    F.scaled_dot_product_attention(*exact).to(BF16).float().square().sum().backward()
    plain = draw(dtype=BF16)
    F.scaled_dot_product_attention(*plain).float().square().sum().backward()
    assert not torch.equal(plain[0].grad, exact[0].grad.to(BF16))


@pytest.mark.parametrize(
    ("dtype", "wanted", "queries"),
    [(BF16, False, 5), (BF16, True, LONGEST // 4 + 1), (torch.float64, True, 5), (torch.float32, True, 5)],
)
def test_elsewhere_it_is_plain_attention(dtype, wanted, queries):
    parts = [part.detach().requires_grad_(wanted) for part in draw(queries=queries, dtype=dtype)]
    with Formats() as formats:
        found = fused_attention(*parts)
    assert formats.found == [dtype]
    assert torch.equal(found, F.scaled_dot_product_attention(*parts))


def test_autocast_leaves_float64_alone():
    parts = draw(dtype=torch.float64)
    with torch.autocast("cpu", BF16):
        found = fused_attention(*parts)
    assert torch.equal(found, F.scaled_dot_product_attention(*parts))


def test_without_gradients_bf16_stays():
    parts = draw(dtype=BF16)
    with torch.no_grad(), Formats() as formats:
        fused_attention(*parts)
    assert formats.found == [BF16]


def test_models_of_other_libraries_attend_alike():
    torch.manual_seed(0)
    layer = Attention(8, num_heads=2)
    x = torch.randn(2, 5, 8)
    with Formats() as formats, torch.autocast("cpu", BF16), FusedAttention():
        ours = layer(x)
    assert formats.found == [torch.float32]
    with Formats() as formats, torch.autocast("cpu", BF16):
        plain = layer(x)
    assert formats.found == [BF16]
    torch.testing.assert_close(ours, plain, atol=0.02, rtol=0)
