"""Attention over all (channel, position) pairs at once, which low-rank attention approximates; for ablations."""

import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from vision_lowrank.models.layers.embeddings import Rotation, rotate
from vision_lowrank.models.layers.fused_attention import fused_attention
from vision_lowrank.models.layers.kronecker_attention import Context


class JointAttention(nn.Module):
    """Multi-head self-attention of C N tokens; costs grow with the square of that.

    Of a head's width the first half is turned by wavelength and the second by place, where the context has rotations.

    Args:
        dim: width D.
        num_heads: heads.
        bias: biases in the projections of queries, keys and values.
        dropout: probability of dropping an attention weight while training.
    """

    def __init__(self, dim: int, num_heads: int, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Maps (B, C, N, D) to the same shape."""
        channels, positions = x.shape[1:3]
        q, k, v = rearrange(self.qkv(x), "b c n (three h e) -> three b h (c n) e", three=3, h=self.num_heads)
        if context.spectral is not None and context.spatial is not None:
            q, k = (_rotate_both(part, context.spectral, context.spatial) for part in (q, k))
        mask = _pair_mask(context, channels, positions)
        y = fused_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        out: Tensor = self.proj(rearrange(y, "b h (c n) e -> b c n (h e)", c=channels))
        return out


def _rotate_both(x: Tensor, spectral: Rotation, spatial: Rotation) -> Tensor:
    channels, positions = spectral[0].shape[2], spatial[0].shape[2]
    first, second = x.chunk(2, dim=-1)
    sine, cosine = (repeat(part, "b 1 c e -> b 1 (c n) e", n=positions) for part in spectral)
    first = rotate(first, (sine, cosine))
    sine, cosine = (repeat(part, "b 1 n e -> b 1 (c n) e", c=channels) for part in spatial)
    return F.pad(first, (0, second.shape[-1])) + F.pad(rotate(second, (sine, cosine)), (first.shape[-1], 0))


def _pair_mask(context: Context, channels: int, positions: int) -> Tensor | None:
    """Returns which pairs are seen, bool (B or 1, 1, C N or 1, C N)."""
    mask = None
    if context.present is not None:
        mask = repeat(context.present, "b c -> b 1 1 (c n)", n=positions)
    if context.field is not None:
        field = repeat(context.field, "b 1 n m -> b 1 (c n) (d m)", c=channels, d=channels)
        mask = field if mask is None else mask & field
    return mask
