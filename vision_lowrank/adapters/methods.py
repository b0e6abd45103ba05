"""What an adapter is made of: frozen, comparable settings, each of which builds the adapter of one layer.

A new method is one file, with a dataclass that has `build` and a module that has `forward`, `delta_weight` and
`strength`, and one row in `registry`; nothing else asks which method it is.
"""

import dataclasses
import math
import sys
from typing import Protocol, runtime_checkable

from vision_lowrank.adapters.layers import Adapter, BaseLayer, GatedLoRAAdapter, LoRAAdapter
from vision_lowrank.errors import AdapterError


@runtime_checkable
class Method(Protocol):
    """Settings of an adapter; `build` makes the adapter of one layer and leaves the layer as it is.

    A method whose start is costly, or needs more than the layer, also has `blank` of the same signature: an adapter
    of the same shapes without values, for a file to fill.
    """

    def build(self, base: BaseLayer) -> Adapter:
        """Makes an adapter on the device and in the precision of `base`.

        The adapted layer equals `base` at start, unless the method's description says otherwise.
        """
        ...


def blank(method: Method, base: BaseLayer) -> Adapter:
    """Makes the adapter of one layer for a file to fill."""
    make = getattr(method, "blank", method.build)
    adapter: Adapter = make(base)
    return adapter


@dataclasses.dataclass(frozen=True)
class LoRA:
    r"""Low-rank update :math:`y = W x + s\,B A x` (Hu et al. 2021, arXiv 2106.09685).

    :math:`s = \alpha / r`, or :math:`\alpha / \sqrt{r}` with `rslora` (Kalajdzievski 2023, arXiv 2312.03732).
    For a layer whose weight has the shape (out, in / groups, \*kernel), A is (rank, in / groups, \*kernel) and B is
    (out, rank, 1, ...): a low-rank factorisation of the weight itself, so it merges for any number of groups.

    Args:
        rank: inner dimension r, at least 1.
        alpha: numerator of the scale.
        dropout: probability of dropping a value of the adapter's input while training.
        rslora: scale by the square root of the rank.

    Raises:
        AdapterError: a value is out of range.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        check_rank("rank", self.rank)
        check_alpha(self.alpha)
        check_dropout("LoRA", self.dropout)
        if not isinstance(self.rslora, bool):
            raise AdapterError(f"LoRA rslora={self.rslora!r}: give True or False")

    @property
    def scaling(self) -> float:
        """The factor s of the low-rank branch."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def build(self, base: BaseLayer) -> Adapter:
        """Makes the factors A (uniform, as `nn.Linear` starts) and B (zero)."""
        return LoRAAdapter(base, self.rank, self.scaling, self.dropout)


@dataclasses.dataclass(frozen=True)
class GatedLoRA:
    r"""Gated update with residual :math:`y = W x + \sigma(G x) \odot (s\,B A x) + R x` of LoLA-SpecViT.

    The gate depends on the input, so the layer cannot be merged. :math:`G = G_B G_A` and :math:`R = R_B R_A` have rank
    `gate_rank`; with None they are dense, as in the original system, where they hold 97 % of what is trained.

    Args:
        rank: inner dimension r of the low-rank branch, at least 1.
        alpha: numerator of the scale :math:`s = \alpha / r`.
        gate_rank: rank of gate and residual; None is for compatibility with the original's files.

    Raises:
        AdapterError: a value is out of range.
    """

    rank: int
    alpha: float
    gate_rank: int | None

    def __post_init__(self) -> None:
        check_rank("rank", self.rank)
        check_alpha(self.alpha)
        if self.gate_rank is not None:
            check_rank("gate_rank", self.gate_rank)

    def build(self, base: BaseLayer) -> Adapter:
        """Makes the factors; B, the residual and the gate's logits start at zero."""
        return GatedLoRAAdapter(base, self.rank, self.alpha / self.rank, self.gate_rank)


def check_rank(name: str, rank: int) -> None:
    """Refuses what is no inner dimension.

    Raises:
        AdapterError: not a whole number of at least 1.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterError(f"adapter {name}={rank!r}: give a whole number of at least 1")


def check_dropout(name: str, dropout: float) -> None:
    """Refuses what is no probability of dropping a value.

    Args:
        name: of the method, for the message.
        dropout: the probability.

    Raises:
        AdapterError: not a number from 0 up to, but not, 1.
    """
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
        raise AdapterError(f"{name} dropout={dropout!r}: give a probability from 0 up to, but not, 1")


def check_alpha(alpha: float) -> None:
    """Refuses what cannot be multiplied with.

    Raises:
        AdapterError: not a finite number.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= sys.float_info.max:
        raise AdapterError(f"adapter alpha={alpha!r}: give a finite number")
