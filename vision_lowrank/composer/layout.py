"""What belongs where: scenes, boxes, their cells on maps of any resolution, and what overlapping boxes may see.

Cells are (top, left, bottom, right), the ends exclusive. A map has `N = height width` positions, row by row. `T` is the
number of a prompt's tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from vision_lowrank.composer.conditions import Condition
from vision_lowrank.composer.lora_files import LowRank
from vision_lowrank.errors import AdapterError, ConfigError

_PARTS = ("down_blocks", "mid_block", "up_blocks")
_BLOCKS = {
    *("CrossAttnDownBlock2D", "DownBlock2D", "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
    *("CrossAttnUpBlock2D", "UpBlock2D"),
}
# a LoRA by module name of the UNet, and its strength
Lora: TypeAlias = tuple[Mapping[str, LowRank], float]
Cells: TypeAlias = tuple[int, int, int, int]
CellPolicy: TypeAlias = Literal["nearest", "inner"]
OverlapPolicy: TypeAlias = Literal["own", "official"]
# a UNet2DConditionModel; annotations of diffusers lack most of its attributes
UNet: TypeAlias = Any

# fractions made from pixels reach the middle of a cell only up to rounding
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Box:
    """A rectangle, its edges in fractions of the image's height and width.

    Args:
        top: upper edge.
        left: left edge.
        bottom: lower edge.
        right: right edge.

    Raises:
        ConfigError: the box is empty, inverted or leaves the image.
    """

    top: float
    left: float
    bottom: float
    right: float

    def __post_init__(self) -> None:
        edges = (self.top, self.left, self.bottom, self.right)
        # written so that NaN fails too
        if not all(0 <= edge <= 1 for edge in edges):
            raise ConfigError(f"box {edges} leaves the image; top, left, bottom, right are fractions from 0 to 1")
        if self.top >= self.bottom or self.left >= self.right:
            raise ConfigError(f"box {edges} is empty or inverted; the order is top, left, bottom, right")

    @classmethod
    def from_pixels(cls, top: float, left: float, bottom: float, right: float, height: int, width: int) -> "Box":
        """Makes a box from edges in pixels of an image of that height and width; errors as for the class."""
        return cls(top / height, left / width, bottom / height, right / width)

    def cells(self, height: int, width: int, policy: CellPolicy = "nearest") -> Cells | None:
        """Returns the box's cells on a map, or None where it has none.

        Args:
            height: rows of the map.
            width: columns of the map.
            policy: nearest: edges go to the nearest border of cells, so boxes that touch stay side by side; a box
                smaller than a cell gets the one in which its middle lies. inner: only cells that lie inside as a
                whole, as in the original code; small boxes have none.

        Raises:
            ConfigError: no such policy.
        """
        top, bottom = _interval(self.top, self.bottom, height, policy)
        left, right = _interval(self.left, self.right, width, policy)
        return (top, left, bottom, right) if bottom > top and right > left else None


def _interval(start: float, end: float, cells: int, policy: CellPolicy) -> tuple[int, int]:
    if policy == "inner":
        return math.ceil(start * cells), math.floor(end * cells)
    if policy != "nearest":
        raise ConfigError(f"policy of cells is {policy!r}; it can be nearest or inner")
    first, last = (math.floor(edge * cells + 0.5 + _ROUNDING) for edge in (start, end))
    if last > first:
        return first, last
    middle = min(int((start + end) / 2 * cells + _ROUNDING), cells - 1)
    return middle, middle + 1


@dataclass(frozen=True)
class Text:
    """An encoded prompt.

    Args:
        positive: embeddings (layers, T, width); one layer serves all cross-attention layers.
        negative: of the negative prompt, likewise.
    """

    positive: Tensor
    negative: Tensor


@dataclass(frozen=True)
class Region:
    """A concept in its box.

    Args:
        box: where.
        text: its prompts, encoded by its own text encoder.
        tokens: positions of the concept's tokens in the positive prompt, counted from its first token, the start sign.
        loras: the changes of its keys, values and output projections, and of other layers where these are asked for.
    """

    box: Box
    text: Text
    tokens: Sequence[int]
    loras: Sequence[Lora] = ()


@dataclass(frozen=True)
class Scene:
    """What is to be composed.

    Args:
        text: the prompts of the whole image.
        regions: the concepts.
        background: LoRAs of the whole image; regions keep the base's keys, values and output projections.
        added: what the UNet needs besides, such as `text_embeds` of SDXL, (2, ...) with the negative row first.
        conditions: images whose features are added inside the UNet.
    """

    text: Text
    regions: Sequence[Region] = ()
    background: Sequence[Lora] = ()
    added: Mapping[str, Tensor] = field(default_factory=dict)
    conditions: Sequence[Condition] = ()


class Places:
    """The regions' positions on maps of one resolution.

    Args:
        boxes: one a region.
        size: height and width of the map.
        cells: see `Box.cells`.
        overlaps: which positions attend to which, where regions exist. own: all but those of boxes that the query is
            in none of, so that a position in two boxes sees both. official: it sees neither, not even itself, unless
            there is nothing else to see.
        device: where the tensors live.

    Raises:
        ConfigError: no such policy.
    """

    def __init__(
        self,
        boxes: Sequence[Box],
        size: tuple[int, int],
        cells: CellPolicy = "nearest",
        overlaps: OverlapPolicy = "own",
        device: torch.device | str = "cpu",
    ) -> None:
        if overlaps not in ("own", "official"):
            raise ConfigError(f"policy of overlaps is {overlaps!r}; it can be own or official")
        self.size = size
        self.cells = [box.cells(*size, cells) for box in boxes]
        self.overlaps = overlaps
        masks = torch.zeros(len(boxes), *size, dtype=torch.bool, device=device)
        for mask, found in zip(masks, self.cells, strict=True):
            if found is not None:
                mask[found[0] : found[2], found[1] : found[3]] = True
        self.masks = masks.flatten(1)  # (regions, N)

    @cached_property
    def positions(self) -> list[Tensor]:
        """Positions (n,) of each region."""
        return [mask.nonzero().squeeze(1) for mask in self.masks]

    @cached_property
    def outside(self) -> Tensor:
        """Positions (n,) in no region."""
        return (~self.masks.any(0)).nonzero().squeeze(1)

    @cached_property
    def shares(self) -> Tensor:
        """For each position (N,) the share of one region in it: 1 over their number, 1 where there is none."""
        return 1 / self.masks.sum(0).clamp(min=1).double()

    @cached_property
    def _classes(self) -> tuple[Tensor, Tensor]:
        """For each position (N,) its class, which tells in what boxes it is; which classes see which (C, C)."""
        members, of_position = torch.unique(self.masks.T, dim=0, return_inverse=True)
        # the product of integers is missing on some devices
        members = members.double()
        count = members.sum(1)
        shared = members @ members.T
        if self.overlaps == "own":
            return of_position, (shared > 0) | (count[:, None] == 0) | (count == 0)
        # pairs of different regions, the query in the one and the key in the other; each pair costs the score the same
        pairs = count[:, None] * count - shared
        return of_position, pairs == pairs.amin(1, keepdim=True)

    @cached_property
    def views(self) -> tuple[Tensor, Tensor] | None:
        """The view (N,) of each position; what each view has, bool (views, N). None where all see all."""
        if not any(self.cells):
            return None
        of_position, seen = self._classes
        if seen.all():
            return None
        rows, view = torch.unique(seen, dim=0, return_inverse=True)
        return view[of_position], rows[:, of_position]

    @cached_property
    def groups(self) -> list[tuple[Tensor, Tensor]] | None:
        """Positions (n,) of queries that see the same keys, with those keys (m,); None where all see all."""
        if self.views is None:
            return None
        view, seen = self.views
        return [((view == index).nonzero().squeeze(1), row.nonzero().squeeze(1)) for index, row in enumerate(seen)]

    @cached_property
    def order(self) -> Tensor:
        """Indices (N,) that put the queries of all `groups`, one after the other, back in their places."""
        return torch.cat([queries for queries, _ in self.groups or []]).argsort()

    @cached_property
    def visible(self) -> Tensor:
        """Which key (second axis) each query (first axis) sees, bool (N, N)."""
        of_position, seen = self._classes
        return seen[of_position][:, of_position]


def checked_layers(unet: UNet, scene: Scene, map_factor: int) -> tuple[list[str], list[str]]:
    """Returns the names of all cross-attention layers and of those whose maps count, once all is known to fit.

    Raises:
        ConfigError: another architecture, exchanged attention layers, no layer for maps, or text or a condition that
            does not fit.
        AdapterError: a LoRA does not fit the UNet, or is not finite.
    """
    check_architecture(unet)
    layers = cross_layers(unet)
    _check_scene(unet, scene, len(layers))
    return layers, _layers_at(unet, layers, map_factor) if scene.regions else []


def cross_layers(unet: UNet) -> list[str]:
    """Returns the names of the cross-attention layers: down, middle, up."""
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    return sorted(
        (name for name in names if name.endswith(".attn2")), key=lambda name: _PARTS.index(name.split(".")[0])
    )


def _layers_at(unet: UNet, layers: Sequence[str], factor: int) -> list[str]:
    levels = len(unet.config.block_out_channels)
    factors: dict[str, int] = {}
    for name in layers:
        part, index = name.split(".")[:2]
        if part != "mid_block":
            factors[name] = 2 ** (int(index) if part == "down_blocks" else levels - 1 - int(index))
    found = [name for name, own in factors.items() if own == factor]
    if not found:
        choices = sorted(set(factors.values()))
        raise ConfigError(f"map_factor is {factor}; the UNet has cross-attention at {', '.join(map(str, choices))}")
    return found


def check_architecture(unet: UNet) -> None:
    """Refuses what is not a UNet of Stable Diffusion 1, 2 or XL with its own attention layers.

    Raises:
        ConfigError: it is something else.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    if not isinstance(unet, UNet2DConditionModel):
        raise ConfigError(
            f"the model is a {type(unet).__name__}; LoRA-Composer takes UNets of Stable Diffusion 1, 2, XL"
        )
    model: UNet = unet
    config = model.config
    odd = {*config.down_block_types, config.mid_block_type, *config.up_block_types} - _BLOCKS - {None}
    flags = ("only_cross_attention", "dual_cross_attention", "encoder_hid_dim_type", "cross_attention_norm")
    found = sorted(odd) + [name for name in flags if config[name] not in (None, False)]
    # what only these bases are given: parts of an image, classes, boxes, or the scale of guidance
    usual = {
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "attention_type": ("default",),
        "addition_embed_type": (None, "text_time"),
        "time_cond_proj_dim": (None,),
    }
    found += [f"{name} {config[name]}" for name, values in usual.items() if config[name] not in values]
    if config.in_channels != config.out_channels:
        found.append(f"{config.in_channels} channels for {config.out_channels}")
    if found:
        raise ConfigError(f"the UNet has {', '.join(found)}; LoRA-Composer takes those of Stable Diffusion 1, 2, XL")
    for name, processor in model.attn_processors.items():
        if not isinstance(processor, AttnProcessor | AttnProcessor2_0):
            kind = type(processor).__name__
            raise ConfigError(f"{name} is a {kind}; call unet.set_default_attn_processor() before composing")


