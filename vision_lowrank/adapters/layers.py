"""The modules that sit in an adapted model: adapters of one layer, and the layer that sums them onto its base.

Shapes: a base weight is (out, in / groups, *kernel), where `*kernel` is empty for a linear layer. The factor A ("down")
is (rank, in / groups, *kernel) and B ("up") is (out, rank, 1, ...), one 1 for each kernel axis, as peft stores them.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_lowrank.errors import AdapterError

BaseLayer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

_POINTWISE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}  # by number of kernel axes


class Factor(nn.Module):
    """A matrix or kernel, kept in a module of its own so that its key ends in `.weight` as in peft's files."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class Adapter(nn.Module):
    """Common part of all adapters: the strength, a factor on the whole contribution that schedules move.

    It is a buffer, not a number: checkpoints carry it and moving it does not recompile a compiled model.

    Attributes:
        mergeable: whether the contribution is that of one change of weight and bias for all inputs.
        sliceable: whether it may sit on part of a layer's rows; False where functions of the whole model look for it.
    """

    mergeable = True
    sliceable = True
    strength: Tensor

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.register_buffer("strength", torch.ones((), dtype=base.weight.dtype, device=base.weight.device))

    def forward(self, x: Tensor, y: Tensor, base: BaseLayer) -> Tensor:
        """Adds the contribution for the layer's input `x` to `y`, the output so far."""
        raise NotImplementedError

    def contribution(self, x: Tensor, y: Tensor, base: BaseLayer) -> Tensor:
        """Returns what `forward` adds, by itself; `y` gives shape and precision only."""
        added: Tensor = self(x, y.new_zeros(()).expand_as(y), base)
        return added

    def delta_weight(self) -> Tensor:
        """Returns what the adapter adds to the weight, at least in float32; only where `mergeable`."""
        raise NotImplementedError

    def delta(self, base: BaseLayer) -> tuple[Tensor, Tensor | None]:
        """Returns what the adapter adds to the weight and to the bias of `base`, at least in float32.

        None leaves the bias alone, as most methods do; they define `delta_weight` only. A base without bias takes no
        change of it.
        """
        return self.delta_weight(), None

    def lora_factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Returns A, B and s if at strength 1 the adapter is the LoRA s B A; None where it is none."""
        return None


class LoRAAdapter(Adapter):
    r"""Adds :math:`f s\,B A\,\mathrm{dropout}(x)` with the strength f; settings as in `methods.LoRA`."""

    def __init__(self, base: BaseLayer, rank: int, scaling: float, dropout: float) -> None:
        super().__init__(base)
        self.scaling = scaling
        self.binary = math.frexp(scaling)[0] == 0.5  # a power of two
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.lora_A, self.lora_B = low_rank_factors(base, rank)

    def forward(self, x: Tensor, y: Tensor, base: BaseLayer) -> Tensor:
        """Adds the contribution for the layer's input `x` to `y`, the output so far."""
        # the strength goes onto A, which is smaller than any activation; s too where that changes no bit of peft's sum
        down = self.lora_A.weight * (self.strength * self.scaling if self.binary else self.strength)
        added = apply_low_rank(base, self.dropout(x), down, self.lora_B.weight)
        return y + (added if self.binary else added * self.scaling)

    def delta_weight(self) -> Tensor:
        """Returns f s B A in the shape of the base weight."""
        dtype = torch.promote_types(self.lora_A.weight.dtype, torch.float32)
        product = weight_product(self.lora_A.weight.to(dtype), self.lora_B.weight.to(dtype))
        return product * (self.scaling * self.strength.to(dtype))

    def lora_factors(self) -> tuple[Tensor, Tensor, float]:
        """Returns A, B and s."""
        return self.lora_A.weight, self.lora_B.weight, self.scaling


