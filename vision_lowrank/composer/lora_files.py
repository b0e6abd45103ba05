"""LoRA files of text-to-image models, all read into one form and written in the layout of diffusers.

The layouts are described in `lora_layouts`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vision_lowrank import __version__
from vision_lowrank.adapters.peft_layout import lora_from_config
from vision_lowrank.composer.lora_layouts import COMPONENTS, TOKENS, LoraFileError, Place, locate, open_lora
from vision_lowrank.errors import AdapterError
from vision_lowrank.runs import atomic_path

_CONFIG = "adapter_config.json"
_DIFFUSERS_SETTINGS = "lora_adapter_metadata"


@dataclass(frozen=True)
class LowRank:
    """A change of one layer's weight: `scale up @ down`.

    Args:
        down: first factor (rank, in), or (rank, in, height, width) of a convolution with such a kernel.
        up: second factor (out, rank).
        scale: what the product is multiplied by.
    """

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Inner dimension of the product."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (out, in) of the weight that it changes, or (out, in, height, width)."""
        return (self.up.shape[0], *self.down.shape[1:])

    def fits(self, weight: Tensor) -> bool:
        """Says whether a weight has this shape; kernels of one position count as none, since files differ there."""
        return _without_single_kernel(self.shape) == _without_single_kernel(weight.shape)


@dataclass(frozen=True)
class LoraWeights:
    """What a LoRA file holds.

    Args:
        unet: changes by module name of the UNet, as diffusers names them.
        text_encoder: changes by module name of the text encoder, without `text_model.` in front.
        text_encoder_2: the same for the second text encoder.
        tokens: embeddings (layers, width) by token; more than one row where each cross-attention layer has its own,
            in the order in which the UNet runs them: down, middle, up.
        tokens_2: the same for the second text encoder.
        files: that all this was read from: the weights, and settings beside them that scale one of them.
    """

    unet: Mapping[str, LowRank] = field(default_factory=dict)
    text_encoder: Mapping[str, LowRank] = field(default_factory=dict)
    text_encoder_2: Mapping[str, LowRank] = field(default_factory=dict)
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    tokens_2: Mapping[str, Tensor] = field(default_factory=dict)
    files: tuple[Path, ...] = ()


def read_lora(path: str | Path) -> LoraWeights:
    """Reads a LoRA in any of the layouts of `lora_layouts`, on the CPU and in the precision of the file.

    The scale is alpha / rank with the file's `.alpha`, or else with the settings that diffusers writes into a file or
    peft beside it (`adapter_config.json`), or else 1, which is what Mix-of-Show means.

    Args:
        path: .safetensors, or .pth, .pt, .bin or .ckpt if it holds tensors alone; or the folder of peft or diffusers
            with such a file. A text encoder's own folder of peft counts as that of the first text encoder.

    Raises:
        LoraFileError: there is no such file; it is damaged, incomplete, holds code, weights that are not finite,
            a whole model, or more than plain LoRA of linear layers and convolutions.
    """
    file, tensors, metadata = open_lora(Path(path))
    settings = _Settings(file, metadata)
    tokens: dict[str, dict[str, Tensor]] = {name: {} for name in TOKENS}
    found: dict[tuple[str, str], dict[str, tuple[str, Place]]] = {}
    unknown = []
    for key, tensor in tensors.items():
        if (name := next((name for name, prefix in TOKENS.items() if key.startswith(prefix)), None)) is not None:
            tokens[name][key.removeprefix(TOKENS[name])] = _embedding(tensor, key, file)
        elif (place := locate(key)) is None:
            unknown.append(key)
        else:
            parts = found.setdefault((place.component, place.module), {})
            if place.part in parts:
                raise LoraFileError(
                    f"{file}: keys {parts[place.part][0]} and {key} are for the same layer; make one file of each LoRA"
                )
            parts[place.part] = (key, place)
    if unknown:
        raise LoraFileError(f"{file}: {_why_unknown(unknown)}")
    if not tensors:
        raise LoraFileError(f"{file} holds no tensors; save or copy the LoRA again")
    changes: dict[str, dict[str, LowRank]] = {component: {} for component in COMPONENTS}
    for (component, module), parts in found.items():
        changes[component][module] = _low_rank(tensors, parts, settings, file)
    files = (file, settings.config) if settings.beside_scales else (file,)
    return LoraWeights(**cast(Any, changes | tokens), files=files)


