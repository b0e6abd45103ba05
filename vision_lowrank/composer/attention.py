"""Attention layers that know where each concept belongs, put into a UNet for a call and taken out after it.

`S` is the number of images made together, `N` of positions, `T` of a prompt's tokens. Prompts come in two rows, the
negative one and the positive one. Cross-attention layers are numbered down, middle, up, as ED-LoRA numbers them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vision_lowrank.composer.conditions import residuals_of
from vision_lowrank.composer.injection import (
    Addition,
    Branch,
    add_locally,
    combine,
    local_layers,
    low_rank,
    merge_heads,
    project_prompt,
    split_heads,
    with_rows,
)
from vision_lowrank.composer.layout import CellPolicy, OverlapPolicy, Places, Scene, UNet, checked_layers
from vision_lowrank.composer.normalisation import RegionalNorm


class Maps(NamedTuple):
    """Attention probabilities, means over heads and layers.

    Args:
        cross: for each region (S, height, width, T).
        own: self-attention (S, N, N), queries first; None where not asked for.
    """

    cross: list[Tensor]
    own: Tensor | None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        _, height, width, _ = self.cross[0].shape
        return height, width


class _MapsComplete(Exception):
    """All maps are there; the rest of the UNet would not change them."""


class RegionalUNet:
    """A UNet with its layers exchanged; made by `regional_unet`."""

    def __init__(
        self,
        unet: UNet,
        scene: Scene,
        map_layers: Sequence[str],
        map_factor: int,
        negative_loras: bool,
        **policies: Any,
    ) -> None:
        self.unet = unet
        self.scene = scene
        self.map_layers = map_layers
        self.map_factor = map_factor
        self.negative_loras = negative_loras
        self.size = (0, 0)  # of the map in the transformer that runs now
        self.rows = slice(0, 2)
        self.cross: list[list[Tensor]] | None = None
        self.own: list[Tensor] | None = None
        self._policies = policies
        self._places: dict[tuple[int, int], Places] = {}

    def places(self, size: tuple[int, int] | None = None) -> Places:
        """Returns where the regions are on a map of that height and width; by default, of the layer that runs."""
        size = size or self.size
        if size not in self._places:
            boxes = [region.box for region in self.scene.regions]
            self._places[size] = Places(boxes, size, **self._policies, device=self.unet.device)
        return self._places[size]

    def noise(self, sample: Tensor, timestep: Tensor | int, negative: bool = True) -> Tensor:
        """Returns the UNet's output.

        Args:
            sample: scaled latents (S, channels, height, width).
            timestep: its timestep.
            negative: both rows (2 S, ...), the negative ones first; otherwise the positive ones (S, ...).
        """
        self.rows = slice(0 if negative else 1, 2)
        count = 2 if negative else 1
        sample = torch.cat([sample] * count).to(self.unet.dtype)
        text = self.scene.text
        # the UNet's layers have their prompts already, those of a ControlNet do not
        states = self.of_rows(torch.stack([text.negative[0], text.positive[0]]).to(sample), len(sample))
        added = {name: self.of_rows(value.to(sample), len(sample)) for name, value in self.scene.added.items()}
        named = residuals_of(self.scene.conditions, self.unet, sample, timestep, states, added)
        named["added_cond_kwargs"] = added or None
        out: Tensor = self.unet(sample, timestep, states, **named, return_dict=False)[0]
        return out

    def maps(self, sample: Tensor, timestep: Tensor | int, own: bool = True) -> Maps:
        """Runs the positive prompts up to the last layer whose maps are used.

        Args:
            sample: scaled latents (S, channels, height, width).
            timestep: its timestep.
            own: also the maps of self-attention.
        """
        self.cross, self.own = [[] for _ in self.scene.regions], [] if own else None
        try:
            self.noise(sample, timestep, negative=False)
        except _MapsComplete:
            cross = [torch.stack(layers).mean(0).unflatten(1, self.size) for layers in self.cross]
            return Maps(cross, torch.stack(self.own).mean(0) if self.own else None)
        finally:
            self.cross = self.own = None
        raise AssertionError("unreachable: the last of the map layers ends the pass")

    def changed_rows(self, batch: int) -> slice:
        """Returns which rows of the present pass's batch LoRAs change."""
        return slice(0 if self.negative_loras or self.rows.start else batch // 2, batch)

    def of_rows(self, tensor: Tensor, batch: int) -> Tensor:
        """Maps (2, ...) to a batch with the rows of the present pass, each once for every image."""
        tensor = tensor[self.rows]
        return tensor if len(tensor) == batch else tensor.repeat_interleave(batch // len(tensor), 0)


class _CrossAttention:
    """Puts each region's own prompt into its box; see `regional_unet`."""

    def __init__(self, model: RegionalUNet, name: str, injection: bool, prompts: list[Branch]) -> None:
        self.model = model
        self.everywhere, *self.regions = prompts
        self.injection = injection
        self.mapped = name in model.map_layers
        self.last = name in model.map_layers[-1:]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        places = self.model.places()
        injects = self.injection and any(places.cells)
        seen: list[Tensor | None] = [None] * len(self.regions)
        if self.mapped and self.model.cross is not None:
            for index, (region, layers) in enumerate(zip(self.regions, self.model.cross, strict=True)):
                positions = places.positions[index] if injects and not self.last else None
                rows = (self._rows(region.key, query), self._rows(region.value, query))
                found, seen[index] = _recomputed(_attend_with_map, query, *rows, positions)
                layers.append(found)
            if self.last:
                raise _MapsComplete
        if injects:
            hidden_states = self._inject(attn, query, seen)
        else:
            hidden_states = attn.to_out[0](merge_heads(self._attend(query, self.everywhere)))
        out: Tensor = attn.to_out[1](hidden_states)
        return out

    def _inject(self, attn: Any, query: Tensor, seen: list[Tensor | None]) -> Tensor:
        """Returns the projected output; `seen` holds what regions attended to, where it is known already."""
        places = self.model.places()
        everywhere = [places.outside, *places.positions]
        shares = places.shares.to(query.dtype)[:, None]
        rows = self.model.changed_rows(len(query))
        parts: list[Tensor] = []
        changes: list[Tensor] = []
        changed: list[Tensor] = []
        for prompt, positions, known in zip([self.everywhere, *self.regions], everywhere, [None, *seen], strict=True):
            attended = self._attend(query[:, :, positions], prompt) if known is None else known
            parts.append(merge_heads(attended) * shares[positions])
            if prompt.out is not None:
                changes.append(low_rank(parts[-1][rows], prompt.out))
                changed.append(positions)
        whole = query.new_zeros(query.shape[0], query.shape[2], parts[0].shape[2])
        whole = whole.index_add(1, torch.cat(everywhere), torch.cat(parts, 1))
        # the projection is linear and the shares of a position sum to 1, so the base's part is the same for all
        out: Tensor = attn.to_out[0](whole)
        if not changes:
            return out
        return with_rows(out, rows, out[rows].index_add(1, torch.cat(changed), torch.cat(changes, 1)))

    def _attend(self, query: Tensor, prompt: Branch) -> Tensor:
        return F.scaled_dot_product_attention(query, self._rows(prompt.key, query), self._rows(prompt.value, query))

    def _rows(self, tensor: Tensor, query: Tensor) -> Tensor:
        return self.model.of_rows(tensor, len(query))


class _SelfAttention:
    """Keeps concepts from seeing each other; see `regional_unet`."""

    def __init__(self, model: RegionalUNet, masked: bool, mapped: bool) -> None:
        self.model = model
        self.masked = masked
        self.mapped = mapped

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        query, key, value = (
            split_heads(layer(hidden_states), attn.heads) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        places = self.model.places()
        groups = places.groups if self.masked else None
        if self.mapped and self.model.own is not None:
            probabilities = _probabilities(query, key, places.visible if groups else None)
            self.model.own.append(probabilities.mean(1))
            attended = probabilities.to(value.dtype) @ value
        elif groups is None:
            attended = F.scaled_dot_product_attention(query, key, value)
        else:
            attended = _recomputed(_attend_in_groups, query, key, value, groups)[:, :, places.order]
        out: Tensor = attn.to_out[1](attn.to_out[0](merge_heads(attended)))
        return out


@contextmanager
def regional_unet(
    unet: UNet,
    scene: Scene,
    *,
    injection: bool = True,
    all_layers: bool = False,
    negative_loras: bool = True,
    self_mask: bool = True,
    norm_mask: bool = False,
    cells: CellPolicy = "nearest",
    overlaps: OverlapPolicy = "own",
    map_factor: int = 4,
) -> Iterator[RegionalUNet]:
    """Exchanges the attention layers of a UNet, and puts the old ones back at the end, whatever happens.

    Cross-attention takes, inside a box, keys and values of that region's prompts and weights; where boxes overlap, the
    mean of theirs. Queries are the base's. Keys and values are computed here, once. Parameters get no gradient.

    Args:
        unet: of Stable Diffusion 1, 2 or XL.
        scene: what is to be composed.
        injection: regions take their own prompts and LoRAs; without it, only maps know of them.
        all_layers: regions also take, at their positions, what their LoRAs change besides keys, values and output
            projections of cross-attention: queries, self-attention, feed-forwards, projections of transformers, all
            convolutions, and what residual blocks add for the time.
        negative_loras: see `sampler.Settings`.
        self_mask: a position in a box sees the box and the background, and what `overlaps` says.
        norm_mask: group normalisation takes its statistics from the same positions.
        cells: see `Box.cells`.
        overlaps: see `Places`.
        map_factor: maps are those of the layers with this many latents along a side of a position; the middle block
            is left out.

    Raises:
        ConfigError: another architecture, exchanged attention layers, no layer for maps, or text of a wrong shape.
        AdapterError: a LoRA does not fit the UNet, is not finite, or is to change a layer without positions in a box.
    """
    layers, map_layers = checked_layers(unet, scene, map_factor)
    local = local_layers(unet, scene) if injection and all_layers else []
    model = RegionalUNet(unet, scene, map_layers, map_factor, negative_loras, cells=cells, overlaps=overlaps)
    rows = model.changed_rows
    with ExitStack() as stack:
        trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        if unet.is_gradient_checkpointing:
            # maps are kept as layers compute, once; what memory they take is seen to here
            unet.disable_gradient_checkpointing()
            stack.callback(unet.enable_gradient_checkpointing)
        stack.callback(_set_gradients, trained, True)
        _set_gradients(trained, False)
        regions = [
            project_prompt(unet, layers, region.text, region.loras, scene.background, rows) for region in scene.regions
        ]
        for name in sorted({name for lora, _ in scene.background for name in lora}):
            factors = combine(scene.background, name, unet)
            if factors is not None:
                stack.callback(unet.get_submodule(name).register_forward_hook(Addition(rows, factors)).remove)
        everywhere = project_prompt(unet, layers, scene.text, (), (), rows)
        stack.callback(unet.set_attn_processor, dict(unet.attn_processors))
        instead = [(lora, -strength) for lora, strength in scene.background]
        for name in local:
            changes = [combine([*region.loras, *instead], name, unet) for region in scene.regions]
            for handle in add_locally(unet, name, model.places, rows, changes):
                stack.callback(handle.remove)
        for norm in [module for module in unet.modules() if norm_mask and isinstance(module, nn.GroupNorm)]:
            stack.callback(norm.register_forward_hook(RegionalNorm(model.places)).remove)
        for name in {layer.partition(".transformer_blocks.")[0] for layer in layers}:
            size_hook = _SizeHook(model)
            stack.callback(unet.get_submodule(name).register_forward_pre_hook(size_hook, with_kwargs=True).remove)
        processors: dict[str, _CrossAttention | _SelfAttention] = {}
        for index, name in enumerate(layers):
            prompts = [everywhere[index], *(region[index] for region in regions)]
            processors[f"{name}.processor"] = _CrossAttention(model, name, injection, prompts)
            own = _SelfAttention(model, masked=self_mask, mapped=name in map_layers)
            processors[f"{name.removesuffix('attn2')}attn1.processor"] = own
        unet.set_attn_processor(processors)
        yield model


class _SizeHook:
    """Forward hook that notes the size of the map that a transformer works on."""

    def __init__(self, model: RegionalUNet) -> None:
        self.model = model

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        states = inputs[0] if inputs else named["hidden_states"]
        self.model.size = tuple(states.shape[-2:])


def _set_gradients(parameters: Sequence[nn.Parameter], required: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(required)


def _recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function; what its gradient needs is computed anew, so that memory does not grow with the regions."""
    if torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)


def _attend_with_map(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Returns the mean map (B, N, T) and, at some positions, what was attended to (B, heads, n, head width)."""
    probabilities = _probabilities(query, key)
    attended = None if positions is None else probabilities[:, :, positions].to(query.dtype) @ value
    return probabilities.mean(1), attended


def _attend_in_groups(query: Tensor, key: Tensor, value: Tensor, groups: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Returns what the queries of each group attended to, one group after the other."""
    parts = [
        F.scaled_dot_product_attention(query[:, :, queries], key[:, :, keys], value[:, :, keys])
        for queries, keys in groups
    ]
    return torch.cat(parts, 2)


def _probabilities(query: Tensor, key: Tensor, visible: Tensor | None = None) -> Tensor:
    """Returns the softmax (B, heads, N, M) of the scores, at least in float32."""
    scale = query.shape[-1] ** -0.5
    if query.dtype == torch.float16:
        # the product itself may be too large for it
        query, scale = query * scale, 1.0
    scores = query @ key.transpose(-2, -1) * scale
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