def _check_scene(unet: UNet, scene: Scene, layers: int) -> None:
    width = unet.config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    texts = {"the image": scene.text} | {f"region {index}": region.text for index, region in enumerate(scene.regions)}
    for owner, text in texts.items():
        for kind, tensor in (("positive", text.positive), ("negative", text.negative)):
            fits = tensor.ndim == 3 and tensor.shape[0] in (1, layers) and tensor.shape[2] == width
            if not fits or tensor.shape[1] != text.positive.shape[1]:
                raise ConfigError(
                    f"{kind} text of {owner} is {tuple(tensor.shape)}; this UNet takes (1 or {layers}, tokens, {width})"
                    " with as many tokens in the negative text as in the positive"
                )
            if not tensor.isfinite().all():
                raise ConfigError(f"{kind} text of {owner} is not finite; look for NaN in the text encoder or its LoRA")
    for index, region in enumerate(scene.regions):
        count = region.text.positive.shape[1]
        if not region.tokens or not all(0 <= token < count for token in region.tokens):
            raise ConfigError(
                f"tokens of region {index} are {list(region.tokens)}; give positions from 0 to {count - 1}"
            )
        for lora, _ in region.loras:
            _check_lora(unet, lora, f"LoRA of region {index}")
    for lora, _ in scene.background:
        _check_lora(unet, lora, "LoRA of the background")
    for condition in scene.conditions:
        condition.check(unet)


def _check_lora(unet: UNet, lora: Mapping[str, LowRank], owner: str) -> None:
    modules = dict(unet.named_modules())
    for name, change in lora.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            raise AdapterError(f"{owner}: the UNet has no layer {name}; the LoRA belongs to another base model")
        if not change.fits(weight):
            raise AdapterError(
                f"{owner}: the weight of {name} is {tuple(weight.shape)}, the LoRA's {change.shape}; it belongs to "
                "another base model"
            )
        if change.up.shape[1] != change.down.shape[0]:
            raise AdapterError(f"{owner}: factors of {name} have ranks {change.down.shape[0]} and {change.up.shape[1]}")
        if not (change.up.isfinite().all() and change.down.isfinite().all()):
            raise AdapterError(f"{owner}: {name} holds numbers that are not finite; train or download it again")
