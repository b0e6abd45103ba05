"""The parts of the original LoLA-SpecViT; maps are channels last, (batch, h, w, width)."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Swish(nn.Module):
    """Computes x sigmoid(x) in two roundings as the original's convolutions do; `nn.SiLU` differs in the last bit."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps any shape to the same shape."""
        return x * torch.sigmoid(x)


class SqueezeExcitation(nn.Module):
    """Scales channels by a sigmoid of their global means; channels first, any number of axes after them.

    Below 16 channels the original has no hidden unit, so every channel is scaled by one half.

    Args:
        channels: number of channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 16
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, channels, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, channels, *positions) to the same shape."""
        scale = self.fc(x.flatten(2).mean(2))
        return x * scale.view(*scale.shape, *(1 for _ in x.shape[2:]))


class WindowAttention(nn.Module):
    """Attention among all positions of a window, padding included, with a bias by relative position.

    Args:
        dim: width.
        heads: number of heads.
        window: side of the window in positions.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        dy, dx = (axis.flatten()[:, None] - axis.flatten()[None, :] + window - 1 for axis in (rows, columns))
        self.register_buffer("relative_position_index", dy * (2 * window - 1) + dx)

    def forward(self, x: Tensor) -> Tensor:
        """Maps windows (batch * windows, positions, width) to the same shape."""
        q, k, v = rearrange(self.qkv(x), "b n (three heads c) -> three b heads n c", three=3, heads=self.heads)
        bias = rearrange(self.relative_position_bias_table[self.relative_position_index], "n m heads -> heads n m")
        attention = (self.scale * q @ k.transpose(-2, -1) + bias).softmax(-1)
        return self.proj(rearrange(attention @ v, "b heads n c -> b n (heads c)"))


class SwiGLU(nn.Module):
    """Computes W3(SiLU(W1 x) * W2 x) with three square matrices.

    Args:
        dim: width.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, dim)
        self.w2 = nn.Linear(dim, dim)
        self.w3 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., width) to the same shape."""
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    """Pre-norm window attention and feed-forward.

    Args:
        dim: width.
        heads: number of attention heads.
        window: side of the attention window in positions.
        mlp_ratio: width of the feed-forward relative to `dim`.
        drop_path: dropout of residual branches.
    """

    def __init__(self, dim: int, heads: int, window: int, mlp_ratio: float, drop_path: nn.Module) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.window = window
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        # the original's third place is an idle dropout; its state dict counts it
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), SwiGLU(hidden), nn.Identity(), nn.Linear(hidden, dim))
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (batch, h, w, width) to the same shape and the attention's windows, padded positions included."""
        _, h, w, _ = x.shape
        rows, columns = math.ceil(h / self.window), math.ceil(w / self.window)
        padded = F.pad(self.norm1(x), (0, 0, 0, columns * self.window - w, 0, rows * self.window - h))
        sizes = {"rows": rows, "columns": columns, "p": self.window, "q": self.window}
        windows = self.attn(rearrange(padded, "b (rows p) (columns q) c -> (b rows columns) (p q) c", **sizes))
        attended = rearrange(windows, "(b rows columns) (p q) c -> b (rows p) (columns q) c", **sizes)
        x = x + self.drop_path(attended[:, :h, :w])
        return x + self.drop_path(self.mlp(self.norm2(x))), windows


class Reduce(nn.Module):
    """Halves the map and doubles the width between two levels.

    Args:
        dim: width of the map that comes in.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False),
            Swish(),
            SqueezeExcitation(dim),
            nn.Conv2d(dim, 2 * dim, 1, bias=False),
        )
        self.norm = nn.BatchNorm2d(2 * dim)
        self.reduction = nn.Conv2d(2 * dim, 2 * dim, 3, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, h, w, width) to (batch, ceil(h / 2), ceil(w / 2), 2 * width)."""
        x = self.reduction(self.norm(self.conv(rearrange(x, "b h w c -> b c h w"))))
        return rearrange(x, "b c h w -> b h w c")
