"""LoLA-SpecViT as its authors' code ran it (arXiv 2506.17759; FadiZidiDz/LoLA-SpecViT-Model, commit 664c45d).

Kept on purpose: zero padding of windows takes part in the attention, a plain mean over depth erases which component
carried what, and gate and residual of every adapted layer are dense. Our own model is `models.lola_specvit`.

    x (batch, components, side, side) -> 3D convolutions (batch, dim, components, side, side) -> mean over components
    -> patch embedding (batch, side // 2, side // 2, dim) -> levels of blocks, between them half the side and twice the
    width -> LayerNorm -> mean over positions -> logits (batch, classes)

`B` is the batch, `C` the width of a level, `h w` its map.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath
from torch import Tensor, nn

from vision_lowrank.adapters import AdaptedLayer, GatedLoRA, LoRA, inject
from vision_lowrank.errors import CheckpointError, ConfigError
from vision_lowrank.models.official.lola_blocks import Block, Reduce, SqueezeExcitation, Swish

# our names of the parts of an adapted layer, and the original's
_ADAPTED_NAMES = {
    "base.weight": "linear.weight",
    "base.bias": "linear.bias",
    "adapters.default.lora_A.weight": "lora_down.weight",
    "adapters.default.lora_B.weight": "lora_up.weight",
    "adapters.default.gate.weight": "lora_gate.weight",
    "adapters.default.residual.weight": "lora_residual.weight",
}
_STRENGTH = ".adapters.default.strength"


@dataclasses.dataclass(frozen=True)
class LolaSpecViTConfig:
    """Settings under the original's names and with its defaults.

    Attributes:
        num_classes: number of logits.
        in_channels: spectral components of the input.
        dim: width of the first level.
        depths: blocks in each level.
        num_heads: attention heads in each level.
        window_size: side of the attention window in each level, in positions.
        mlp_ratio: width of the feed-forward relative to the level's.
        drop_path_rate: rate of dropping a residual branch at the last block; it grows linearly from 0.
        spatial_size: side of the input patch in pixels.
        r: rank of the low-rank branches.
        lora_alpha: numerator of their scale.
    """

    num_classes: int
    in_channels: int = 15
    dim: int = 96
    depths: tuple[int, ...] = (3, 4, 19)
    num_heads: tuple[int, ...] = (4, 8, 16)
    window_size: tuple[int, ...] = (7, 7, 7)
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.2
    spatial_size: int = 15
    r: int = 16
    lora_alpha: float = 32


class OfficialLolaSpecViT(nn.Module):
    """The original network, its base frozen and its low-rank, gate and residual matrices trainable.

    Args:
        config: the settings.
    """

    def __init__(self, config: LolaSpecViTConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.dim * 2**level for level in range(len(config.depths))]
        side = config.spatial_size // 2
        self.spectral_conv = nn.Sequential(
            *_convolution_3d(1, 32, depth=7),
            *_convolution_3d(32, 64, depth=5),
            *_convolution_3d(64, config.dim, depth=3),
        )
        self.spectral_attention = SqueezeExcitation(config.dim)
        self.patch_embed = nn.Sequential(
            nn.Conv2d(config.dim, config.dim, 4, stride=2, padding=1), nn.BatchNorm2d(config.dim), Swish()
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, side, side, config.dim))
        rates = iter(np.linspace(0.0, config.drop_path_rate, sum(config.depths)).tolist())
        self.levels = nn.ModuleList()
        sizes = zip(widths, config.depths, config.num_heads, config.window_size, strict=True)
        for width, depth, heads, window in sizes:
            level = [Block(width, heads, window, config.mlp_ratio, DropPath(next(rates))) for _ in range(depth)]
            self.levels.append(nn.ModuleList([*level, Reduce(width)] if width < widths[-1] else level))
        self.norm = nn.LayerNorm(widths[-1])
        self.head = nn.Linear(widths[-1], config.num_classes)
        gated = GatedLoRA(config.r, config.lora_alpha, gate_rank=None)
        inject(self, ["attn.qkv", "attn.proj", "mlp.0", "mlp.3"], gated)
        inject(self, "head", LoRA(config.r, config.lora_alpha))

    def forward(self, x: Tensor) -> Tensor:
        """Maps patches (batch, components, side, side) to logits (batch, classes).

        Raises:
            ConfigError: the patches are not of the configured shape.
        """
        return self.head(self.forward_intermediates(x)["mid.pooled"])

    def forward_intermediates(self, x: Tensor) -> dict[str, Tensor]:
        """Returns what flows between the parts, up to `mid.pooled` (batch, width), the input of the head.

        Raises:
            ConfigError: the patches are not of the configured shape.
        """
        expected = (self.config.in_channels, self.config.spatial_size, self.config.spatial_size)
        if tuple(x.shape[1:]) != expected:
            raise ConfigError(f"patches of shape {tuple(x.shape)}: this configuration takes (batch, *{expected})")
        mid: dict[str, Tensor] = {}
        x = self.spectral_conv(x.unsqueeze(1))
        kept = F.dropout(x.new_ones(*x.shape[:3], 1, 1), 0.1, self.training)  # whole (channel, component) maps
        mid["frontend_band_mean"] = x = self.spectral_attention(x * kept).mean(2)
        mid["patch_embed"] = x = rearrange(self.patch_embed(x), "B C h w -> B h w C")
        mid["patch_embed_pos"] = x = F.dropout(x + self.pos_embed, 0.1, self.training)
        for i, level in enumerate(self.levels):
            for j, part in enumerate(level.children()):
                if isinstance(part, Reduce):
                    x = part(x)
                    continue
                x, windows = part(x)
                mid[f"level{i}_block{j}"] = x
                if i == j == 0:
                    mid["level0_block0_attn_windows"] = windows
            mid[f"level{i}_out"] = x
        mid["final_norm"] = x = self.norm(rearrange(x, "B h w C -> B (h w) C"))
        mid["pooled"] = x.mean(1)
        return {f"mid.{name}": value for name, value in mid.items()}

    def original_names(self) -> dict[str, str]:
        """Returns the original's name of every parameter and buffer that it has, by our name."""
        names = {name: name for name in self.state_dict() if not name.endswith(_STRENGTH)}
        for path, module in self.named_modules():
            if isinstance(module, AdaptedLayer):
                parts = {f"{path}.{ours}": f"{path}.{original}" for ours, original in _ADAPTED_NAMES.items()}
                names.update((ours, original) for ours, original in parts.items() if ours in names)
        return names


