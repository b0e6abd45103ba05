"""SoRA: a gate on each rank, driven to zero by a proximal step, so that every layer finds its own rank."""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_lowrank.adapters.dylora import find_adapters, replace_by_lora
from vision_lowrank.adapters.injection import replace_layer
from vision_lowrank.adapters.layers import Adapter, BaseLayer, apply_low_rank, low_rank_factors, weight_product
from vision_lowrank.adapters.methods import check_alpha, check_rank
from vision_lowrank.errors import AdapterError


@dataclasses.dataclass(frozen=True)
class SoRA:
    r"""Sparse low-rank update :math:`y = W x + s\,B\,\mathrm{diag}(g) A x` (Ding et al. 2023, arXiv 2311.11696).

    :math:`s = \alpha / r`. The gate g is trained with an :math:`\ell_1` penalty: call `proximal_step` after each
    optimiser step. Take the gate (`sora_gate`) out of the weight decay but leave A and B in it, for without it they can
    grow as the gate shrinks and no rank need vanish. `prune` gives an ordinary LoRA with as many ranks in each layer
    as have a gate that is not zero.

    Args:
        rank: number of ranks r to start from, at least 1.
        alpha: numerator of the scale.

    Raises:
        AdapterError: a value is out of range.
    """

    rank: int
    alpha: float

    def __post_init__(self) -> None:
        check_rank("rank", self.rank)
        check_alpha(self.alpha)

    @property
    def scaling(self) -> float:
        """The factor s of the low-rank branch."""
        return self.alpha / self.rank

    def build(self, base: BaseLayer) -> Adapter:
        """Makes the factors A (uniform, as `nn.Linear` starts) and B (zero) and the gate (standard normal)."""
        return SoRAAdapter(base, self.rank, self.scaling)


class SoRAAdapter(Adapter):
    r"""Adds :math:`f s\,B\,\mathrm{diag}(g) A x` with the strength f; settings as in `SoRA`.

    Attributes:
        sora_gate: the gate g, (rank,).
    """

    sliceable = False

    def __init__(self, base: BaseLayer, rank: int, scaling: float) -> None:
        super().__init__(base)
        self.scaling = scaling
        self.lora_A, self.lora_B = low_rank_factors(base, rank)
        self.sora_gate = nn.Parameter(base.weight.new_empty(rank).normal_())

    def forward(self, x: Tensor, y: Tensor, base: BaseLayer) -> Tensor:
        """Adds the contribution for the layer's input `x` to `y`, the output so far."""
        return y + apply_low_rank(base, x, self.gated_down() * self.strength, self.lora_B.weight) * self.scaling

    def delta_weight(self) -> Tensor:
        """Returns f s B diag(g) A in the shape of the base weight."""
        dtype = torch.promote_types(self.sora_gate.dtype, torch.float32)
        product = weight_product(self.gated_down(dtype), self.lora_B.weight.to(dtype))
        return product * (self.scaling * self.strength.to(dtype))

    def gated_down(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns diag(g) A, (rank, in / groups, *kernel), computed in `dtype` or in the factors' own."""
        down, gate = self.lora_A.weight.to(dtype), self.sora_gate.to(dtype)
        return down * gate.view(-1, *(1 for _ in down.shape[1:]))


@torch.no_grad()
def proximal_step(model: nn.Module, threshold: float, name: str | None = None) -> None:
    r"""Takes the proximal step of :math:`\xi \|g\|_1` on all gates; call it after each step of the optimiser.

    .. math:: g \leftarrow \mathrm{sign}(g) \max(|g| - \xi, 0) = \arg\min_z \tfrac12 (z - g)^2 + \xi |z| .

    The paper's published code also zeroes gates between :math:`\xi` and :math:`2 \xi`, which is not this operator: with
    a threshold tuned there fewer gates vanish here.

    Args:
        model: a model with SoRA adapters.
        threshold: :math:`\xi`, at least 0, in units of the gate; a learning rate is not multiplied in.
        name: the adapters to step; None steps all.

    Raises:
        AdapterError: the threshold is out of range, there are no such adapters, or they are merged.
    """
    if not 0.0 <= threshold < math.inf:
        raise AdapterError(f"proximal_step threshold={threshold!r}: give a finite number of at least 0")
    for *_, adapter in find_adapters(model, SoRAAdapter, name):
        adapter.sora_gate.copy_(F.softshrink(adapter.sora_gate, threshold))


def active_ranks(model: nn.Module, name: str = "default") -> dict[str, int]:
    """Returns by layer path how many ranks have a gate that is not zero.

    Raises:
        AdapterError: there are no SoRA adapters of that name, or they are merged.
    """
    return {
        path: int(adapter.sora_gate.count_nonzero()) for path, _, _, adapter in find_adapters(model, SoRAAdapter, name)
    }


def prune(model: nn.Module, name: str = "default") -> dict[str, int]:
    """Replaces SoRA adapters by ordinary LoRAs without the ranks whose gate is zero, in place.

    The gate goes into A and the scale stays, so the model computes what it did. A layer with no rank left loses the
    adapter.

    Args:
        model: a model with SoRA adapters.
        name: the adapter to prune.

    Returns:
        The ranks kept, by layer path; 0 where the adapter was taken out.

    Raises:
        AdapterError: there are no such adapters, they are merged, or no layer has a rank left; nothing is changed then.
    """
    ranks = active_ranks(model, name)
    if not any(ranks.values()):
        raise AdapterError(
            f"all gates of adapter {name!r} are zero: train with a smaller threshold, or take it out with "
            f"remove(model, {name!r})"
        )
    for path, layer, _, adapter in find_adapters(model, SoRAAdapter, name):
        kept = adapter.sora_gate.nonzero().flatten()
        if len(kept):
            alpha = adapter.scaling * len(kept)
            replace_by_lora(layer, name, adapter.gated_down()[kept], adapter.lora_B.weight[:, kept], alpha)
            continue
        del layer.adapters[name], layer.methods[name]
        if not layer.adapters:
            replace_layer(model, path, layer.base)
    return ranks
