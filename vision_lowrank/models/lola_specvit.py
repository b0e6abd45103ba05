"""LoLA-SpecViT: spectral 3D convolutions, windowed attention with SwiGLU, a pooled head (arXiv 2506.17759).

The idea is the paper's; the design is ours where the authors' code contradicts it (`models.official` keeps that code's
behaviour). Components are the depth axis of the convolutions and keep their identity through the collapse, windows are
clipped to the map, padding is masked, and the base is trained.

    image (B, D, S, S) -> stem (B, C, h, h) -> + position embedding -> stages of blocks (B, h, h, C), between two stages
    half the side and twice the width -> LayerNorm -> mean over positions beside the centre (B, 2 C) -> logits (B, K)

`B` batch, `D` components, `S` patch side in pixels, `C` width, `h` side of the map, `K` classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from timm.layers import DropPath, SwiGLU
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import Tensor, nn

from vision_lowrank.argument_types import check_least
from vision_lowrank.errors import ConfigError
from vision_lowrank.models.layers.spectral_stem import SpectralStem
from vision_lowrank.models.layers.window_attention import WindowAttention
from vision_lowrank.models.saved import note_settings


class Block(nn.Module):
    """Pre-norm window attention and SwiGLU feed-forward.

    Args:
        dim: width.
        num_heads: attention heads.
        window_size: side of the attention windows.
        map_size: side of the map.
        mlp_ratio: hidden width of the feed-forward relative to `dim`.
        drop_path: probability of dropping a residual branch while training.
    """

    def __init__(
        self, dim: int, num_heads: int, window_size: int, map_size: int, mlp_ratio: float, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size, map_size)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = SwiGLU(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, map, map, dim) to the same shape."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Downsample(nn.Module):
    """Halves the side (rounded up) and doubles the width.

    Args:
        dim: width before.
        map_size: side of the map before.
    """

    def __init__(self, dim: int, map_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        # a single position has no neighbours, and PyTorch 2.14 trains a padded kernel on it wrongly (see SpectralStem)
        kernel = 3 if map_size > 1 else 1
        self.reduction = nn.Conv2d(dim, 2 * dim, kernel, stride=2, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, map, map, dim) to (batch, ceil(map / 2), ceil(map / 2), 2 dim)."""
        return self.reduction(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class LolaSpecViT(
    nn.Module, PyTorchModelHubMixin, library_name="vision-lowrank", license="apache-2.0", tags=["hyperspectral"]
):
    """LoLA-SpecViT for patches of hyperspectral scenes.

    Args:
        in_chans: spectral components or bands of a patch.
        num_classes: number of logits; 0 for features.
        img_size: side of a patch in pixels, odd.
        stem_channels: channels of the 3D convolutions.
        stem_depths: their kernel lengths along the components.
        dim: width of the first stage; each further stage has twice the width of the one before.
        depths: blocks in each stage.
        num_heads: attention heads in each stage.
        window_size: side of the attention windows in positions.
        mlp_ratio: hidden width of the feed-forward relative to the stage's.
        drop_rate: dropout before the head while training.
        drop_path_rate: probability of dropping a residual branch at the last block; it grows linearly from 0.

    Raises:
        ConfigError: settings contradict each other.
    """

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        img_size: int,
        stem_channels: Sequence[int] = (8, 16, 32),
        stem_depths: Sequence[int] = (7, 5, 3),
        dim: int = 64,
        depths: Sequence[int] = (2,),
        num_heads: Sequence[int] = (4,),
        window_size: int = 7,
        mlp_ratio: float = 2.0,
        drop_rate: float = 0.1,
        drop_path_rate: float = 0.1,
    ) -> None:
        super().__init__()
        if len(depths) != len(num_heads):
            raise ConfigError(f"depths={depths} and num_heads={num_heads} differ in length: give one value a stage")
        check_least(1, in_chans=in_chans, img_size=img_size, dim=dim, window_size=window_size)
        self.in_chans = in_chans
        self.img_size = img_size
        self.stem = SpectralStem(in_chans, img_size, stem_channels, stem_depths, dim)
        size = self.stem.map_size
        self.pos_embed = nn.Parameter(torch.zeros(1, size, size, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.stages = nn.ModuleList()
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            parts: list[nn.Module] = []
            if stage:
                parts.append(Downsample(dim, size))
                dim, size = 2 * dim, -(-size // 2)
            parts += [Block(dim, heads, window_size, size, mlp_ratio, next(rates)) for _ in range(depth)]
            self.stages.append(nn.Sequential(*parts))
        self.norm = nn.LayerNorm(dim)
        self.num_features = self.head_hidden_size = 2 * dim
        self.drop = nn.Dropout(drop_rate)
        self.head: nn.Module
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps patches (batch, in_chans, img_size, img_size) to the last map (batch, map, map, dim).

        Raises:
            ConfigError: the patches have another shape.
        """
        if tuple(x.shape[1:]) != (self.in_chans, self.img_size, self.img_size):
            raise ConfigError(
                f"patches of shape {tuple(x.shape)}: this model takes (batch, {self.in_chans}, {self.img_size}, "
                f"{self.img_size}); build it with in_chans and img_size of the data"
            )
        x = self.stem(x).permute(0, 2, 3, 1) + self.pos_embed
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps a map (batch, map, map, dim) to logits (batch, num_classes), or to features (batch, num_features)."""
        centre = x.shape[1] // 2
        pooled = self.drop(torch.cat([x.mean((1, 2)), x[:, centre, centre]], dim=1))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Maps patches (batch, in_chans, img_size, img_size) to logits (batch, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Returns the head."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Puts a new head for `num_classes` in place of the present one; 0 leaves the features as they are."""
        self.num_classes = num_classes
        note_settings(self, num_classes=num_classes)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns which parameters belong to one layer, as timm's layer-wise learning rates read it.

        Args:
            coarse: a stage is a group, not each of its blocks.
        """
        stages = [
            # what leads to a stage belongs to its first block, whose number is then 1
            (r"^stages\.(\d+)\.0\.(?:norm\.|reduction\.)", (1,)),
            (r"^stages\.(\d+)\.(\d+)", None),
        ]
        return {
            "stem": r"^stem|^pos_embed",
            "blocks": [*([(r"^stages\.(\d+)", None)] if coarse else stages), (r"^norm", MATCH_PREV_GROUP)],
        }

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters that weight decay must leave alone."""
        return {name for name, _ in self.named_parameters() if name.endswith(("pos_embed", "relative_bias"))}


default_cfgs = generate_default_cfgs(
    {name: {"classifier": "head"} for name in ("lola_specvit_tiny", "lola_specvit_small", "lola_specvit_base")}
)


def _create(name: str, pretrained: bool, sizes: dict[str, Any], given: dict[str, Any]) -> LolaSpecViT:
    if given.get("features_only"):
        raise ConfigError(f"{name} has no features_only; take forward_features, the map before the head")
    model: LolaSpecViT = build_model_with_cfg(LolaSpecViT, name, pretrained, **(sizes | given))
    return model


@register_model
def lola_specvit_tiny(pretrained: bool = False, **kwargs: Any) -> LolaSpecViT:
    """One stage of width 64; about 0.2 million parameters."""
    return _create("lola_specvit_tiny", pretrained, {}, kwargs)


@register_model
def lola_specvit_small(pretrained: bool = False, **kwargs: Any) -> LolaSpecViT:
    """Two stages of widths 96 and 192; about 1.5 million parameters."""
    sizes = {"dim": 96, "depths": (2, 2), "num_heads": (4, 8)}
    return _create("lola_specvit_small", pretrained, sizes, kwargs)


@register_model
def lola_specvit_base(pretrained: bool = False, **kwargs: Any) -> LolaSpecViT:
    """Three stages of widths 128 to 512; about 20 million parameters."""
    sizes = {"stem_channels": (16, 32, 64), "dim": 128, "depths": (2, 2, 6), "num_heads": (4, 8, 16)}
    return _create("lola_specvit_base", pretrained, sizes, kwargs)
