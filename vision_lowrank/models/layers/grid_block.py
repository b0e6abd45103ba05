"""A block over a grid of channels and positions: attention of any kind and a feed-forward, with what both need.

Of LESS ViT and of the decoder of Hyper-MAE.
"""

import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn

from vision_lowrank.errors import ConfigError
from vision_lowrank.models.layers.embeddings import Coordinates, field_mask, spatial_rotation, spectral_rotation
from vision_lowrank.models.layers.joint_attention import JointAttention
from vision_lowrank.models.layers.kronecker_attention import Context, LessAttention


class Block(nn.Module):
    """Pre-norm attention over the grid and a feed-forward with GELU, each scaled and added.

    Args:
        dim: width.
        attention: maps (B, C, N, D) and a context to (B, C, N, D).
        mlp_ratio: hidden width of the feed-forward relative to `dim`.
        drop_rate: dropout after attention and feed-forward.
        drop_path: probability of dropping a residual branch while training.
        init_values: start of the scales.
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        mlp_ratio: float,
        drop_rate: float = 0.0,
        drop_path: float = 0.0,
        init_values: float = 1.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention
        self.drop = nn.Dropout(drop_rate)
        self.ls1 = LayerScale(dim, init_values)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop_rate)
        self.ls2 = LayerScale(dim, init_values)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Maps (B, C, N, D) to the same shape."""
        x = x + self.drop_path(self.ls1(self.drop(self.attn(self.norm1(x), context))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


def make_attention(
    kind: str,
    dim: int,
    num_heads: int,
    channel_dim_per_head: int,
    rank: int,
    shared_values: bool,
    bias: bool,
    dropout: float,
) -> nn.Module:
    """Returns an attention over the grid; see `LessViT` for the arguments."""
    if kind == "full":
        return JointAttention(dim, num_heads, bias, dropout)
    return LessAttention(
        dim,
        num_heads,
        channel_dim_per_head,
        rank,
        shared_values,
        additive=kind == "additive",
        bias=bias,
        dropout=dropout,
    )


def make_context(
    coordinates: Coordinates,
    field_radius: float | None,
    embedding: str,
    turned: tuple[int, int],
    limits: tuple[float, float],
) -> Context:
    """Returns what coordinates mean to blocks whose heads are `turned` in so many entries; see `LessViT`."""
    present = coordinates.present
    return Context(
        field=None if field_radius is None else field_mask(coordinates.metres, field_radius),
        present=None if present is None else F.pad(present, (1, 0), value=True),
        spectral=spectral_rotation(coordinates, turned[0], limits) if embedding == "rope" else None,
        spatial=spatial_rotation(coordinates, turned[1]) if embedding == "rope" else None,
    )


def turned_widths(
    kind: str, embedding: str | None, dim: int, num_heads: int, channel_dim_per_head: int, names: tuple[str, str, str]
) -> tuple[int, int]:
    """Returns how many entries of a head rotations turn by wavelength and by place.

    Args:
        kind: of attention; this and what follows as for `LessViT`.
        embedding: see there; None where tokens are not told their places.
        dim: width.
        num_heads: heads.
        channel_dim_per_head: the channels' share of a head's width.
        names: of the options that the last three are, for errors.

    Raises:
        ConfigError: heads do not make up the width, or the embedding cannot have these widths.
    """
    if kind == "full" and dim % num_heads:
        raise ConfigError(f"{names[0]} is {dim}; give a multiple of {names[1]}, {num_heads}")
    if kind != "full" and dim // num_heads < channel_dim_per_head:
        raise ConfigError(f"{names[2]} is {channel_dim_per_head}; a head has {dim // num_heads}: give that at most")
    if embedding == "sincos" and dim % 4:
        raise ConfigError(f"{names[0]} is {dim}; embedding=sincos needs a multiple of 4")
    width = dim // num_heads
    turned = (
        (width - width // 2, width // 2) if kind == "full" else (channel_dim_per_head, width // channel_dim_per_head)
    )
    if embedding == "rope" and (turned[0] % 2 or turned[1] % 4 or not turned[1]):
        option = f"{names[0]} or {names[1]}" if kind == "full" else names[2]
        raise ConfigError(
            f"embedding=rope needs an even width for channels and a multiple of 4 for positions in each head, here "
            f"{turned[0]} and {turned[1]}: change {option}"
        )
    return turned


def initialise(module: nn.Module) -> None:
    """Sets linear layers to Xavier's uniform start without bias; for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
