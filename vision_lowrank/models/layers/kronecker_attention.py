"""Low-rank attention over a grid of channels and positions (LESS ViT, arXiv 2503.12843), never larger than it must be.

The attention over all (channel, position) pairs is a sum over ranks r of Kronecker products of one attention over
channels and one over positions. With their outputs x (of channel c) and y (of position n) in each head h,

    out[c, n, o] = sum over r, h, a, s of  W[o, (h, a, s)]  x[r, h, c, a]  y[r, h, n, s]  + b[o]

which three orders of contraction compute alike: `product` forms x y first, `fold_channel` W x first, `fold_spatial` W y
first. `contraction_order` tells which costs least.

`B` batch, `C` channels and `N` positions with their class tokens, `D` width, `h` heads, `r` rank, `a` and `s` the
channel's and the position's share of a head's width: a s h = D.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vision_lowrank.adapters import folded_weight
from vision_lowrank.errors import ConfigError
from vision_lowrank.models.layers.embeddings import Rotation, rotate
from vision_lowrank.models.layers.fused_attention import fused_attention

# what writing and reading back one number costs, in multiply-adds, which half precision makes cheaper; as measured on
# processors, where the order of the least cost takes 1 to 7 % longer than the fastest (benchmarks/contraction_order.py)
COST_OF_A_NUMBER, COST_OF_A_HALF = 40, 300

# a folded weight is made for so many channels or positions at a time that it stays in the processor's cache
FOLDED_NUMBERS = 1 << 21

Order = Literal["product", "fold_channel", "fold_spatial"]


@dataclass(frozen=True)
class Context:
    """What the tokens' coordinates mean to attention; the same for all blocks.

    Attributes:
        field: bool (B or 1, 1, N, N), which positions see which; None for all.
        present: bool (B, C), False for channels that only pad the batch; None for all.
        spectral: sine and cosine (B or 1, 1, C, a) that turn queries and keys of channels; None without rotation.
        spatial: sine and cosine (B or 1, 1, N, s) of positions; None without rotation.
    """

    field: Tensor | None = None
    present: Tensor | None = None
    spectral: Rotation | None = None
    spatial: Rotation | None = None

    def channel_mask(self) -> Tensor | None:
        """Returns which channels are seen, bool (B, 1, 1, C)."""
        return None if self.present is None else self.present[:, None, None, :]


class SingleQueryPool(nn.Module):
    """Multi-head attention of the first token to all tokens, itself included.

    The key projection is folded into the query and the value projection applied after the weighted mean, so that
    nothing but the scores grows with tokens times width.

    Args:
        dim: width E, a multiple of `num_heads`.
        num_heads: heads h.
        bias: biases in the projections of query, key and value.
        dropout: probability of dropping an attention weight while training.
    """

    def __init__(self, dim: int, num_heads: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps (B, M, tokens, E) to (B, M, E); `mask` bool (B, 1, 1, tokens) tells which tokens are seen."""
        query = rearrange(self.q(x[:, :, 0]), "b m (h e) -> b m h e", h=self.num_heads)
        query = query * query.shape[-1] ** -0.5
        folded = folded_weight(self.kv)
        if folded is None:
            key, value = rearrange(self.kv(x), "b m l (two h e) -> two b m h l e", two=2, h=self.num_heads)
            weights = self._weights((query.unsqueeze(-2) @ key.transpose(-1, -2)).squeeze(-2), mask)
            return self.proj((weights.unsqueeze(-2) @ value).flatten(2))
        key, value = rearrange(folded[0], "(two h e) i -> two h e i", two=2, h=self.num_heads)
        # the key's bias adds the same to all scores of a query, which softmax does not see
        weights = self._weights(torch.einsum("bmhe,hei->bmhi", query, key) @ x.transpose(-1, -2), mask)
        y = torch.einsum("bmhi,hei->bmhe", weights @ x, value)
        if folded[1] is not None:
            y = y + rearrange(folded[1], "(two h e) -> two h e", two=2, h=self.num_heads)[1] * weights.sum(-1, True)
        return self.proj(y.flatten(2))

    def _weights(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights: Tensor = self.dropout(scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)))
        return weights.to(scores.dtype)


