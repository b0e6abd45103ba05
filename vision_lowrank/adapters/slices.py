"""Adapters on parts of a fused projection: query, key and value rows of `qkv`, each with an adapter of its own.

A fused layer is named by its parts, one letter each, and its rows are those of the parts in that order, equally many:
`qkv` of timm and of this package, `kv` of pooling. Weights keep their names; only the adapter knows of parts.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from vision_lowrank.adapters.layers import Adapter, BaseLayer
from vision_lowrank.adapters.methods import Method, blank
from vision_lowrank.errors import AdapterError


@dataclasses.dataclass(frozen=True)
class Sliced:
    """One method on some parts of a layer, each with an adapter of its own; made of a target such as `attn.qkv[q,v]`.

    Args:
        method: settings of the adapter of each part.
        parts: letters of the parts to adapt, in the layer's order.
        order: letters of all parts.

    Raises:
        AdapterError: the parts are not among those of the layer.
    """

    method: Method
    parts: str
    order: str

    def __post_init__(self) -> None:
        if not self.parts or self.parts != "".join(letter for letter in self.order if letter in self.parts):
            raise AdapterError(f"parts {self.parts!r} of a layer {self.order!r}: name some of its letters in its order")

    def build(self, base: BaseLayer) -> Adapter:
        """Builds the method once for each part, as if its rows were a layer.

        Raises:
            AdapterError: the layer is not linear, or its rows cannot be divided; or the method's own.
        """
        return self._assemble(base, lambda part: self.method.build(part))

    def blank(self, base: BaseLayer) -> Adapter:
        """Makes what `build` makes, for a file to fill."""
        return self._assemble(base, partial(blank, self.method))

    def _assemble(self, base: BaseLayer, make: Callable[[BaseLayer], Adapter]) -> Adapter:
        if not isinstance(base, nn.Linear):
            raise AdapterError(f"parts {self.parts!r} of {base}: only the rows of linear layers are adapted apart")
        if base.out_features % len(self.order):
            raise AdapterError(
                f"parts {self.parts!r} of {base}: {base.out_features} rows are not {len(self.order)} equal parts; "
                "adapt the whole layer"
            )
        size = base.out_features // len(self.order)
        rows = {part: slice(i * size, (i + 1) * size) for i, part in enumerate(self.order) if part in self.parts}
        views = {part: RowsOf(base, chosen) for part, chosen in rows.items()}
        with torch.no_grad():
            adapters = {part: make(view) for part, view in views.items()}
        if not all(adapter.sliceable for adapter in adapters.values()):
            raise AdapterError(
                f"parts {self.parts!r} with {self.method}: it works on whole layers only; leave out the brackets in "
                "the target, or take another method"
            )
        return SlicedAdapter(base, adapters, views, self.order)


class RowsOf(nn.Linear):
    """Some rows of a linear layer, seen as a layer: it owns nothing and reads weight and bias where they are."""

    def __init__(self, whole: nn.Linear, rows: slice) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = whole.in_features, rows.stop - rows.start
        self.rows = rows
        self.whole = (whole,)  # within a tuple it is no child, whose parameters would be listed twice

    def __getattr__(self, name: str) -> Any:
        if name not in ("weight", "bias"):
            return super().__getattr__(name)
        values: Tensor | None = getattr(self.whole[0], name)
        if values is None:
            return None
        part = values[self.rows]
        if values.grad is not None and part.is_leaf:
            part.grad = values.grad[self.rows]  # LoRA-SB starts from it
        return part


class SlicedAdapter(Adapter):
    """Adds to each part of the output what the part's adapter adds; settings as in `Sliced`.

    Attributes:
        parts: the adapters by letter. Their own strength stays 1.
    """

    def __init__(self, base: BaseLayer, adapters: Mapping[str, Adapter], views: dict[str, RowsOf], order: str) -> None:
        super().__init__(base)
        self.parts = nn.ModuleDict(adapters)
        self.views = views
        self.order = order
        self.mergeable = all(adapter.mergeable for adapter in adapters.values())

    def forward(self, x: Tensor, y: Tensor, base: BaseLayer) -> Tensor:
        """Adds the contribution for the layer's input `x` to `y`, the output so far."""
        pieces = list(y.chunk(len(self.order), dim=-1))
        for index, part in enumerate(self.order):
            if part in self.parts:
                adapter = cast(Adapter, self.parts[part])
                pieces[index] = pieces[index] + self.strength * adapter.contribution(x, pieces[index], self.views[part])
        return torch.cat(pieces, dim=-1)

    def delta(self, base: BaseLayer) -> tuple[Tensor, Tensor | None]:
        """Returns what the adapters add to the rows of weight and bias; zero in parts without one."""
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        weight = torch.zeros_like(base.weight, dtype=dtype)
        bias = None if base.bias is None else torch.zeros_like(base.bias, dtype=dtype)
        for part, view in self.views.items():
            weight_change, bias_change = cast(Adapter, self.parts[part]).delta(view)
            weight[view.rows] = weight_change * self.strength
            if bias is not None and bias_change is not None:
                bias[view.rows] = bias_change * self.strength
        return weight, bias

    def lora_factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Returns the parts' A one below the other, and B with their B on its diagonal and zero rows elsewhere."""
        factors = {part: cast(Adapter, adapter).lora_factors() for part, adapter in self.parts.items()}
        known = {part: found for part, found in factors.items() if found is not None}
        if len(known) < len(factors):
            return None
        downs, scales = [down for down, _, _ in known.values()], [scaling for _, _, scaling in known.values()]
        blocks = []
        for part in self.order:
            row = [up if other == part else torch.zeros_like(up) for other, (_, up, _) in known.items()]
            blocks.append(torch.cat(row, dim=1))
        return torch.cat(downs), torch.cat(blocks), scales[0]
