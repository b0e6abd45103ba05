"""A region's prompt and LoRAs at a layer: keys, values and low-rank changes, computed once and never merged."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_lowrank.composer.layout import Lora, Places, Text, UNet

Factors: TypeAlias = tuple[Tensor, Tensor]


class Branch(NamedTuple):
    """One prompt at one layer: key and value (2, heads, T, head width), low-rank change of the output projection."""

    key: Tensor
    value: Tensor
    out: Factors | None


def combine(loras: Sequence[Lora], name: str, unet: UNet) -> Factors | None:
    """Returns one pair of factors (rank, in), (out, rank) for what several LoRAs change in a module; None for nothing.

    Scales and strengths are in the second factor; both have the module's type and device.
    """
    weight = unet.get_submodule(name).weight
    found = [(lora[name], lora[name].scale * strength) for lora, strength in loras if name in lora and strength]
    if not found:
        return None
    down = torch.cat([change.down.to(weight) for change, _ in found])
    return down, torch.cat([(change.up * scale).to(weight) for change, scale in found], 1)


@torch.no_grad()
def project_prompt(
    unet: UNet, layers: Sequence[str], text: Text, loras: Sequence[Lora], background: Sequence[Lora]
) -> list[Branch]:
    """Returns keys, values and change of the output projection at each layer."""
    # the background changes all outputs of a layer, so a region takes that back
    instead = [*loras, *((lora, -strength) for lora, strength in background)]
    out = []
    for index, name in enumerate(layers):
        attn = unet.get_submodule(name)
        rows = [tensor[index if len(tensor) > 1 else 0] for tensor in (text.negative, text.positive)]
        states = torch.stack(rows).to(attn.to_k.weight)
        found = {}
        for layer in ("to_k", "to_v"):
            factors = combine(loras, f"{name}.{layer}", unet)
            change = 0 if factors is None else low_rank(states, factors)
            found[layer] = split_heads(getattr(attn, layer)(states) + change, attn.heads)
        out.append(Branch(found["to_k"], found["to_v"], combine(instead, f"{name}.to_out.0", unet)))
    return out


class Addition:
    """Forward hook that adds a low-rank change to a layer's output."""

    def __init__(self, factors: Factors) -> None:
        self.factors = factors

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Returns the changed output (..., out), or (B, out, height, width) of a convolution of single positions."""
        if isinstance(module, nn.Conv2d):
            hidden = F.conv2d(inputs[0], self.factors[0][:, :, None, None])
            return output + F.conv2d(hidden, self.factors[1][:, :, None, None])
        return output + low_rank(inputs[0], self.factors)


class LocalAddition:
    """Forward hook that adds to a layer's output, at the positions of each region, what its LoRAs change there.

    Where regions overlap, the mean of theirs is added.

    Args:
        places: returns where the regions are on a map of that height and width; without one, of the map that the
            transformer works on now.
        changes: factors of the regions; None where a region changes nothing.
    """

    def __init__(self, places: Callable[[tuple[int, int] | None], Places], changes: Sequence[Factors | None]) -> None:
        self.places = places
        self.changes = changes

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Returns the changed output (B, N, out), or (B, out, height, width) of a convolution of single positions."""
        x = inputs[0]
        if isinstance(module, nn.Conv2d):
            size = (x.shape[-2], x.shape[-1])
            changed: Tensor = self._add(x.flatten(2).mT, output.flatten(2).mT, size).mT.unflatten(2, size)
            return changed
        return self._add(x, output, None)

    def _add(self, x: Tensor, output: Tensor, size: tuple[int, int] | None) -> Tensor:
        places = self.places(size)
        shares = places.shares.to(output.dtype)[:, None]
        for positions, factors in zip(places.positions, self.changes, strict=True):
            if factors is not None:
                change = low_rank(x[:, positions], factors) * shares[positions]
                output = output.index_add(1, positions, change.to(output.dtype))
        return output


def low_rank(x: Tensor, factors: Factors) -> Tensor:
    """Maps (..., in) to the change (..., out) of a layer's output."""
    return F.linear(F.linear(x, factors[0]), factors[1])


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Maps (B, N, C) to (B, heads, N, C / heads)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Maps (B, heads, N, head width) to (B, N, C)."""
    return x.transpose(1, 2).flatten(2)