class GatedLoRAAdapter(Adapter):
    r"""Adds :math:`f (\sigma(G x) \odot s\,B A x + R x)` with the strength f; settings as in `methods.GatedLoRA`."""

    mergeable = False  # the gate depends on the input

    def __init__(self, base: BaseLayer, rank: int, scaling: float, gate_rank: int | None) -> None:
        super().__init__(base)
        self.scaling = scaling
        self.dense = gate_rank is None
        self.lora_A, self.lora_B = low_rank_factors(base, rank)
        if gate_rank is None:
            self.gate = Factor(torch.zeros_like(base.weight))
            self.residual = Factor(torch.zeros_like(base.weight))
        else:
            self.gate_A, self.gate_B = low_rank_factors(base, gate_rank)
            self.residual_A, self.residual_B = low_rank_factors(base, gate_rank)

    def forward(self, x: Tensor, y: Tensor, base: BaseLayer) -> Tensor:
        """Adds the contribution for the layer's input `x` to `y`, the output so far."""
        low_rank = apply_low_rank(base, x, self.lora_A.weight, self.lora_B.weight) * self.scaling
        if self.dense:
            gate = apply_weight(base, x, self.gate.weight)
            residual = apply_weight(base, x, self.residual.weight)
        else:
            gate = apply_low_rank(base, x, self.gate_A.weight, self.gate_B.weight)
            residual = apply_low_rank(base, x, self.residual_A.weight, self.residual_B.weight)
        # added one by one, as in the original, whose outputs are then met to the last bit
        return y + torch.sigmoid(gate) * low_rank * self.strength + residual * self.strength