class LowDimPool(nn.Module):
    """Makes one token a channel and one token a position out of the grid.

    Args:
        dim: width D of the grid.
        channel_dim: width of channel tokens.
        spatial_dim: width of position tokens.
        num_heads: heads of the pools.
        bias: see `SingleQueryPool`.
        dropout: see `SingleQueryPool`.
    """

    def __init__(
        self, dim: int, channel_dim: int, spatial_dim: int, num_heads: int, bias: bool, dropout: float
    ) -> None:
        super().__init__()
        self.channel_linear = nn.Linear(dim, channel_dim)
        self.spatial_linear = nn.Linear(dim, spatial_dim)
        self.channel_norm = nn.LayerNorm(channel_dim, eps=1e-6)
        self.spatial_norm = nn.LayerNorm(spatial_dim, eps=1e-6)
        self.channel_pool = SingleQueryPool(channel_dim, num_heads, bias, dropout)
        self.spatial_pool = SingleQueryPool(spatial_dim, num_heads, bias, dropout)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Maps (B, C, N, D) to (B, C, channel_dim) and (B, N, spatial_dim)."""
        channel, spatial = self._project(x)
        pooled_channel = self.channel_pool(self.channel_norm(channel))
        pooled_spatial = self.spatial_pool(self.spatial_norm(spatial).transpose(1, 2), context.channel_mask())
        return channel[:, :, 0] + pooled_channel, spatial[:, 0] + pooled_spatial

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Applies both linear layers in one product where their adapters allow."""
        channel, spatial = folded_weight(self.channel_linear), folded_weight(self.spatial_linear)
        if channel is None or spatial is None or channel[1] is None or spatial[1] is None:
            return self.channel_linear(x), self.spatial_linear(x)
        both = F.linear(x, torch.cat([channel[0], spatial[0]]), torch.cat([channel[1], spatial[1]]))
        first, second = both.split([len(channel[0]), len(spatial[0])], dim=-1)
        return first, second


