"""Image conditions: features of a ControlNet or a T2I-Adapter, added inside the UNet at every pass.

`B` is the number of rows of a pass. Images are (1, channels, height, width), from 0 to 1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from vision_lowrank.errors import CheckpointError, ConfigError

_MIDDLE = "mid_block_additional_residual"


class Condition(Protocol):
    """What an image adds inside a UNet2DConditionModel."""

    @property
    def strength(self) -> float:
        """What its features are multiplied by."""

    def check(self, unet: Any) -> None:
        """Raises ConfigError where it does not fit the UNet."""

    def latent_size(self, unet: Any) -> tuple[int, int]:
        """Returns height and width of the latents that its image belongs to."""

    def residuals(
        self, sample: Tensor, timestep: Tensor | int, prompts: Tensor, added: Mapping[str, Tensor]
    ) -> dict[str, list[Tensor]]:
        """Returns features (B, channels, height, width) by the UNet's argument; see `residuals_of`."""


@dataclass(frozen=True)
class _ImageCondition:
    """An image and the model that is shown it.

    Args:
        model: a ControlNetModel, whose parameters get no gradient, or a T2IAdapter of diffusers.
        image: what it is shown.
        strength: what its features are multiplied by.
        name: for messages.

    Raises:
        ConfigError: another kind of model, an image of a wrong shape, or a strength that is negative or not finite.
    """

    model: Any
    image: Tensor
    strength: float = 1.0
    name: str = "condition"


@dataclass(frozen=True)
class ControlCondition(_ImageCondition):
    """An image that a ControlNet turns, with latents and prompts of each pass, into features; see `_ImageCondition`."""

    def __post_init__(self) -> None:
        _check_model(self, "ControlNetModel")
        _check_image(self, self.model.config.conditioning_channels, self._factor)

    @property
    def _factor(self) -> int:
        """Pixels along a side of a latent: each but the first layer of the embedding halves the image."""
        return 2 ** (len(self.model.config.conditioning_embedding_out_channels) - 1)

    def check(self, unet: Any) -> None:
        """Raises ConfigError where the ControlNet is of another base model, or pools its features."""
        config, levels = self.model.config, len(unet.config.block_out_channels)
        for key in ("in_channels", "cross_attention_dim", "block_out_channels", "layers_per_block"):
            if _each(config[key], levels) != _each(unet.config[key], levels):
                raise ConfigError(
                    f"{self.name}: {key} of the ControlNet is {config[key]}, of the UNet {unet.config[key]}; it belongs"
                    " to another base model"
                )
        if config.addition_embed_type not in (None, unet.config.addition_embed_type):
            raise ConfigError(f"{self.name}: the ControlNet takes {config.addition_embed_type}, which the base lacks")
        if config.global_pool_conditions:
            raise ConfigError(f"{self.name}: ControlNets with global_pool_conditions are not supported; take another")
        if (self.model.dtype, self.model.device) != (unet.dtype, unet.device):
            raise ConfigError(
                f"{self.name}: the ControlNet is {self.model.dtype} on {self.model.device}, the UNet {unet.dtype} on "
                f"{unet.device}; bring it there"
            )

    def latent_size(self, unet: Any) -> tuple[int, int]:
        """Returns height and width of the latents that the image belongs to."""
        return self.image.shape[2] // self._factor, self.image.shape[3] // self._factor

    def residuals(
        self, sample: Tensor, timestep: Tensor | int, prompts: Tensor, added: Mapping[str, Tensor]
    ) -> dict[str, list[Tensor]]:
        """Runs the ControlNet; see `residuals_of`."""
        # gradients are for the latents alone
        weights = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        options = {
            "controlnet_cond": self.image.to(sample).expand(len(sample), -1, -1, -1),
            "conditioning_scale": self.strength,
            "added_cond_kwargs": dict(added),
            "return_dict": False,
        }
        down, middle = functional_call(self.model, weights, (sample, timestep, prompts), options)
        return {"down_block_additional_residuals": list(down), _MIDDLE: [middle]}


@dataclass(frozen=True)
class AdapterCondition(_ImageCondition):
    """An image that a T2I-Adapter turns into features once; see `_ImageCondition`."""

    def __post_init__(self) -> None:
        _check_model(self, "T2IAdapter")
        _check_image(self, self.model.config.in_channels, self.model.downscale_factor)

    @cached_property
    def features(self) -> list[Tensor]:
        """Features (1, channels, height, width) times the strength, finest first."""
        with torch.no_grad():
            return [
                feature * self.strength for feature in self.model(self.image.to(self.model.device, self.model.dtype))
            ]

    def check(self, unet: Any) -> None:
        """Raises ConfigError where the features do not have the channels and sizes of the UNet's levels."""
        height, width = self.latent_size(unet)
        expected = [
            (channels, math.ceil(height / factor), math.ceil(width / factor))
            for channels, factor in zip(unet.config.block_out_channels, _adapter_factors(unet), strict=True)
        ]
        found = [tuple(feature.shape[1:]) for feature in self.features]
        if found[: len(expected)] != expected:
            raise ConfigError(
                f"{self.name}: features of the T2I-Adapter are {found} (channels, height, width), the UNet takes "
                f"{expected}; it belongs to another base model"
            )

    def latent_size(self, unet: Any) -> tuple[int, int]:
        """Returns height and width of the latents that the image belongs to."""
        height, width = self.features[0].shape[2:]
        factor = _adapter_factors(unet)[0]
        return height * factor, width * factor

    def residuals(
        self, sample: Tensor, timestep: Tensor | int, prompts: Tensor, added: Mapping[str, Tensor]
    ) -> dict[str, list[Tensor]]:
        """Returns the features for every row; see `residuals_of`."""
        rows = [feature.to(sample).expand(len(sample), -1, -1, -1) for feature in self.features]
        return {"down_intrablock_additional_residuals": rows}


