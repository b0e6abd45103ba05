"""Channel-wise ViT: joint attention over one token a channel and patch (ChannelViT, arXiv 2309.16108).

    image (B, C, H, W) -> patches of single channels through one embedding (B, C, h w, D)
    + what was learned of each position and each channel index -> class token before (B, 1 + C h w, D)
    -> blocks -> LayerNorm -> features of patches (B, D, h, w), of images (B, D)

`B` batch, `C` channels, `H W` height and width in pixels, `h w` rows and columns of patches, `D` width.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from timm.layers import LayerNorm, resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vision_lowrank.argument_types import check_least
from vision_lowrank.errors import ConfigError
from vision_lowrank.models.encoders import pad_to_patches
from vision_lowrank.models.heads import quarters
from vision_lowrank.models.layers.grid_block import initialise


class ChannelViT(nn.Module):
    """An `Encoder` for the channels, in their order, that `prepare` was told of; it ignores wavelengths and gsd.

    A patch's features are the mean over channels of its tokens, an image's the class token. Attention costs the square
    of C h w: suited to a dozen channels, not to hundreds. Channels are not dropped while training, unlike in the paper.

    Args:
        patch_size: side of a patch in pixels.
        embed_dim: width D.
        depth: number of blocks.
        num_heads: attention heads.
        grid_size: rows and columns that positions are learned for; other grids take them resampled bicubically.
        mlp_ratio: hidden width of the feed-forward relative to the width.

    Raises:
        ConfigError: a size is below 1, or the heads do not divide the width.
    """

    def __init__(
        self,
        patch_size: int = 8,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        grid_size: int = 8,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        check_least(1, patch_size=patch_size, embed_dim=embed_dim, num_heads=num_heads, grid_size=grid_size)
        if embed_dim % num_heads:
            raise ConfigError(f"embed_dim is {embed_dim}; give a multiple of num_heads, {num_heads}")
        self.dim = embed_dim
        self.patch_size = patch_size
        self.grid_size = grid_size
        self.name = f"channel_vit {embed_dim} x {depth} (random)"
        self.patch_embed = nn.Conv2d(1, embed_dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.empty(embed_dim).normal_(std=0.02))
        self.pos_embed = nn.Parameter(torch.empty(1, grid_size**2, embed_dim).normal_(std=0.02))
        self.channel_embed = nn.Parameter(torch.empty(0, embed_dim))
        self.blocks = nn.Sequential(
            *(Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth))
        )
        self.norm = LayerNorm(embed_dim)
        self.blocks.apply(initialise)

    def prepare(self, wavelengths: Sequence[float]) -> None:
        """Gives each channel an embedding, random and in place of former ones."""
        self.channel_embed = nn.Parameter(self.cls_token.new_empty(len(wavelengths), self.dim).normal_(std=0.02))

    def prepare_radar(self, channels: int) -> None:
        """Does nothing: channels are known by their index."""

    def forward_tokens(self, image: Tensor) -> Tensor:
        """Returns the normalised tokens (B, 1 + C h w, D) of images (B, C, H, W), those of a channel together.

        Raises:
            ConfigError: there are other channels than the model was built for.
        """
        tokens: Tensor = self.norm(self.blocks(self._embed(image)))
        return tokens

    def _embed(self, image: Tensor) -> Tensor:
        """Returns the tokens before the first block."""
        if image.shape[1] != len(self.channel_embed):
            raise ConfigError(
                f"{self.name} was built for {len(self.channel_embed)} channels, the images {tuple(image.shape)} have "
                f"{image.shape[1]}; call prepare with their wavelengths, which makes new embeddings"
            )
        padded = pad_to_patches(image, self.patch_size)
        patches = self.patch_embed(rearrange(padded, "b c h w -> (b c) 1 h w"))
        places = resample_abs_pos_embed(self.pos_embed, list(patches.shape[-2:]), [self.grid_size] * 2, 0)
        x = rearrange(patches, "(b c) d i j -> b c (i j) d", c=image.shape[1])
        x = (x + places + self.channel_embed[:, None]).flatten(1, 2)
        return torch.cat([self.cls_token.expand(len(x), 1, -1).to(x.dtype), x], 1)

    def forward_patch_features(self, image: Tensor, wavelengths: Tensor, gsd: Tensor | float) -> Tensor:
        """Returns (B, D, h, w); see `forward_tokens`."""
        return self._map(self.forward_tokens(image), image)

    def forward_patch_maps(self, image: Tensor, wavelengths: Tensor, gsd: Tensor | float) -> list[Tensor]:
        """Returns four (B, D, h, w); see `Encoder`. ConfigError: there are fewer blocks, or as `forward_tokens`."""
        taken, maps = quarters(len(self.blocks)), []
        x = self._embed(image)
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in taken:
                maps.append(self._map(self.norm(x), image))
        return maps

    def _map(self, tokens: Tensor, image: Tensor) -> Tensor:
        """Averages tokens (B, 1 + C h w, D) of images over their channels."""
        rows = -(-image.shape[-2] // self.patch_size)
        means = tokens[:, 1:].unflatten(1, (image.shape[1], -1)).mean(1)
        return rearrange(means, "b (i j) d -> b d i j", i=rows)

    def forward_image_features(self, image: Tensor, wavelengths: Tensor, gsd: Tensor | float) -> Tensor:
        """Returns (B, D); see `forward_tokens`."""
        return self.forward_tokens(image)[:, 0]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters that weight decay must leave alone."""
        return {"cls_token", "pos_embed", "channel_embed"}
