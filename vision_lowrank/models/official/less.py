"""LESS ViT and Hyper-MAE as their authors' code ran them (uiuctml/GeospatialFM at 3b53776 and uiuctml/LESSViT).

The mathematics is that of our own models, with the originals' choices: places in patches times pixel size, and decoders
without rotation. `code` tells which code a state dict is from: "paper" (values shared by all ranks, ranks summed) or
"succ" (values per rank, ranks averaged).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vision_lowrank.errors import CheckpointError, ConfigError, DataError
from vision_lowrank.models.hyper_mae import HyperMAE, Noise, Seen
from vision_lowrank.models.layers.kronecker_attention import Context, LowRankAttention
from vision_lowrank.models.less_vit import LessViT, Patches

# the originals' names, and ours
_RENAMED = (
    (r"(optical|radar)_patch_embed\.proj\.", r"patch_embed.\1."),
    # the paper's code has the parts of the attention beside each other
    (r"(blocks\.\d+)\.(low_dim_pool|channel_norm|spatial_norm)\.", r"\1.attn.\2."),
    (r"(blocks\.\d+)\.attn\.(channel_branch|spatial_branch|proj)\.", r"\1.attn.attn.\2."),
    (r"^decoder\.decoder_(optical|radar)_pred\.", r"decoder_pred.\1."),
    (r"^decoder\.(?:decoder_)?", r"decoder_"),
)
# the rotation's range is that of the data set in the original, whose loader scales wavelengths to it
_SCALED = (0.0, 1.0)
# what the original calls the wavelengths of radar channels, VV and VH
_RADAR = (5500.0, 5700.0)
_ALL_PASSES: tuple[Seen, ...] = ("optical", "radar", "multi")


class OfficialKroneckerAttention(nn.Module):
    """The bare attention between channel tokens and position tokens.

    Args:
        attention: holds the weights.
    """

    def __init__(self, attention: LowRankAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x_c: Tensor, x_s: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps (B, C, channel_dim), (B, N, spatial_dim) and a bool mask (N, N) or (B, 1, N, N) to (B, C, N, D)."""
        field = None if mask is None else mask.reshape(-1, 1, *mask.shape[-2:])
        y: Tensor = self.attention(x_c, x_s, Context(field=field))
        return y


class OfficialLessViT(nn.Module):
    """The encoder.

    Args:
        model: holds the weights.
    """

    def __init__(self, model: LessViT) -> None:
        super().__init__()
        self.model = model

    def forward_tokens(
        self,
        image: Tensor | None,
        wavelengths: Tensor | None,
        gsd: float,
        radar: Tensor | None = None,
        radar_wavelengths: Tensor | None = None,
    ) -> Tensor:
        """Maps images (B, C, H, W) and wavelengths to normalised tokens (B, 1 + C, 1 + N, D).

        Wavelengths are in nanometres; with rotation, on the scale from 0 to 1 of the original's data set. Two radar
        channels have the numbers of the original where none are given.

        Raises:
            DataError: channels without wavelengths, or with another number of them.
        """
        return self.model.encode(_cut(self.model, image, wavelengths, gsd, radar, radar_wavelengths))


