"""Segmentation with LESS ViT: tokens to maps, maps to logits of every pixel.

    tokens (B, C, N, D) after chosen blocks -> one a position (B, N, D) -> maps (B, D, h, w) -> head
    -> logits (B, K, h p, w p) -> cropped to the image (B, K, H, W)

`B` batch, `C` channels, `N` = `h w` positions, `D` width, `p` patch side, `K` classes, `H W` height and width of the
image in pixels.
"""

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from vision_lowrank.argument_types import check_least
from vision_lowrank.errors import ConfigError
from vision_lowrank.models.layers.fused_attention import fused_attention
from vision_lowrank.models.less_vit import LessViT, Wavelengths
from vision_lowrank.models.saved import note_settings

CHANNELS_OF_A_GROUP = 8


class AttentiveChannelPool(nn.Module):
    """One learned query attends, at each position by itself, to the channels there.

    A key projection would only turn the query, which is learned anyway, so there is none. Values are projected after
    the weighted mean, which is exact and C times cheaper.

    Args:
        dim: width D.
        num_heads: heads.

    Raises:
        ConfigError: there are no heads, or they do not divide the width.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        check_least(1, num_heads=num_heads)
        if dim % num_heads:
            raise ConfigError(f"width {dim} is no multiple of its {num_heads} heads of the channel pool")
        self.query = nn.Parameter(torch.empty(num_heads, dim).normal_(std=0.02))
        self.value = nn.Parameter(torch.empty(num_heads, dim, dim // num_heads).normal_(std=dim**-0.5))
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, present: Tensor | None = None) -> Tensor:
        """Maps (B, C, N, D) to (B, N, D); `present` bool (B, C), False for channels that only pad the batch."""
        tokens = rearrange(tokens, "b c n d -> b n c d")
        query = self.query.expand(*tokens.shape[:2], -1, -1)
        mask = None if present is None else present[:, None, None]
        # the heads are queries of one attention, since all of them see the same keys
        means = fused_attention(query, tokens, tokens, mask, scale=1.0)
        out: Tensor = self.proj(torch.einsum("bnhd,hde->bnhe", means, self.value).flatten(2))
        return out


class LinearSegmentationHead(nn.Module):
    """A linear classifier for each of the p p pixels of a patch.

    Bilinear upsampling of one classifier a patch has p p times fewer weights, but shows nothing smaller than a patch
    (160 m at 16 pixels of 10 m) and mixes neighbouring patches at every border.

    Args:
        dim: width D of the map.
        num_classes: number of logits K.
        patch_size: pixels along a side of a position.
    """

    def __init__(self, dim: int, num_classes: int, patch_size: int) -> None:
        super().__init__()
        self.dim = dim
        self.patch_size = patch_size
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Puts a new classifier in place of the present one."""
        self.classifier = _classifier(self.dim, num_classes, self.patch_size**2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, D, h, w) to logits (B, K, h p, w p)."""
        return F.pixel_shuffle(self.classifier(x), self.patch_size)


def quarters(depth: int) -> list[int]:
    """Returns the indices of the blocks, of `depth` in all, that UPerNet takes its four maps from.

    Raises:
        ConfigError: there are fewer than four.
    """
    if depth < 4:
        raise ConfigError(f"the encoder has {depth} blocks; UPerNet takes maps from four, use head=linear")
    return [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]


class UPerNetHead(nn.Module):
    """UPerNet on four maps of one resolution, made into a pyramid as in arXiv 2203.16527.

    The decoder is that of segmentation-models-pytorch with GroupNorm instead of BatchNorm, which cannot train on a
    batch of one (the coarsest pool has a single position) and depends on what else is in a batch.

    Args:
        dims: widths of the maps, those of earlier blocks first; the maps are scaled by 4, 2, 1 and 1/2.
        num_classes: number of logits K.
        patch_size: pixels along a side of a position.
        decoder_dim: width of the decoder.

    Raises:
        ConfigError: there are not four maps, or the decoder's width cannot be grouped.
    """

    def __init__(self, dims: Sequence[int], num_classes: int, patch_size: int, decoder_dim: int = 256) -> None:
        super().__init__()
        # nothing else in the package needs this library
        from segmentation_models_pytorch.base.initialization import initialize_decoder
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

        if len(dims) != 4:
            raise ConfigError(f"UPerNet was given {len(dims)} widths, {list(dims)}; it takes four maps")
        if decoder_dim < 1 or decoder_dim % CHANNELS_OF_A_GROUP:
            raise ConfigError(f"decoder_dim is {decoder_dim}; give a multiple of {CHANNELS_OF_A_GROUP}")
        self.patch_size = patch_size
        self.decoder_dim = decoder_dim
        first, second, third, fourth = dims
        self.four = nn.Sequential(
            nn.ConvTranspose2d(first, first // 2, 2, stride=2),
            LayerNorm2d(first // 2),
            nn.GELU(),
            nn.ConvTranspose2d(first // 2, first // 4, 2, stride=2),
        )
        self.two = nn.ConvTranspose2d(second, second // 2, 2, stride=2)
        # the decoder passes over the first two levels of its encoder, whatever they are
        self.decoder = UPerNetDecoder([0, 0, first // 4, second // 2, third, fourth], decoder_channels=decoder_dim)
        initialize_decoder(self.decoder)
        _group_norms(self.decoder)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Puts a new classifier in place of the present one; the decoder stays."""
        self.classifier = _classifier(self.decoder_dim, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps four (B, D, h, w) to logits (B, K, h p, w p)."""
        first, second, third, fourth = maps
        height, width = fourth.shape[-2:]
        # halves of odd sides are adaptive, so that resizing in the decoder puts them back where they came from
        half = F.adaptive_max_pool2d(fourth, (-(-height // 2), -(-width // 2)))
        x = self.decoder([first, first, self.four(first), self.two(second), third, half])
        size = (height * self.patch_size, width * self.patch_size)
        return F.interpolate(self.classifier(x), size=size, mode="bilinear")


class LessSegmentation(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="vision-lowrank",
    license="apache-2.0",
    tags=["remote-sensing"],
    coders={LessViT: (lambda encoder: encoder.settings, lambda settings: LessViT(**settings))},
):
    """LESS ViT with a head that gives every pixel its logits, for images with any channels, height and width.

    Args:
        encoder: the model that makes tokens; its own head is removed.
        head: linear: on the last block. upernet: on the blocks at each quarter of the depth.
        num_classes: number of logits K.
        channel_pool: True: maps are pooled from the channels' tokens. False: maps are the tokens of no channel.
        pool_heads: attention heads of the channel pools.
        decoder_dim: width of the UPerNet decoder.

    Raises:
        ConfigError: settings contradict each other.
    """

    def __init__(
        self,
        encoder: LessViT,
        head: Literal["linear", "upernet"],
        num_classes: int,
        channel_pool: bool = False,
        pool_heads: int = 6,
        decoder_dim: int = 256,
    ) -> None:
        super().__init__()
        encoder.reset_classifier(0)
        self.encoder = encoder
        dim, depth, patch_size = encoder.num_features, len(encoder.blocks), encoder.patch_size
        self.head: LinearSegmentationHead | UPerNetHead
        if head == "linear":
            self.indices = [depth - 1]
            self.head = LinearSegmentationHead(dim, num_classes, patch_size)
        elif head == "upernet":
            self.indices = quarters(depth)
            self.head = UPerNetHead([dim] * 4, num_classes, patch_size, decoder_dim)
        else:
            raise ConfigError(f"head is {head!r}; it can be linear or upernet")
        self.num_classes = num_classes
        count = len(self.indices) if channel_pool else 0
        self.channel_pools = nn.ModuleList(AttentiveChannelPool(dim, pool_heads) for _ in range(count))

    def forward(
        self,
        image: Tensor | None,
        wavelengths: Wavelengths | None,
        gsd: Tensor | float,
        radar: Tensor | None = None,
        radar_wavelengths: Wavelengths | None = None,
        present: Tensor | None = None,
    ) -> Tensor:
        """Maps a batch to logits (B, K, H, W); arguments and errors as for `LessViT.patches`."""
        found = self.encoder.forward_intermediates(
            *(image, wavelengths, gsd, radar, radar_wavelengths, present, self.indices),
            norm=True,
            output_fmt="BCND" if self.channel_pools else "NCHW",
            intermediates_only=True,
        )
        maps = cast(list[Tensor], found)
        height, width = cast(Tensor, radar if image is None else image).shape[-2:]
        if self.channel_pools:
            rows = -(-height // self.encoder.patch_size)
            pooled = [pool(x[:, 1:, 1:], present) for pool, x in zip(self.channel_pools, maps, strict=True)]
            maps = [rearrange(x, "b (i j) d -> b d i j", i=rows) for x in pooled]
        # not by the head's class, which adapters may wrap
        logits = self.head(maps[0] if len(self.indices) == 1 else maps)
        return cast(Tensor, logits)[..., :height, :width]

    def get_classifier(self) -> nn.Module:
        """Returns the layer that makes logits."""
        return self.head.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Puts a new layer for `num_classes` in place of the one that makes logits; the rest of the head stays."""
        self.num_classes = num_classes
        note_settings(self, num_classes=num_classes)
        self.head.reset_classifier(num_classes)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters that weight decay must leave alone."""
        queries = {f"channel_pools.{index}.query" for index in range(len(self.channel_pools))}
        return queries | {f"encoder.{name}" for name in self.encoder.no_weight_decay()}


def _classifier(dim: int, num_classes: int, pixels: int = 1) -> nn.Conv2d:
    """Returns a layer that maps (B, dim, h, w) to logits (B, num_classes pixels, h, w)."""
    if num_classes < 1:
        raise ConfigError(f"num_classes is {num_classes}; segmentation needs at least 1")
    return nn.Conv2d(dim, num_classes * pixels, 1)


def _group_norms(module: nn.Module) -> None:
    """Puts GroupNorm in place of each BatchNorm inside a module."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            # a group of one channel would have a single value where the map is one position
            setattr(module, name, nn.GroupNorm(child.num_features // CHANNELS_OF_A_GROUP, child.num_features))
        else:
            _group_norms(child)
