"""DyLoRA: nested ranks, trained so that each can be cut out afterwards; and how an adapter becomes an ordinary LoRA."""

import dataclasses
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from vision_lowrank.adapters.injection import adapted_layers
from vision_lowrank.adapters.layers import (
    AdaptedLayer,
    Adapter,
    BaseLayer,
    LoRAAdapter,
    apply_low_rank,
    low_rank_factors,
    weight_product,
)
from vision_lowrank.adapters.methods import LoRA, check_alpha, check_rank
from vision_lowrank.errors import AdapterError

AdapterKind = TypeVar("AdapterKind", bound=Adapter)


@dataclasses.dataclass(frozen=True)
class DyLoRA:
    r"""Nested low-rank update (Valipour et al. 2022, arXiv 2210.07558).

    With the rank b of the training step,

    .. math:: y = W x + \frac{\alpha}{b} B_{:, 1..b}\, A_{1..b}\, x,

    so that each b is a LoRA of that rank and of the same :math:`\alpha`. `sample_rank` draws b for the whole model and
    has to be called before every training step: without it the largest rank alone is trained. In evaluation mode the
    largest rank is computed; `truncate` makes the model of another one.

    Args:
        rank: the largest rank R, at least 1.
        alpha: numerator of the scale.
        frozen: give a gradient to the b-th rank only, not to those below it.

    Raises:
        AdapterError: a value is out of range.
    """

    rank: int
    alpha: float
    frozen: bool = False

    def __post_init__(self) -> None:
        check_rank("rank", self.rank)
        check_alpha(self.alpha)
        if not isinstance(self.frozen, bool):
            raise AdapterError(f"DyLoRA frozen={self.frozen!r}: give True or False")

    @property
    def scaling(self) -> float:
        """The factor of the low-rank branch at the largest rank."""
        return self.alpha / self.rank

    def build(self, base: BaseLayer) -> Adapter:
        """Makes the factors A (uniform, as `nn.Linear` starts) and B (zero), as LoRA's."""
        return DyLoRAAdapter(base, self.rank, self.alpha, self.frozen)