@dataclasses.dataclass(frozen=True)
class RowStrengths:
    """Factors on the contributions of adapters, one a sample; see `control.rows`.

    Attributes:
        by_name: (batch,) for each adapter they are for.
        windows: whether the layer's first axis may hold several windows of each sample, one sample after the other.
    """

    by_name: Mapping[str, Tensor]
    windows: bool

    def scale(self, name: str, contribution: Tensor, base: BaseLayer) -> Tensor:
        """Multiplies a contribution (batch, ...) of the adapter `name` to the output of `base`.

        Raises:
            AdapterError: the first axis is not the batch.
        """
        if name not in self.by_name:
            return contribution
        weights = self.by_name[name].to(contribution)
        length = len(contribution)
        # the output of a convolution without a batch axis has one axis less than its weight
        if contribution.ndim < base.weight.ndim or (length != len(weights) and not self.windows):
            raise AdapterError(
                f"rows of {len(weights)} samples for a layer whose output is {tuple(contribution.shape)}: its first "
                "axis must be the batch; where it holds windows, one sample after the other, pass windows=True"
            )
        if length % len(weights):
            raise AdapterError(f"rows of {len(weights)} samples do not divide a first axis of {length} windows")
        weights = weights.repeat_interleave(length // len(weights))
        return contribution * weights.view(-1, *(1 for _ in contribution.shape[1:]))


class AdaptedLayer(nn.Module):
    """A base layer plus the sum of its named adapters; stands in the model where the base layer stood.

    Attributes:
        base: the frozen layer.
        adapters: one adapter a name.
        active: False inside `disabled(model)`, when the layer is its base.
        row_strengths: set inside `rows(model, ...)`.
    """

    original: Tensor | None
    original_bias: Tensor | None

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.methods: dict[str, Any] = {}
        self.active = True
        self.row_strengths: RowStrengths | None = None
        # while merged: base weight and bias as they were. Buffers, so that they move with the model
        self.register_buffer("original", None, persistent=False)
        self.register_buffer("original_bias", None, persistent=False)
        self.train(base.training)

    @property
    def by_name(self) -> dict[str, Adapter]:
        """The adapters, as `adapters` holds them but with their type."""
        return {name: cast(Adapter, adapter) for name, adapter in self.adapters.items()}

    @property
    def merged(self) -> bool:
        """Whether weight and bias of the base hold the adapters at present."""
        return self.original is not None

    def forward(self, x: Tensor) -> Tensor:
        """Maps the base layer's input to the base layer's output shape.

        Raises:
            AdapterError: merged and in training mode, where the adapters would get no gradient; or strengths by row
                that do not fit the input.
        """
        if self.original is not None and self.training:
            raise AdapterError(
                "forward in training mode while adapters are merged: call unmerge(model) before training"
            )
        y = self.base(x)
        if self.active and self.original is None:
            for name, adapter in self.by_name.items():
                if self.row_strengths is None:
                    y = adapter(x, y, self.base)
                else:
                    y = y + self.row_strengths.scale(name, adapter.contribution(x, y, self.base), self.base)
        return y

    @torch.no_grad()
    def merge(self) -> None:
        """Puts weight and bias that hold all adapters at their present strength in place of the base's."""
        weight, bias = self.base.weight.data, None if self.base.bias is None else self.base.bias.data
        wide = torch.promote_types(weight.dtype, torch.float32)
        with unrounded(weight):
            merged_weight, merged_bias = self.add_deltas(weight.to(wide), None if bias is None else bias.to(wide))
        self.original, self.original_bias = weight, bias
        self.base.weight.data = merged_weight.to(weight.dtype)
        if self.base.bias is not None and merged_bias is not None:
            self.base.bias.data = merged_bias.to(self.base.bias.dtype)

    def unmerge(self) -> None:
        """Puts the original weight and bias back, the very bits."""
        if self.original is not None:
            self.base.weight.data = self.original
        if self.base.bias is not None and self.original_bias is not None:
            self.base.bias.data = self.original_bias
        self.original = self.original_bias = None

    def add_deltas(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns weight and bias with all adapters in them, in the precision of the arguments; differentiable."""
        for adapter in self.by_name.values():
            weight_change, bias_change = adapter.delta(self.base)
            weight = weight + weight_change.to(weight.dtype)
            if bias is not None and bias_change is not None:
                bias = bias + bias_change.to(bias.dtype)
        return weight, bias

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
        None where the layer is no product with one weight: an adapter has a gate, drops values while training, or has
        a strength for each row. Or where only a call tells: of a layer that is wrapped, as by peft, whose `weight` is
        without the adapter, and of one with hooks.
    """
    if hasattr(layer, "base_layer") or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    if not isinstance(layer, AdaptedLayer):
        return cast(Tensor, layer.weight), cast(Tensor | None, layer.bias)
    weight, bias = layer.base.weight, layer.base.bias
    if not layer.active or layer.merged:
        return weight, bias
    dropping = layer.training and any(isinstance(module, nn.Dropout) for module in layer.adapters.modules())
    mergeable = all(adapter.mergeable for adapter in layer.by_name.values())
    return layer.add_deltas(weight, bias) if mergeable and not dropping and layer.row_strengths is None else None


def unrounded(tensor: Tensor) -> torch.autocast:
    """Lets products with a tensor keep their precision in the block, also within autocast: for weights that stay."""
    return torch.autocast(tensor.device.type, enabled=False)


def low_rank_factors(base: BaseLayer, rank: int) -> tuple[Factor, Factor]:
    """Makes A, spread as `nn.Linear` starts, and B, zero."""
    out, *rest = base.weight.shape
    down = base.weight.new_empty(rank, *rest)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    return Factor(down), Factor(base.weight.new_zeros(out, rank, *(1 for _ in rest[1:])))


def weight_product(down: Tensor, up: Tensor) -> Tensor:
    """Returns B A as a weight (out, in / groups, *kernel)."""
    return (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])


def apply_weight(base: BaseLayer, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Does what `base` does with another weight and bias."""
    if isinstance(base, nn.Linear):
        return F.linear(x, weight, bias)
    return base._conv_forward(x, weight, bias)


def apply_up(hidden: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiplies the output of A by B, and adds a bias (out,)."""
    return F.linear(hidden, up, bias) if up.ndim == 2 else _POINTWISE[up.ndim - 2](hidden, up, bias)


def apply_low_rank(base: BaseLayer, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Does what `base` does, without bias, with the weight B A."""
    if not isinstance(base, nn.Linear) and base.groups > 1:
        # A would have to see each group's channels with the same factors: no pair of convolutions does that
        return apply_weight(base, x, weight_product(down, up))
    return apply_up(apply_weight(base, x, down), up)
