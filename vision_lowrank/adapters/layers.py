"""The modules that sit in an adapted model: adapters of one layer, and the layer that sums them onto its base.

Shapes: a base weight is (out, in / groups, *kernel), where `*kernel` is empty for a linear layer. The factor A ("down")
is (rank, in / groups, *kernel) and B ("up") is (out, rank, 1, ...), one 1 for each kernel axis, as peft stores them.
"""

import math
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_lowrank.errors import AdapterError

BaseLayer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

_POINTWISE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Factor(nn.Module):
    """A matrix or kernel, kept in a module of its own so that its key ends in `.weight` as in peft's files."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class Adapter(nn.Module):
    """Common part of all adapters: the strength, a factor on the whole contribution that schedules move.

    It is a buffer, not a number: checkpoints carry it and moving it does not recompile a compiled model.
    """

    mergeable = True
    strength: Tensor

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.register_buffer("strength", torch.ones((), dtype=base.weight.dtype, device=base.weight.device))

    def forward(self, x: Tensor, y: Tensor, base: BaseLayer) -> Tensor:
        """Adds the contribution for the layer's input `x` to `y`, the output so far."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """Returns what the adapter adds to the weight, at least in float32; only where `mergeable`."""
        raise NotImplementedError


class LoRAAdapter(Adapter):
    r"""Adds :math:`f s\,B A\,\mathrm{dropout}(x)` with the strength f; settings as in `methods.LoRA`."""

    def __init__(self, base: BaseLayer, rank: int, scaling: float, dropout: float) -> None:
        super().__init__(base)
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.lora_A, self.lora_B = _low_rank_factors(base, rank)

    def forward(self, x: Tensor, y: Tensor, base: BaseLayer) -> Tensor:
        """Adds the contribution for the layer's input `x` to `y`, the output so far."""
        # the strength goes onto A, which is smaller than any activation
        down = self.lora_A.weight * self.strength
        return y + _apply_low_rank(base, self.dropout(x), down, self.lora_B.weight) * self.scaling

    def delta_weight(self) -> Tensor:
        """Returns f s B A in the shape of the base weight."""
        dtype = torch.promote_types(self.lora_A.weight.dtype, torch.float32)
        product = _product(self.lora_A.weight.to(dtype), self.lora_B.weight.to(dtype))
        return product * (self.scaling * self.strength.to(dtype))


class GatedLoRAAdapter(Adapter):
    r"""Adds :math:`f (\sigma(G x) \odot s\,B A x + R x)` with the strength f; settings as in `methods.GatedLoRA`."""

    mergeable = False  # the gate depends on the input

    def __init__(self, base: BaseLayer, rank: int, scaling: float, gate_rank: int | None) -> None:
        super().__init__(base)
        self.scaling = scaling
        self.dense = gate_rank is None
        self.lora_A, self.lora_B = _low_rank_factors(base, rank)
        if gate_rank is None:
            self.gate = Factor(torch.zeros_like(base.weight))
            self.residual = Factor(torch.zeros_like(base.weight))
        else:
            self.gate_A, self.gate_B = _low_rank_factors(base, gate_rank)
            self.residual_A, self.residual_B = _low_rank_factors(base, gate_rank)

    def forward(self, x: Tensor, y: Tensor, base: BaseLayer) -> Tensor:
        """Adds the contribution for the layer's input `x` to `y`, the output so far."""
        low_rank = _apply_low_rank(base, x, self.lora_A.weight, self.lora_B.weight) * self.scaling
        if self.dense:
            gate = _apply_weight(base, x, self.gate.weight)
            residual = _apply_weight(base, x, self.residual.weight)
        else:
            gate = _apply_low_rank(base, x, self.gate_A.weight, self.gate_B.weight)
            residual = _apply_low_rank(base, x, self.residual_A.weight, self.residual_B.weight)
        # added one by one, as in the original, whose outputs are then met to the last bit
        return y + torch.sigmoid(gate) * low_rank * self.strength + residual * self.strength