class OfficialHyperMAE(nn.Module):
    """The masked autoencoder.

    Args:
        model: holds the weights.
        passes: which channels are seen, pass by pass: optical, radar or multi.
        radar_wavelengths: of the radar channels, where the images come with some.
    """

    def __init__(self, model: HyperMAE, passes: Sequence[Seen], radar_wavelengths: Sequence[float] | None) -> None:
        super().__init__()
        self.model = model
        self.passes = passes
        self.radar_wavelengths = radar_wavelengths

    def loss(
        self,
        image: Tensor | None,
        wavelengths: Tensor | None,
        gsd: float,
        noise: Sequence[Tensor],
        radar: Tensor | None = None,
        radar_wavelengths: Tensor | None = None,
    ) -> Tensor:
        """Returns the loss, summed over passes.

        Args:
            image: optical channels (B, C, H, W).
            wavelengths: in nanometres (C,), (1, C) or (B, C); with rotation as for `OfficialLessViT`.
            gsd: pixel size in metres.
            noise: for each pass, of channels (B, channels) and of positions (B or 1, N); the smallest are kept.
            radar: radar channels (B, C', H, W).
            radar_wavelengths: of theirs; by default those of the specification.

        Raises:
            ConfigError: not two noise tensors a pass, or nothing stays visible.
            DataError: channels without wavelengths, or with another number of them.
        """
        if radar is not None and radar_wavelengths is None and self.radar_wavelengths is not None:
            radar_wavelengths = torch.tensor(self.radar_wavelengths)
        patches = _cut(self.model.encoder, image, wavelengths, gsd, radar, radar_wavelengths)
        if len(noise) != 2 * len(self.passes):
            raise ConfigError(f"{len(noise)} noise tensors; this model takes 2 for each of {', '.join(self.passes)}")
        pairs = [Noise(noise[index], noise[index + 1]) for index in range(0, len(noise), 2)]
        losses = [
            self.model.reconstruct(patches, seen, drawn).loss for seen, drawn in zip(self.passes, pairs, strict=True)
        ]
        return torch.stack(losses).sum()


def kronecker_attention(state_dict: Mapping[str, Tensor], spec: Mapping[str, Any]) -> OfficialKroneckerAttention:
    """Builds the bare low-rank attention of the original, in evaluation mode.

    Args:
        state_dict: under the original's names.
        spec: has `config` and `code`, "paper" or "succ".

    Raises:
        ConfigError: `code` is neither, or a setting is missing.
        CheckpointError: state dict and configuration do not match.
    """
    config = _config(spec, "dim", "channel_dim", "spatial_dim", "num_heads", "qkv_bias")
    attention = LowRankAttention(
        *(config["dim"], config["channel_dim"], config["spatial_dim"], config["num_heads"], config.get("rank", 1)),
        shared_values=spec["code"] == "paper",
        bias=config["qkv_bias"],
    )
    _load(attention, state_dict)
    return OfficialKroneckerAttention(attention).eval()


def less_vit(state_dict: Mapping[str, Tensor], spec: Mapping[str, Any]) -> OfficialLessViT:
    """Builds the original's encoder, in evaluation mode; arguments and errors as for `kronecker_attention`."""
    model = _encoder(spec)
    _load(model, _converted(state_dict, model))
    return OfficialLessViT(model).eval()


def hyper_mae(state_dict: Mapping[str, Tensor], spec: Mapping[str, Any]) -> OfficialHyperMAE:
    """Builds the original's masked autoencoder, in evaluation mode.

    Args:
        state_dict: under the original's names.
        spec: has also `mask_ratio`, `channel_mask_ratio`, `modal` (optical, radar or multi; None for three passes) and
            `radar_wavelengths` (or None).

    Raises:
        ConfigError: see `kronecker_attention`.
        CheckpointError: see there.
    """
    needed = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads", "decoder_channel_embed_dims_per_head")
    config = _config(spec, *needed, "norm_pix_loss")
    if absent := [name for name in ("mask_ratio", "channel_mask_ratio") if name not in spec]:
        raise ConfigError(f"the specification lacks {', '.join(absent)}; take it from the same run")
    if spec.get("modal") not in (None, *_ALL_PASSES):
        raise ConfigError(f"modal is {spec['modal']!r}; it can be {', '.join(_ALL_PASSES)}, or None for all three")
    model = HyperMAE(
        _encoder(spec),
        decoder_dim=config["decoder_embed_dim"],
        decoder_depth=config["decoder_depth"],
        decoder_heads=config["decoder_num_heads"],
        decoder_channel_dim_per_head=config["decoder_channel_embed_dims_per_head"],
        mask_ratio=spec["mask_ratio"],
        channel_mask_ratio=spec["channel_mask_ratio"],
        normalise_targets=config["norm_pix_loss"],
        variance_floor=1e-6,
        decoder_rotation=False,
    )
    _load(model, _converted(state_dict, model))
    passes: Sequence[Seen] = _ALL_PASSES if spec.get("modal") is None else (spec["modal"],)
    return OfficialHyperMAE(model, passes, spec.get("radar_wavelengths")).eval()


