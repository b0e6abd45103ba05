"""A region's prompt and LoRAs at a layer: keys, values and low-rank changes, computed once and never merged."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vision_lowrank.adapters.layers import BaseLayer, apply_low_rank
from vision_lowrank.composer.layout import Lora, Places, Scene, Text, UNet
from vision_lowrank.errors import AdapterError

Factors: TypeAlias = tuple[Tensor, Tensor]
# where the regions are on a map of that height and width; without one, of the map that the transformer works on now
PlacesAt: TypeAlias = Callable[[tuple[int, int] | None], Places]
# which rows of a batch of that length LoRAs change; always the last ones
RowsOf: TypeAlias = Callable[[int], slice]

# what the processors of cross-attention see to
_CROSS = (".attn2.to_k", ".attn2.to_v", ".attn2.to_out.0")
_TIME = ".time_emb_proj"


class Branch(NamedTuple):
    """One prompt at one layer: key and value (2, heads, T, head width), low-rank change of the output projection."""

    key: Tensor
    value: Tensor
    out: Factors | None


def combine(loras: Sequence[Lora], name: str, unet: UNet) -> Factors | None:
    """Returns one pair of factors for what several LoRAs change in a module; None for nothing.

    They are (rank, in), (out, rank), or of a convolution (rank, in, height, width), (out, rank, 1, 1). Scales and
    strengths are in the second one; both have the module's type and device.
    """
    weight = unet.get_submodule(name).weight
    found = [(lora[name], lora[name].scale * strength) for lora, strength in loras if name in lora and strength]
    if not found:
        return None
    # files may lack the kernel of a single position
    down = torch.cat([change.down.to(weight).reshape(-1, *weight.shape[1:]) for change, _ in found])
    # small scales would be lost in the precision of the file
    up = torch.cat([(_precise(change.up) * scale).to(weight) for change, scale in found], 1)
    return down, up[(..., *(None for _ in weight.shape[2:]))]


def _precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _layer(module: nn.Module) -> nn.Module:
    """Returns the layer that peft has wrapped in a LoRA of the pipeline's own, or the module itself."""
    return cast(nn.Module, getattr(module, "base_layer", module))


def local_layers(unet: UNet, scene: Scene) -> list[str]:
    """Returns the layers that LoRAs of the regions, or of a background beneath them, change besides cross-attention's.

    Those of a background that have no positions are left out: they stay the same in the whole image.

    Raises:
        AdapterError: a region's LoRA changes such a layer.
    """
    regional = {name for region in scene.regions for lora, _ in region.loras for name in lora}
    below = {name for lora, _ in scene.background for name in lora} if scene.regions else set()
    placeless = {name for name in regional | below if not _has_positions(unet, name)}
    if refused := sorted(placeless & regional):
        raise AdapterError(
            f"a region's LoRA changes {refused[0]}, which has no positions that could be in a box; use settings with "
            "all_layers: false, give the LoRA as background, or train it without this layer"
        )
    return sorted(name for name in (regional | below) - placeless if not name.endswith(_CROSS))


def _has_positions(unet: UNet, name: str) -> bool:
    # a residual block adds its projection of the time to a map, unless it scales with it
    return (
        isinstance(_layer(unet.get_submodule(name)), nn.Conv2d)
        or ".attentions." in name
        or (name.endswith(_TIME) and unet.config.resnet_time_scale_shift == "default")
    )


def add_locally(
    unet: UNet, name: str, places: PlacesAt, rows: RowsOf, changes: Sequence[Factors | None]
) -> list[RemovableHandle]:
    """Hooks to a layer what each region changes there; None where a region changes nothing.

    Args:
        unet: the UNet.
        name: one of its `local_layers`.
        places: tells where the regions are.
        rows: tells which rows are changed.
        changes: factors of each region.
    """
    module = unet.get_submodule(name)
    if not name.endswith(_TIME):
        return [module.register_forward_hook(LocalAddition(places, rows, changes))]
    hook = _LocalTime(places, rows, changes)
    behind = unet.get_submodule(f"{name.removesuffix(_TIME)}.norm2")
    return [module.register_forward_pre_hook(hook.keep), behind.register_forward_pre_hook(hook)]


@torch.no_grad()
def project_prompt(
    unet: UNet, layers: Sequence[str], text: Text, loras: Sequence[Lora], background: Sequence[Lora], rows: RowsOf
) -> list[Branch]:
    """Returns keys, values and change of the output projection at each layer."""
    # the background changes all outputs of a layer, so a region takes that back
    instead = [*loras, *((lora, -strength) for lora, strength in background)]
    out = []
    for index, name in enumerate(layers):
        attn = unet.get_submodule(name)
        both = [tensor[index if len(tensor) > 1 else 0] for tensor in (text.negative, text.positive)]
        states = torch.stack(both).to(attn.to_k.weight)
        found = {}
        for layer in ("to_k", "to_v"):
            factors = combine(loras, f"{name}.{layer}", unet)
            projected = getattr(attn, layer)(states)
            if factors is not None:
                projected[rows(2)] += low_rank(states[rows(2)], factors)
            found[layer] = split_heads(projected, attn.heads)
        out.append(Branch(found["to_k"], found["to_v"], combine(instead, f"{name}.to_out.0", unet)))
    return out