def write_lora(lora: LoraWeights, path: str | Path) -> None:
    """Writes a LoRA as `pipeline.load_lora_weights` of diffusers reads it, and its tokens, which diffusers passes over.

    The scales are in the file's metadata, where diffusers from 0.34 on looks for them; readers that do not take every
    scale for 1.

    Args:
        lora: what to write.
        path: a name that ends in .safetensors; an older file is replaced once the new one is whole.

    Raises:
        LoraFileError: the name ends otherwise, or there is nothing to write.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise LoraFileError(f"{path}: LoRAs are written as safetensors; give a name that ends in .safetensors")
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for component in COMPONENTS:
        changes: Mapping[str, LowRank] = getattr(lora, component)
        paths = {_path_in_file(component, module): change for module, change in changes.items()}
        for name, change in paths.items():
            kernel = (1,) * (change.down.ndim - 2)
            tensors[f"{component}.{name}.lora_A.weight"] = change.down
            tensors[f"{component}.{name}.lora_B.weight"] = change.up.reshape(*change.up.shape, *kernel)
        if paths:
            settings |= {f"{component}.{key}": value for key, value in _peft_settings(paths).items()}
    for kind, prefix in TOKENS.items():
        tensors |= {f"{prefix}{token}": embedding for token, embedding in getattr(lora, kind).items()}
    if not tensors:
        raise LoraFileError(f"{path}: the LoRA has neither layers nor tokens; there is nothing to write")
    metadata = {"format": "pt", "vision_lowrank": __version__}
    if settings:
        metadata[_DIFFUSERS_SETTINGS] = json.dumps(settings, sort_keys=True)
    with atomic_path(path) as temporary:
        # a copy of each, since safetensors refuses tensors that share memory
        copies = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
        save_file(copies, temporary, metadata)


def check_fits(
    lora: LoraWeights, unet: nn.Module, text_encoder: nn.Module, text_encoder_2: nn.Module | None = None
) -> None:
    """Refuses a LoRA that was made for another base model than this.

    Raises:
        LoraFileError: a layer is absent or of another shape, tokens have another width, or more embeddings than one,
            but not one for each cross-attention layer.
    """
    models = {"unet": unet, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    for component, model in models.items():
        changes: Mapping[str, LowRank] = getattr(lora, component)
        if changes and model is None:
            raise LoraFileError(f"the LoRA changes {component}, which this base does not have: use it with SDXL")
        layers = {} if model is None else {n.removeprefix("text_model."): m for n, m in model.named_modules()}
        for module, change in changes.items():
            weight = getattr(layers.get(module), "weight", None)
            if weight is None or not change.fits(weight):
                has = "no such layer" if weight is None else f"one of shape {tuple(weight.shape)}"
                raise LoraFileError(
                    f"the LoRA changes layer {module} of {component} with shape {change.shape}, this base has {has}: "
                    "use the LoRA with the base model that it was trained on"
                )
    cross_layers = sum(name.endswith(".attn2") for name, _ in unet.named_modules())
    for encoder, tokens in ((text_encoder, lora.tokens), (text_encoder_2, lora.tokens_2)):
        base_width = None if encoder is None else cast(Any, encoder).get_input_embeddings().embedding_dim
        for token, embedding in tokens.items():
            rows, width = embedding.shape
            if width != base_width:
                raise LoraFileError(
                    f"token {token} has embeddings of width {width}, the text encoder of this base {base_width}: "
                    "use the LoRA with the base model that it was trained on"
                )
            if rows not in (1, cross_layers):
                raise LoraFileError(
                    f"token {token} has embeddings for {rows} layers, this UNet has {cross_layers} cross-attention "
                    "layers: use the LoRA with the base model that it was trained on"
                )


class _Settings:
    """What diffusers wrote into a file, or peft beside it, on how its LoRA is scaled."""

    def __init__(self, file: Path, metadata: Mapping[str, str]) -> None:
        self.file, self.config = file, file.with_name(_CONFIG)
        self.inside = _parse(metadata.get(_DIFFUSERS_SETTINGS, "{}"), f"{file}, metadata {_DIFFUSERS_SETTINGS}")
        self.beside = _parse(self.config.read_bytes(), str(self.config)) if self.config.is_file() else {}
        self.beside_scales = False

    def scale(self, place: Place, rank: int, of_peft: bool) -> float:
        """Returns the scale of a layer whose file has no alpha, 1 without settings; those beside it are of peft."""
        prefix = f"{place.component}." if place.prefix == f"{place.component}." else ""
        inside = {key.removeprefix(prefix): value for key, value in self.inside.items() if key.startswith(prefix)}
        settings, source = (inside, self.file) if inside else (self.beside if of_peft else {}, self.config)
        if not settings:
            return 1.0
        self.beside_scales |= source == self.config
        try:
            lora = lora_from_config(settings, place.path, str(source))
        except AdapterError as error:
            raise LoraFileError(str(error)) from None
        if lora.rank != rank:
            raise LoraFileError(
                f"{source} says rank {lora.rank} for {place.path}, {self.file} has rank {rank}: they do not belong "
                "together; move the file away from settings of another, or save the LoRA again"
            )
        return lora.scaling


def _parse(text: str | bytes, source: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoraFileError(f"{source} is not valid JSON ({error}): save or copy the LoRA again") from None
    if not isinstance(settings, dict):
        raise LoraFileError(f"{source} holds a {type(settings).__name__}, not settings: save the LoRA again")
    return settings


def _low_rank(
    tensors: Mapping[str, Tensor], parts: Mapping[str, tuple[str, Place]], settings: _Settings, file: Path
) -> LowRank:
    for part, partner in (("down", "up"), ("up", "down"), ("alpha", "down")):
        if part in parts and partner not in parts:
            raise LoraFileError(f"{file}: key {parts[part][0]} has no {partner} factor; the file is incomplete")
    (down_key, place), (up_key, _) = parts["down"], parts["up"]
    down, up = _factor(tensors[down_key], down_key, file), _factor(tensors[up_key], up_key, file)
    if math.prod(up.shape[2:]) != 1:
        raise LoraFileError(
            f"{file}: {up_key} has shape {tuple(up.shape)}; in LoRA of convolutions only the first factor has a kernel "
            "larger than one position: use another file"
        )
    up = up.flatten(1)
    rank = down.shape[0]
    if rank != up.shape[1] or rank == 0:
        raise LoraFileError(
            f"{file}: {down_key} has shape {tuple(down.shape)}, {up_key} {tuple(up.shape)}; the first axis of one must "
            "be the second of the other, the rank: save the LoRA again"
        )
    if "alpha" in parts:
        alpha_key = parts["alpha"][0]
        alpha = _finite(tensors[alpha_key], alpha_key, file)
        if alpha.numel() != 1 or alpha.is_complex():
            raise LoraFileError(
                f"{file}: {alpha_key} has shape {tuple(alpha.shape)} and type {alpha.dtype}, not one number: save anew"
            )
        scale = alpha.item() / rank
    else:
        scale = settings.scale(place, rank, of_peft=".lora_A." in down_key)
    return LowRank(down, up, scale)


def _factor(tensor: Tensor, key: str, file: Path) -> Tensor:
    if tensor.ndim not in (2, 4) or not tensor.is_floating_point():
        raise LoraFileError(
            f"{file}: {key} has shape {tuple(tensor.shape)} and type {tensor.dtype}; only LoRA of linear layers and 2D "
            "convolutions in floating point is read: use another file"
        )
    return _finite(tensor, key, file)


def _embedding(tensor: Tensor, key: str, file: Path) -> Tensor:
    """Returns embeddings with two axes (layers, width)."""
    if tensor.ndim not in (1, 2) or tensor.numel() == 0 or key in TOKENS.values():
        raise LoraFileError(
            f"{file}: {key} has shape {tuple(tensor.shape)}; embeddings are (layers, width), and of a token with a name"
        )
    return _finite(torch.atleast_2d(tensor), key, file)


def _finite(tensor: Tensor, key: str, file: Path) -> Tensor:
    if not tensor.float().isfinite().all():
        raise LoraFileError(f"{file}: {key} has values that are not finite; its training went astray, use another one")
    return tensor


def _without_single_kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if math.prod(shape[2:]) != 1 else shape[:2]


def _why_unknown(keys: list[str]) -> str:
    middle = next((key for key in keys if "lora_mid." in key), None)
    if middle is not None:
        return (
            f"{middle} is a third factor (Tucker decomposition of a convolution), which is not read: train the LoRA "
            "without it (use_tucker=False, use_cp=False), or use another file"
        )
    whole = next((key for key in keys if key.endswith((".weight", ".bias")) and "lora" not in key), None)
    if whole is not None:
        return (
            f"{whole} is a whole weight, so this is a model, perhaps with LoRA merged into it (combined_model), or "
            "more than plain LoRA: give the file of the LoRA itself"
        )
    return (
        f"key {keys[0]} ({len(keys)} such) is not part of plain LoRA of a Stable Diffusion UNet or its CLIP text "
        "encoders; DoRA, LoHa, LoKr and other architectures are not read: use another file"
    )


def _path_in_file(component: str, module: str) -> str:
    # what other files say too; diffusers drops text_model. for encoders that lack it
    return f"text_model.{module}" if component != "unet" and not module.startswith("text_projection") else module


def _peft_settings(changes: Mapping[str, LowRank]) -> dict[str, Any]:
    """Describes ranks and scales as peft's LoraConfig."""
    ranks = {path: change.rank for path, change in changes.items()}
    alphas = {path: change.scale * change.rank for path, change in changes.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    bare = {path: path.removeprefix("text_model.") for path in changes}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(bare[path]): value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(bare[path]): value for path, value in alphas.items() if value != alpha},
        "target_modules": list(bare.values()),
    }