class AdaptedLayer(nn.Module):
    """A base layer plus the sum of its named adapters; stands in the model where the base layer stood.

    Attributes:
        base: the frozen layer.
        adapters: one adapter a name.
        active: False inside `disabled(model)`, when the layer is its base.
    """

    original: Tensor | None

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.methods: dict[str, Any] = {}
        self.active = True
        # while merged: the base weight as it was. A buffer, so that it moves with the model
        self.register_buffer("original", None, persistent=False)
        self.train(base.training)

    @property
    def by_name(self) -> dict[str, Adapter]:
        """The adapters, as `adapters` holds them but with their type."""
        return {name: cast(Adapter, adapter) for name, adapter in self.adapters.items()}

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the adapters at present."""
        return self.original is not None

    def forward(self, x: Tensor) -> Tensor:
        """Maps the base layer's input to the base layer's output shape.

        Raises:
            AdapterError: merged and in training mode, where the adapters would get no gradient.
        """
        if self.original is not None and self.training:
            raise AdapterError(
                "forward in training mode while adapters are merged: call unmerge(model) before training"
            )
        y = self.base(x)
        if self.active and self.original is None:
            for adapter in self.adapters.values():
                y = adapter(x, y, self.base)
        return y

    @torch.no_grad()
    def merge(self) -> None:
        """Puts a weight that holds all adapters at their present strength in place of the base weight."""
        weight = self.base.weight.data
        total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for adapter in self.by_name.values():
            total += adapter.delta_weight()
        self.original = weight
        self.base.weight.data = total.to(weight.dtype)

    def unmerge(self) -> None:
        """Puts the original weight back, the very bits."""
        if self.original is not None:
            self.base.weight.data = self.original
            self.original = None

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            raise AttributeError(
                f"an adapted layer has no {name!r}: code that reads it by-passes the adapters; read `.base.{name}` if "
                "that is meant, and leave this layer out of the targets if its owner computes with the weight itself"
            )
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._refuse_merged("state_dict()")
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_merged("load_state_dict()")
        super()._load_from_state_dict(*args, **kwargs)

    def _refuse_merged(self, what: str) -> None:
        # the file would count the adapters twice: once in the weight, once beside it
        if self.merged:
            raise AdapterError(
                f"{what} while adapters are merged: call unmerge(model) or merge_and_remove(model) first"
            )


def folded_weight(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Returns weight and bias of a layer with its adapters in them, differentiable, for code that rearranges products.

    Args:
        layer: a linear layer, adapted or not.

    Returns:
        None where the layer is no product with one weight: an adapter has a gate, or drops inputs while training.
    """
    if not isinstance(layer, AdaptedLayer):
        return cast(Tensor, layer.weight), cast(Tensor | None, layer.bias)
    weight = layer.base.weight
    if layer.active and not layer.merged:
        for adapter in layer.by_name.values():
            dropping = layer.training and isinstance(getattr(adapter, "dropout", None), nn.Dropout)
            if dropping or not adapter.mergeable:
                return None
            weight = weight + adapter.delta_weight().to(weight.dtype)
    return weight, layer.base.bias


def _low_rank_factors(base: BaseLayer, rank: int) -> tuple[Factor, Factor]:
    """Makes A, spread as `nn.Linear` starts, and B, zero."""
    out, *rest = base.weight.shape
    down = base.weight.new_empty(rank, *rest)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    return Factor(down), Factor(base.weight.new_zeros(out, rank, *(1 for _ in rest[1:])))


def _product(down: Tensor, up: Tensor) -> Tensor:
    """Returns B A as a weight (out, in / groups, *kernel)."""
    return (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])


def _apply_weight(base: BaseLayer, x: Tensor, weight: Tensor) -> Tensor:
    """Does what `base` does, without bias, with another weight."""
    if isinstance(base, nn.Linear):
        return F.linear(x, weight)
    return base._conv_forward(x, weight, None)


def _apply_low_rank(base: BaseLayer, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Does what `base` does, without bias, with the weight B A."""
    if isinstance(base, nn.Linear):
        return F.linear(F.linear(x, down), up)
    if base.groups > 1:
        # A would have to see each group's channels with the same factors: no pair of convolutions does that
        return _apply_weight(base, x, _product(down, up))
    return _POINTWISE[up.ndim - 2](base._conv_forward(x, down, None), up)