class Addition:
    """Forward hook that adds a low-rank change to a layer's output."""

    def __init__(self, rows: RowsOf, factors: Factors) -> None:
        self.rows = rows
        self.factors = factors

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Returns the changed output (B, ..., out), or (B, out, height, width) of a convolution."""
        rows = self.rows(len(output))
        change = apply_low_rank(cast(BaseLayer, _layer(module)), inputs[0][rows], *self.factors)
        return with_rows(output, rows, output[rows] + change)


class LocalAddition:
    """Forward hook that adds to a layer's output, at the positions of each region, what its LoRAs change there.

    Where regions overlap, the mean of theirs is added.

    Args:
        places: tells where the regions are.
        rows: tells which rows are changed.
        changes: factors of the regions; None where a region changes nothing.
    """

    def __init__(self, places: PlacesAt, rows: RowsOf, changes: Sequence[Factors | None]) -> None:
        self.places = places
        self.rows = rows
        self.changes = changes

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Returns the changed output (B, N, out), or (B, out, height, width) of a convolution."""
        rows, layer = self.rows(len(output)), _layer(module)
        add = self._add_to_map if isinstance(layer, nn.Conv2d) else self._add_to_positions
        return with_rows(output, rows, add(layer, inputs[0][rows], output[rows]))

    def _add_to_positions(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        places = self.places(None)
        shares = places.shares.to(output.dtype)[:, None]
        for positions, factors in zip(places.positions, self.changes, strict=True):
            if factors is not None:
                change = low_rank(x[:, positions], factors) * shares[positions]
                output = output.index_add(1, positions, change.to(output.dtype))
        return output

    def _add_to_map(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """Convolves of each region only the input that its positions of the output see."""
        assert isinstance(module, nn.Conv2d)
        places = self.places((output.shape[-2], output.shape[-1]))
        shares = places.shares.to(output.dtype).unflatten(0, places.size)
        padding, stride = cast(tuple[int, int], module.padding), module.stride
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        output = output.clone()
        for cells, factors in zip(places.cells, self.changes, strict=True):
            if cells is not None and factors is not None:
                top, left, bottom, right = cells
                rows, columns = (
                    slice(start * step, (end - 1) * step + size)
                    for start, end, step, size in (
                        (top, bottom, stride[0], module.kernel_size[0]),
                        (left, right, stride[1], module.kernel_size[1]),
                    )
                )
                change = F.conv2d(F.conv2d(x[..., rows, columns], factors[0], stride=stride), factors[1])
                box = (..., slice(top, bottom), slice(left, right))
                output[box] += change * shares[box]
        return output


class _LocalTime:
    """Hooks of a residual block that add, at the positions of each region, what its LoRAs change in the time.

    The block projects the time to a vector without positions and adds it to a map, which `norm2` gets.
    """

    def __init__(self, places: PlacesAt, rows: RowsOf, changes: Sequence[Factors | None]) -> None:
        self.places = places
        self.rows = rows
        self.changes = changes
        self.time: Tensor | None = None

    def keep(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Takes what the projection is given, (B, in)."""
        (self.time,) = inputs

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        """Returns the changed input (B, out, height, width) of the norm."""
        (x,) = inputs
        places = self.places((x.shape[-2], x.shape[-1]))
        shares = places.shares.to(x.dtype)
        assert self.time is not None
        rows = self.rows(len(x))
        changed = x[rows]
        for mask, factors in zip(places.masks, self.changes, strict=True):
            if factors is not None:
                share = (mask * shares).unflatten(0, places.size)
                changed = changed + low_rank(self.time[rows], factors)[..., None, None] * share
        self.time = None
        return (with_rows(x, rows, changed),)


def with_rows(tensor: Tensor, rows: slice, changed: Tensor) -> Tensor:
    """Returns a batch whose last rows are exchanged."""
    return changed if len(changed) == len(tensor) else torch.cat([tensor[: rows.start], changed])


def low_rank(x: Tensor, factors: Factors) -> Tensor:
    """Maps (..., in) to the change (..., out) of a layer's output."""
    return F.linear(F.linear(x, factors[0]), factors[1])


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Maps (B, N, C) to (B, heads, N, C / heads)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Maps (B, heads, N, head width) to (B, N, C)."""
    return x.transpose(1, 2).flatten(2)