def lola_specvit(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> OfficialLolaSpecViT:
    """Rebuilds a trained original in evaluation mode.

    Args:
        state_dict: the original's own, under its own names.
        config: settings under the names of `LolaSpecViTConfig`; the original's defaults stand in for absent ones.

    Raises:
        ConfigError: an unknown or contradictory setting.
        CheckpointError: tensors are missing, unknown or of another shape than the settings ask for.
    """
    model = OfficialLolaSpecViT(_parse(config))
    names = model.original_names()
    own = model.state_dict()
    expected = {original: own[ours].shape for ours, original in names.items()}
    if missing := [name for name in expected if name not in state_dict]:
        raise CheckpointError(f"state dict lacks {_list(missing)}: it is incomplete or of another configuration")
    if unknown := [name for name in state_dict if name not in expected]:
        raise CheckpointError(f"state dict holds unknown {_list(unknown)}: take them out or correct the configuration")
    for name, shape in expected.items():
        if state_dict[name].shape != shape:
            raise CheckpointError(
                f"{name} has shape {tuple(state_dict[name].shape)}, the configuration asks for {tuple(shape)}: pass "
                "the configuration that the weights were trained with"
            )
    model.load_state_dict({ours: state_dict[original] for ours, original in names.items()}, strict=False)
    return model.eval()


def build_lola_specvit(config: Mapping[str, Any]) -> OfficialLolaSpecViT:
    """Builds the original with random weights, as its training starts; in training mode.

    As there, one normal distribution fills all linear weights, the up-projections of the adapters too, so that the
    adapters are not the identity at start.

    Args:
        config: as `lola_specvit`; `{"num_classes": 9}` gives the full size of 254.6 million parameters.

    Raises:
        ConfigError: an unknown or contradictory setting.
    """
    model = OfficialLolaSpecViT(_parse(config))
    original = model.original_names()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            linear = parameter.ndim == 2 and name.endswith("weight")
            if linear or name.endswith(("pos_embed", "relative_position_bias_table")):
                nn.init.trunc_normal_(parameter, std=0.02)
            elif original[name].endswith(".linear.bias") or ".mlp.1." in name:
                nn.init.zeros_(parameter)
    return model


def _parse(config: Mapping[str, Any]) -> LolaSpecViTConfig:
    known = {field.name for field in dataclasses.fields(LolaSpecViTConfig)}
    if unknown := set(config) - known:
        raise ConfigError(
            f"unknown setting {_list(sorted(unknown))} of the original LoLA-SpecViT; known: {', '.join(known)}"
        )
    if "num_classes" not in config:
        raise ConfigError("the original LoLA-SpecViT has no default for num_classes: give the number of classes")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    parsed = LolaSpecViTConfig(**values)
    if not len(parsed.depths) == len(parsed.num_heads) == len(parsed.window_size):
        raise ConfigError(
            f"depths={parsed.depths}, num_heads={parsed.num_heads} and window_size={parsed.window_size} differ in "
            "length: give one value a level in each"
        )
    return parsed


def _convolution_3d(channels: int, out: int, depth: int) -> list[nn.Module]:
    padding = (depth // 2, 1, 1)
    return [nn.Conv3d(channels, out, (depth, 3, 3), padding=padding), nn.BatchNorm3d(out), Swish()]


def _list(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