def _encoder(spec: Mapping[str, Any]) -> LessViT:
    config = _config(spec, "patch_size", "embed_dim", "depth", "num_heads", "channel_embed_dims_per_head")
    rotated = config.get("use_rope_embed", False)
    return LessViT(
        patch_size=config["patch_size"],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        channel_dim_per_head=config["channel_embed_dims_per_head"],
        rank=config.get("rank", 1),
        shared_values=spec["code"] == "paper",
        embedding="rope" if rotated else "sincos",
        position_unit="patches",
        wavelength_range=_SCALED,
        field_radius=config["attention_radius"] if config.get("use_perception_field_mask") else None,
        mlp_ratio=config.get("mlp_ratio", 4.0),
        qkv_bias=config.get("qkv_bias", True),
        init_values=config.get("init_values") or 1.0,
    )


def _config(spec: Mapping[str, Any], *needed: str) -> Mapping[str, Any]:
    if spec.get("code") not in ("paper", "succ"):
        raise ConfigError(f"code is {spec.get('code')!r}; it can be paper or succ")
    config: Mapping[str, Any] = spec.get("config", {})
    if absent := [name for name in needed if name not in config]:
        raise ConfigError(f"the original's configuration lacks {', '.join(absent)}; take it from the same run")
    return config


def _converted(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Returns the weights under our names; the model's scales of layers, which are 1, where the original has none.

    Raises:
        CheckpointError: periods of a rotation, which are no weights of ours, are others than ours.
    """
    weights = {}
    for name, value in state_dict.items():
        if ".periods_" in f".{name}":
            expected = 100.0 ** (torch.arange(value.numel()) / value.numel())
            # the original may keep them in bfloat16
            if not torch.allclose(value.flatten().float(), expected, rtol=1e-2):
                raise CheckpointError(f"{name} holds other periods than powers of 100, the base that is known here")
        else:
            weights[_rename(name)] = _reshape(name, value)
    if any(".ls1." in name for name in weights):
        return weights
    scales = (".ls1.gamma", ".ls2.gamma")
    return {name: value for name, value in model.state_dict().items() if name.endswith(scales)} | weights


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _reshape(name: str, value: Tensor) -> Tensor:
    """Turns kernels as large as a patch into matrices, and tokens (1, 1, D) into (D,)."""
    if "patch_embed" in name and value.ndim == 5:
        return value.flatten(1)
    return value.reshape(-1) if name.endswith(("cls_token", "mask_token")) else value


def _load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"the state dict is not of this configuration ({error}); take both from one run, and code from it"
        ) from error


def _cut(
    model: LessViT,
    image: Tensor | None,
    wavelengths: Tensor | None,
    gsd: float,
    radar: Tensor | None,
    radar_wavelengths: Tensor | None,
) -> Patches:
    if radar is not None and radar_wavelengths is None and model.embedding == "sincos":
        radar_wavelengths = torch.tensor(_RADAR)
    parts, values = [], []
    for kind, part, given in (("image", image, wavelengths), ("radar", radar, radar_wavelengths)):
        if part is not None:
            if given is None:
                raise DataError(f"{kind} channels {tuple(part.shape)} come without wavelengths; give one for each")
            parts.append(part)
            told = torch.as_tensor(given, dtype=torch.float32)
            if told.shape[-1:] != part.shape[1:2]:
                raise DataError(
                    f"{kind} channels {tuple(part.shape)} have wavelengths {tuple(told.shape)}; give as many"
                )
            values.append(told.expand(part.shape[:2]))
    if not parts:
        raise DataError("neither an image nor radar channels are given")
    pixels = torch.cat(parts, 1)
    optical = 0 if image is None else image.shape[1]
    return model.cut(pixels, torch.cat(values, 1), torch.full((len(pixels),), float(gsd)), optical)