def residuals_of(
    conditions: Sequence[Condition],
    unet: Any,
    sample: Tensor,
    timestep: Tensor | int,
    prompts: Tensor,
    added: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Returns the sum of what the conditions add, as arguments for one call of the UNet, which empties the lists.

    Args:
        conditions: those of a strength of 0 are not run.
        unet: a UNet2DConditionModel.
        sample: scaled latents (B, channels, height, width).
        timestep: their timestep.
        prompts: embeddings of the whole image's prompts (B, T, width).
        added: what the UNet takes besides, (B, ...).

    Raises:
        ConfigError: the image of a condition is for latents of another size.
    """
    total: dict[str, Any] = {}
    for index, condition in enumerate(conditions):
        size = condition.latent_size(unet)
        if size != tuple(sample.shape[2:]):
            raise ConfigError(
                f"condition {index}: its image is for latents of {size[0]} x {size[1]}, these have {sample.shape[2]} x "
                f"{sample.shape[3]}; give an image of the composition's size, and a model for this base"
            )
        if condition.strength == 0:
            continue
        for name, features in condition.residuals(sample, timestep, prompts, added).items():
            total[name] = [one + other for one, other in zip_longest(total.get(name, ()), features, fillvalue=0)]
    if _MIDDLE in total:
        (total[_MIDDLE],) = total[_MIDDLE]
    return total


def load_condition(
    kind: str, model: str, image: Path, strength: float, unet: Any, height: int, width: int, name: str
) -> Condition:
    """Loads a model and the image it is shown.

    Args:
        kind: controlnet or t2i_adapter.
        model: folder of the model, or a name on the hub.
        image: file of any size.
        strength: what the model's features are multiplied by.
        unet: the base's, whose precision and device the model gets.
        height: what the image is brought to.
        width: what the image is brought to.
        name: for messages.

    Raises:
        ConfigError: an unknown kind, an image that cannot be read, or one of the errors of the condition's class.
        CheckpointError: the model cannot be found or read, is of another kind, or is not finite.
    """
    import diffusers

    classes: dict[str, tuple[Any, Any, str]] = {
        "controlnet": (ControlCondition, diffusers.ControlNetModel, "conditioning_channels"),
        "t2i_adapter": (AdapterCondition, diffusers.T2IAdapter, "in_channels"),
    }
    if kind not in classes:
        raise ConfigError(f"{name}: kind is {kind!r}; it can be {' or '.join(classes)}")
    made, model_class, key = classes[kind]
    try:
        # a model of another kind would load with random weights
        found = model_class.load_config(model).get("_class_name")
        loaded = model_class.from_pretrained(model, torch_dtype=unet.dtype) if found == model_class.__name__ else None
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{name}: {model} cannot be loaded ({reason[:300]}); give a folder or a name on the hub"
        ) from error
    if loaded is None:
        raise CheckpointError(f"{name}: {model} is a {found}; for kind {kind} give a {model_class.__name__}")
    if not all(parameter.isfinite().all() for parameter in loaded.parameters()):
        raise CheckpointError(f"{name}: {model} holds numbers that are not finite; download it again")
    pixels = read_image(image, loaded.config[key], height, width, name)
    condition: Condition = made(loaded.to(unet.device).eval(), pixels.to(unet.device), strength, name)
    condition.check(unet)
    return condition


def read_image(path: Path, channels: int, height: int, width: int, name: str) -> Tensor:
    """Reads an image as (1, channels, height, width), from 0 to 1.

    Args:
        path: file of any size.
        channels: 1 for shades of grey, 3 for colours.
        height: what it is brought to.
        width: what it is brought to.
        name: for messages.

    Raises:
        ConfigError: it is missing, no image, or has more than 8 bits a channel; or another number of channels.
    """
    from PIL import Image, ImageOps

    if channels not in (1, 3):
        raise ConfigError(f"{name}: the model takes {channels} channels; images have 1 or 3")
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
    except OSError as error:
        reason = "there is no such file" if not path.exists() else "no image that can be read"
        raise ConfigError(f"{name}: image {path}: {reason}; give a PNG or JPEG file") from error
    if picture.mode[0] in "IF":
        raise ConfigError(f"{name}: image {path} has mode {picture.mode}; save it with 8 bits a channel")
    picture = picture.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture, dtype=np.float32).reshape(height, width, channels)
    return torch.from_numpy(pixels / 255).permute(2, 0, 1)[None]


def _check_model(condition: _ImageCondition, kind: str) -> None:
    import diffusers

    if not isinstance(condition.model, getattr(diffusers, kind)):
        raise ConfigError(f"{condition.name}: the model is a {type(condition.model).__name__}; give a {kind}")
    if not 0 <= condition.strength < math.inf:
        raise ConfigError(f"{condition.name}: strength is {condition.strength}; give a number from 0 up")


def _check_image(condition: _ImageCondition, channels: int, factor: int) -> None:
    shape = tuple(condition.image.shape)
    if len(shape) != 4 or shape[:2] != (1, channels) or shape[2] % factor or shape[3] % factor:
        raise ConfigError(
            f"{condition.name}: its image is {shape}; give (1, {channels}, height, width), both multiples of {factor}"
        )


def _adapter_factors(unet: Any) -> list[int]:
    """Returns for each level the latents along a side of a position where the UNet adds an adapter's features."""
    kinds = unet.config.down_block_types
    # levels without cross-attention add them after they have halved the map, which the last does not
    plain = [not kind.startswith("CrossAttn") and level + 1 < len(kinds) for level, kind in enumerate(kinds)]
    return [2 ** (level + after) for level, after in enumerate(plain)]


def _each(value: Any, levels: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * levels
