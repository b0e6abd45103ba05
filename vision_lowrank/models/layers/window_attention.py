"""Self-attention within windows of a map, with a learned bias by relative position."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vision_lowrank.errors import ConfigError


class WindowAttention(nn.Module):
    """Multi-head attention within square windows (Liu et al. 2021, arXiv 2103.14030, without shifts).

    A window larger than the map is clipped to it. A map that the window does not divide is padded, and padded positions
    are masked: they take no part in any real position's attention.

    Args:
        dim: width, a multiple of `num_heads`.
        num_heads: number of heads.
        window_size: side of the windows in positions.
        map_size: side of the map in positions.

    Raises:
        ConfigError: `num_heads` does not divide `dim`.
    """

    bias_index: Tensor
    padding_mask: Tensor | None

    def __init__(self, dim: int, num_heads: int, window_size: int, map_size: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"attention width {dim} is no multiple of its {num_heads} heads; change one of them")
        self.num_heads = num_heads
        self.window_size = window = min(window_size, map_size)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_bias, std=0.02)
        rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        down, right = (axis.flatten()[:, None] - axis.flatten() + window - 1 for axis in (rows, columns))
        self.register_buffer("bias_index", down * (2 * window - 1) + right, persistent=False)
        self.padding = -map_size % window
        self.register_buffer("padding_mask", _padding_mask(map_size, window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, map, map, dim) to the same shape."""
        size, window = x.shape[1], self.window_size
        if self.padding:
            x = F.pad(x, (0, 0, 0, self.padding, 0, self.padding))
        across = x.shape[1] // window
        windows = rearrange(x, "B (a w) (b v) C -> (B a b) (w v) C", w=window, v=window)
        q, k, v = rearrange(self.qkv(windows), "b n (three h c) -> three b h n c", three=3, h=self.num_heads)
        bias = rearrange(self.relative_bias[self.bias_index], "n m h -> h n m")
        if self.padding_mask is not None:
            # (windows of one map, heads, queries, keys), repeated for each sample
            bias = (bias + self.padding_mask[:, None, None, :]).repeat(x.shape[0], 1, 1, 1)
        y = _attend(q, k, v, bias)
        y = self.proj(rearrange(y, "b h n c -> b n (h c)"))
        y = rearrange(y, "(B a b) (w v) C -> B (a w) (b v) C", a=across, b=across, w=window)
        return y[:, :size, :size]


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attends by what is fastest for small windows, in training too.

    In bfloat16 on processors, PyTorch 2.14 spends most of its time on the softmax, which is faster in float32.
    """
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        bias = bias.to(q.dtype)
        if bias.ndim == 3 and not torch.is_grad_enabled():
            # with gradients three dimensions keep PyTorch 2.14 to one kernel, whether the bias is trained or frozen
            bias = bias[None]
        return F.scaled_dot_product_attention(q, k, v, bias)
    batch, heads, count, width = q.shape
    q, k, v = (x.reshape(batch * heads, count, width) for x in (q, k, v))
    products = torch.bmm(q, k.transpose(1, 2)).unflatten(0, (batch, heads))
    # the sum takes its strides from the bias
    weights = torch.add(bias.contiguous(), products.float(), alpha=width**-0.5).softmax(-1).to(v.dtype)
    return torch.bmm(weights.flatten(0, 1), v).unflatten(0, (batch, heads))


def _padding_mask(map_size: int, window: int) -> Tensor | None:
    """Returns what to add to the logits of each key, 0 or -inf, (windows, keys); None where nothing is padded."""
    padding = -map_size % window
    if padding == 0:
        return None
    outside = F.pad(torch.zeros(map_size, map_size), (0, padding, 0, padding), value=float("-inf"))
    return rearrange(outside, "(a w) (b v) -> (a b) (w v)", w=window, v=window)