class DyLoRAAdapter(Adapter):
    r"""Adds :math:`f (\alpha / b) B_{:, 1..b} A_{1..b} x` with the strength f; settings as in `DyLoRA`.

    Attributes:
        sampled_rank: the rank b while training, which `sample_rank` sets.
    """

    sliceable = False

    def __init__(self, base: BaseLayer, rank: int, alpha: float, frozen: bool) -> None:
        super().__init__(base)
        self.rank = rank
        self.alpha = alpha
        self.frozen = frozen
        self.sampled_rank = rank
        self.lora_A, self.lora_B = low_rank_factors(base, rank)

    @property
    def active_rank(self) -> int:
        """The rank computed at present: the sampled one while training, else the largest."""
        return self.sampled_rank if self.training else self.rank

    @property
    def mergeable(self) -> bool:  # type: ignore[override]  # a constant of the other adapters
        """False while training at a smaller rank: the weight merged then would not be that of evaluation."""
        return self.active_rank == self.rank

    def forward(self, x: Tensor, y: Tensor, base: BaseLayer) -> Tensor:
        """Adds the contribution for the layer's input `x` to `y`, the output so far."""
        down, up = self._factors()
        return y + apply_low_rank(base, x, down * self.strength, up) * (self.alpha / self.active_rank)

    def delta_weight(self) -> Tensor:
        """Returns what is added to the weight at the present rank, in the shape of the base weight."""
        dtype = torch.promote_types(self.lora_A.weight.dtype, torch.float32)
        down, up = self._factors()
        return weight_product(down.to(dtype), up.to(dtype)) * (self.alpha / self.active_rank * self.strength.to(dtype))

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Returns A and B cut to the present rank."""
        rank = self.active_rank
        down, up = self.lora_A.weight[:rank], self.lora_B.weight[:, :rank]
        if self.frozen and self.training:
            down = torch.cat([down[:-1].detach(), down[-1:]])
            up = torch.cat([up[:, :-1].detach(), up[:, -1:]], dim=1)
        return down, up


def sample_rank(model: nn.Module, generator: torch.Generator | None = None, name: str | None = None) -> int:
    """Draws the rank of the next training step, each from 1 to the largest equally likely, the same for all layers.

    Args:
        model: a model with DyLoRA adapters; a layer with a smaller largest rank computes that one at most.
        generator: a CPU generator; None draws from torch's global one.
        name: the adapters to set; None sets all.

    Returns:
        The rank.

    Raises:
        AdapterError: there are no such adapters, or they are merged.
    """
    adapters = [adapter for *_, adapter in find_adapters(model, DyLoRAAdapter, name)]
    largest = max(adapter.rank for adapter in adapters)
    rank = int(torch.randint(1, largest + 1, (), generator=generator, device="cpu"))
    for adapter in adapters:
        adapter.sampled_rank = min(rank, adapter.rank)
    return rank


def truncate(model: nn.Module, rank: int, name: str = "default") -> None:
    """Replaces DyLoRA adapters by the ordinary LoRA of one of their ranks, in place.

    Args:
        model: a model with DyLoRA adapters.
        rank: the rank b to keep; the LoRA has the same alpha, thus the scale alpha / b.
        name: the adapter to truncate.

    Raises:
        AdapterError: there are no such adapters, they are merged, or one of them has a smaller largest rank; nothing is
            changed then.
    """
    check_rank("rank", rank)
    found = find_adapters(model, DyLoRAAdapter, name)
    for path, _, _, adapter in found:
        if rank > adapter.rank:
            raise AdapterError(
                f"truncate to rank={rank}: adapter {name!r} on layer {path!r} has ranks up to {adapter.rank}, give at "
                "most that"
            )
    for _, layer, _, adapter in found:
        replace_by_lora(layer, name, adapter.lora_A.weight[:rank], adapter.lora_B.weight[:, :rank], adapter.alpha)


def find_adapters(
    model: nn.Module, kind: type[AdapterKind], name: str | None
) -> list[tuple[str, AdaptedLayer, str, AdapterKind]]:
    """Returns layer path, layer, adapter name and adapter for the adapters of one kind.

    Args:
        model: a model with adapters.
        kind: class of the adapters; others are passed over.
        name: the adapter's name; None for any.

    Raises:
        AdapterError: there are none, or they are merged.
    """
    found = [
        (path, layer, other, adapter)
        for path, layer in adapted_layers(model, name).items()
        for other, adapter in layer.by_name.items()
        if name in (None, other) and isinstance(adapter, kind)
    ]
    method = kind.__name__.removesuffix("Adapter")
    if not found:
        whose = "" if name is None else f" named {name!r}"
        raise AdapterError(f"the model has no {method} adapter{whose}: inject one with {method}(...) first")
    for path, layer, _, _ in found:
        if layer.merged:
            raise AdapterError(f"layer {path!r} is merged: call unmerge(model) before changing its {method} adapter")
    return found


@torch.no_grad()
def replace_by_lora(layer: AdaptedLayer, name: str, down: Tensor, up: Tensor, alpha: float) -> None:
    """Puts an ordinary LoRA in the place of an adapter that computes the same; its strength stays.

    Args:
        layer: the adapted layer.
        name: the adapter's name.
        down: factor A, (rank, in / groups, *kernel).
        up: factor B, (out, rank, 1, ...).
        alpha: numerator of the scale alpha / rank.
    """
    method = LoRA(down.shape[0], alpha)
    adapter = cast(LoRAAdapter, method.build(layer.base))
    adapter.lora_A.weight.copy_(down)
    adapter.lora_B.weight.copy_(up)
    adapter.strength = layer.by_name[name].strength
    adapter.train(layer.training)
    layer.adapters[name] = adapter
    layer.methods[name] = method