class Branch(nn.Module):
    """Self-attention of one axis, once for each rank.

    Args:
        dim: width E of the tokens.
        num_heads: heads h.
        rank: number of attentions r.
        shared_values: one value projection for all ranks, as in the paper, instead of one each.
        bias: biases in the projections.
        dropout: probability of dropping an attention weight while training.
    """

    def __init__(self, dim: int, num_heads: int, rank: int, shared_values: bool, bias: bool, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.rank = rank
        self.shared_values = shared_values
        self.dropout = dropout
        self.qk = nn.Linear(dim, 2 * dim * rank, bias=bias)
        self.v = nn.Linear(dim, dim if shared_values else dim * rank, bias=bias)

    def forward(self, x: Tensor, mask: Tensor | None, rotation: Rotation | None) -> Tensor:
        """Maps (B, tokens, E) to (B, r, h, tokens, E / h); `mask` bool, broadcast to (B, heads, tokens, tokens)."""
        q, k = rearrange(self.qk(x), "b l (two h r e) -> two b (r h) l e", two=2, h=self.num_heads, r=self.rank)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        ranks = 1 if self.shared_values else self.rank
        v = rearrange(self.v(x), "b l (h r e) -> b r h l e", h=self.num_heads, r=ranks)
        v = v.expand(-1, self.rank, -1, -1, -1).flatten(1, 2)
        y = fused_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return y.unflatten(1, (self.rank, self.num_heads))


def contraction_order(channels: int, positions: int, dim: int, rank: int, a: int, s: int, dtype: torch.dtype) -> Order:
    """Returns the cheapest order for one sample by multiply-adds and numbers that go through memory.

    Args:
        channels: C.
        positions: N.
        dim: D.
        rank: r.
        a: the channel's share of a head's width.
        s: the position's share.
        dtype: of the factors.
    """
    tokens, square = channels * positions, dim * dim
    number = COST_OF_A_HALF if dtype.itemsize < 4 else COST_OF_A_NUMBER
    costs: dict[Order, float] = {
        # more than one rank: summed first, then brought into order
        "product": tokens * (square + dim * number * (1 if rank == 1 else 3)),
        "fold_channel": rank * square / a * (tokens + 2 * channels * number),
        "fold_spatial": rank * square / s * (tokens + 2 * positions * number),
    }
    # not min(), which torch.compile cannot look into where sizes vary
    best: Order = "product"
    for order, cost in costs.items():
        if cost < costs[best]:
            best = order
    return best


def kronecker_projection(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, order: Order) -> Tensor:
    """Applies a linear layer to the sum over ranks of Kronecker products, in one of three exact orders.

    Args:
        x: channel factors (B, r, h, C, a).
        y: position factors (B, r, h, N, s).
        weight: (D, h a s).
        bias: (D,).
        order: of the contraction; see the module.

    Returns:
        (B, C, N, D).
    """
    if order == "product":
        return F.linear(kronecker_sum(x, y), weight, bias)
    if order == "fold_channel":
        kernel = rearrange(weight, "o (h a s) -> h s a o", h=x.shape[2], a=x.shape[-1])
        return _fold(x, y, kernel, bias).transpose(1, 2)
    return _fold(y, x, rearrange(weight, "o (h a s) -> h a s o", h=x.shape[2], a=x.shape[-1]), bias)


def _fold(moved: Tensor, kept: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """Multiplies one factor with the weight and the other factor with that.

    Args:
        moved: factor (B, r, h, L, e) that meets the weight.
        kept: the other factor (B, r, h, M, f).
        kernel: weight (h, f, e, D).
        bias: (D,).

    Returns:
        (B, M, L, D).
    """
    batch, rank, dim = len(moved), moved.shape[1], kernel.shape[-1]
    kernel = kernel.contiguous()
    factor = rearrange(kept, "b r h m f -> b m (h f r)")
    parts = []
    for part in moved.split(max(1, FOLDED_NUMBERS // (factor.shape[2] * dim * batch)), dim=3):
        # all samples and ranks as rows of one product, in an order that the next one reads without a copy
        folded = rearrange(part, "b r h l e -> h 1 (r b l) e") @ kernel
        folded = rearrange(folded, "h f (r b l) o -> b (h f r) (l o)", r=rank, b=batch)
        parts.append(_product_with_bias(factor, folded, bias).unflatten(-1, (-1, dim)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _product_with_bias(factor: Tensor, folded: Tensor, bias: Tensor | None) -> Tensor:
    """Multiplies (B, M, K) by (B, K, L D) and adds the bias (D,) to each of the L outputs."""
    if bias is None:
        return factor @ folded
    repeated = bias.to(folded.dtype).repeat(folded.shape[-1] // len(bias))
    return torch.baddbmm(repeated.expand(1, 1, -1), factor, folded)


def kronecker_sum(x: Tensor, y: Tensor) -> Tensor:
    """Maps (B, r, h, C, a) and (B, r, h, N, s) to the sum over ranks of x y, (B, C, N, h a s)."""
    if x.shape[1] == 1:
        # written where it belongs in one pass; factors repeated first, since rows of D multiply faster than bits of s
        left = rearrange(x, "b 1 h c a -> b c 1 h a 1").expand(-1, -1, -1, -1, -1, y.shape[-1])
        right = rearrange(y, "b 1 h n s -> b 1 n h 1 s").expand(-1, -1, -1, -1, x.shape[-1], -1)
        return left.flatten(3) * right.flatten(3)
    product = rearrange(x, "b r h c a -> b h (c a) r") @ rearrange(y, "b r h n s -> b h r (n s)")
    return rearrange(product, "b h (c a) (n s) -> b c n (h a s)", c=x.shape[3], n=y.shape[3])


class LowRankAttention(nn.Module):
    """Attention over channels and over positions, combined by Kronecker products and projected.

    Args:
        dim: width D of the output.
        channel_dim: width of channel tokens, h a.
        spatial_dim: width of position tokens, h s.
        num_heads: heads h.
        rank: number of Kronecker products r.
        shared_values: True: one value projection, products are summed (the paper). False: one a rank, products are
            averaged (the successor).
        bias: biases in the branches.
        dropout: of attention weights.

    Raises:
        ConfigError: the widths do not make up D.
    """

    def __init__(
        self,
        dim: int,
        channel_dim: int,
        spatial_dim: int,
        num_heads: int,
        rank: int = 1,
        shared_values: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if channel_dim % num_heads or spatial_dim % num_heads or channel_dim * spatial_dim != dim * num_heads:
            raise ConfigError(
                f"widths {channel_dim} of channels and {spatial_dim} of positions with {num_heads} heads do not make "
                f"up {dim}: choose channel_dim_per_head so that it divides the width of a head"
            )
        self.channel_branch = Branch(channel_dim, num_heads, rank, shared_values, bias, dropout)
        self.spatial_branch = Branch(spatial_dim, num_heads, rank, shared_values, bias, dropout)
        self.proj = nn.Linear(dim, dim)
        self.scale = 1.0 if shared_values else 1.0 / rank

    def forward(self, x_c: Tensor, x_s: Tensor, context: Context) -> Tensor:
        """Maps channel tokens (B, C, channel_dim) and position tokens (B, N, spatial_dim) to (B, C, N, D)."""
        x = self.channel_branch(x_c, context.channel_mask(), context.spectral) * self.scale
        y = self.spatial_branch(x_s, context.field, context.spatial)
        folded = folded_weight(self.proj)
        # the parts of a folded order depend on the batch's size, and an exported graph is for all sizes
        if folded is None or torch.compiler.is_exporting():
            return self.proj(kronecker_sum(x, y))
        rank, _, channels, a = x.shape[1:]
        order = contraction_order(channels, y.shape[3], len(folded[0]), rank, a, y.shape[4], x.dtype)
        return kronecker_projection(x, y, *folded, order)


class AdditiveAttention(nn.Module):
    """The alternative to Kronecker products for ablations: each axis attends by itself, and the projections are added.

    Args:
        dim: width D of the output.
        channel_dim: width of channel tokens.
        spatial_dim: width of position tokens.
        num_heads: heads.
        bias: biases in the branches.
        dropout: of attention weights.
    """

    def __init__(
        self, dim: int, channel_dim: int, spatial_dim: int, num_heads: int, bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.channel_branch = Branch(channel_dim, num_heads, 1, True, bias, dropout)
        self.spatial_branch = Branch(spatial_dim, num_heads, 1, True, bias, dropout)
        self.channel_proj = nn.Linear(channel_dim, dim)
        self.spatial_proj = nn.Linear(spatial_dim, dim, bias=False)

    def forward(self, x_c: Tensor, x_s: Tensor, context: Context) -> Tensor:
        """Maps channel tokens (B, C, channel_dim) and position tokens (B, N, spatial_dim) to (B, C, N, D)."""
        x = self.channel_branch(x_c, context.channel_mask(), context.spectral)
        y = self.spatial_branch(x_s, context.field, context.spatial)
        x, y = (rearrange(part, "b 1 h l e -> b l (h e)") for part in (x, y))
        return self.channel_proj(x).unsqueeze(2) + self.spatial_proj(y).unsqueeze(1)


class LessAttention(nn.Module):
    """The attention of a LESS block: pools, one token an axis entry, and attention between those.

    Args:
        dim: width D.
        num_heads: heads h.
        channel_dim_per_head: the channel's share a of a head's width; the position's is the rest, D / h / a.
        rank: number of Kronecker products.
        shared_values: see `LowRankAttention`.
        additive: combine the axes by `AdditiveAttention` instead.
        bias: biases in the projections of queries, keys and values.
        dropout: of attention weights.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        channel_dim_per_head: int,
        rank: int = 1,
        shared_values: bool = False,
        additive: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channel_dim = channel_dim_per_head * num_heads
        spatial_dim = dim // channel_dim * num_heads
        self.low_dim_pool = LowDimPool(dim, channel_dim, spatial_dim, num_heads, bias, dropout)
        self.channel_norm = nn.LayerNorm(channel_dim, eps=1e-6)
        self.spatial_norm = nn.LayerNorm(spatial_dim, eps=1e-6)
        widths = (dim, channel_dim, spatial_dim, num_heads)
        self.attn: nn.Module = (
            AdditiveAttention(*widths, bias, dropout)
            if additive
            else LowRankAttention(*widths, rank, shared_values, bias, dropout)
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Maps (B, C, N, D) to the same shape."""
        x_c, x_s = self.low_dim_pool(x, context)
        y: Tensor = self.attn(self.channel_norm(x_c), self.spatial_norm(x_s), context)
        return y
