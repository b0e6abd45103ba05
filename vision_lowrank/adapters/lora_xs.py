"""LoRA-XS and LoRA-SB: a small square matrix, all that is trained, between two frozen factors of the layer's own."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from vision_lowrank.adapters.layers import Adapter, BaseLayer, apply_low_rank, weight_product
from vision_lowrank.adapters.methods import check_alpha, check_rank
from vision_lowrank.adapters.targets import Targets, check_layers, find_parts
from vision_lowrank.errors import AdapterError

_SPREAD = 1e-5  # standard deviation of R at the start, as in the paper on LoRA-XS


@dataclasses.dataclass(frozen=True)
class LoRAXS:
    r"""Update between frozen factors :math:`y = W x + s\,B R A x`, of which only R, (r, r), is trained.

    :math:`s = \alpha / r`. What the factors are is decided by `init`:

    - "weight", LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604): the r leading singular triplets
      :math:`U \Sigma V^T` of W, as :math:`B = U` and :math:`A = \Sigma V^T`; R is normal with standard deviation 1e-5,
      so the adapted layer is near the base at start, not equal.
    - "gradient", LoRA-SB (Ponkshe et al. 2024, arXiv 2411.19557): those of the first step that Adam would take,
      :math:`-\eta\,\mathrm{sign}(\sum \nabla_W L)`, as :math:`B = U`, :math:`A = V^T` and
      :math:`R = \Sigma / s`, so the adapted layer starts where the best approximation of rank r to that step leads.
      The gradient is read from `weight.grad`, where `lora_sb_gradients` leaves it.

    The factors of a convolution are those of its weight flattened to (out, in / groups * kernel).

    Args:
        rank: inner dimension r, at least 1, at most the smaller side of the weight.
        alpha: numerator of the scale; LoRA-SB's authors take the rank.
        init: where the factors come from.
        step: length :math:`\eta` of the first step, for "gradient" only; a learning rate.

    Raises:
        AdapterError: a value is out of range.
    """

    rank: int
    alpha: float
    init: Literal["weight", "gradient"] = "weight"
    step: float | None = None

    def __post_init__(self) -> None:
        check_rank("rank", self.rank)
        check_alpha(self.alpha)
        if self.alpha == 0:
            raise AdapterError("LoRAXS alpha=0: the update would stay zero, give another number")
        if self.init not in ("weight", "gradient"):
            raise AdapterError(f"LoRAXS init={self.init!r}: give 'weight' or 'gradient'")
        if self.init == "weight" and self.step is not None:
            raise AdapterError(f"LoRAXS step={self.step!r}: only init='gradient' takes a step")
        if self.init == "gradient" and not (self.step is not None and 0 < self.step < math.inf):
            raise AdapterError(f"LoRAXS step={self.step!r}: give the first learning rate, a finite number above 0")

    @property
    def scaling(self) -> float:
        """The factor s of the low-rank branch."""
        return self.alpha / self.rank

    @torch.no_grad()
    def build(self, base: BaseLayer) -> Adapter:
        """Makes the frozen factors and R, in float32 at least.

        Raises:
            AdapterError: the rank is larger than the weight's, or there is no gradient to start from, or only zeros.
        """
        adapter = self.blank(base)
        matrix = base.weight if self.step is None else -self.step * _gradient(base).sign()
        matrix = matrix.flatten(1).to(torch.promote_types(matrix.dtype, torch.float32))
        if self.rank > min(matrix.shape):
            raise AdapterError(
                f"LoRAXS rank={self.rank} on {base}: its weight has {min(matrix.shape)} singular values, give at most "
                "that many"
            )
        if not matrix.any():
            what = "weight is" if self.step is None else "gradient is, as behind a head whose weight is,"
            raise AdapterError(
                f"LoRAXS on {base}: its {what} zero and has no directions to start from: initialise the model at "
                "random, or train it a little first"
            )
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
        u, values, vh = u[:, : self.rank], values[: self.rank], vh[: self.rank]
        if self.step is None:
            adapter.xs_A.copy_((values[:, None] * vh).view_as(adapter.xs_A))
            adapter.xs_R.normal_(std=_SPREAD)
        else:
            adapter.xs_A.copy_(vh.view_as(adapter.xs_A))
            adapter.xs_R.copy_(torch.diag(values / self.scaling))
        adapter.xs_B.copy_(u.view_as(adapter.xs_B))
        return adapter

    def blank(self, base: BaseLayer) -> "LoRAXSAdapter":
        """Makes the adapter without values, for a file to fill: it holds the factors too."""
        return LoRAXSAdapter(base, self.rank, self.scaling)


class LoRAXSAdapter(Adapter):
    r"""Adds :math:`f s\,B R A x` with the strength f; settings as in `LoRAXS`.

    Attributes:
        xs_A: frozen, (rank, in / groups, *kernel).
        xs_B: frozen, (out, rank, 1, ...).
        xs_R: (rank, rank).
    """

    xs_A: Tensor
    xs_B: Tensor

    def __init__(self, base: BaseLayer, rank: int, scaling: float) -> None:
        super().__init__(base)
        self.scaling = scaling
        out, *rest = base.weight.shape
        self.register_buffer("xs_A", base.weight.new_zeros(rank, *rest))
        self.register_buffer("xs_B", base.weight.new_zeros(out, rank, *(1 for _ in rest[1:])))
        self.xs_R = nn.Parameter(base.weight.new_zeros(rank, rank))

    def forward(self, x: Tensor, y: Tensor, base: BaseLayer) -> Tensor:
        """Adds the contribution for the layer's input `x` to `y`, the output so far."""
        # R goes onto B: with A frozen, the backward pass then keeps A x, r wide, and not x
        up = (self.xs_B.flatten(1) @ (self.xs_R * (self.scaling * self.strength))).view_as(self.xs_B)
        return y + apply_low_rank(base, x, self.xs_A, up)

    def delta_weight(self) -> Tensor:
        """Returns f s B R A in the shape of the base weight."""
        dtype = torch.promote_types(self.xs_R.dtype, torch.float32)
        up = self.xs_B.to(dtype).flatten(1) @ self.xs_R.to(dtype)
        return weight_product(self.xs_A.to(dtype), up) * (self.scaling * self.strength.to(dtype))

    def lora_factors(self) -> tuple[Tensor, Tensor, float]:
        """Returns R A, B and s."""
        return (self.xs_R @ self.xs_A.flatten(1)).view_as(self.xs_A), self.xs_B, self.scaling


def lora_sb_gradients(model: nn.Module, targets: Targets, losses: Iterable[Tensor]) -> None:
    """Sums the gradients of some batches in `weight.grad` of the targeted layers, for `LoRAXS(init="gradient")`.

    To be followed by `inject` on the same targets, which drops the gradients when it has used them. No more than one
    batch's graph is held, and no gradient of any other weight.

    Args:
        model: the model before `inject`, in the mode wanted.
        targets: layers, as for `inject`.
        losses: one a batch. A generator, since each has to be computed when it is asked for:
            ``(cross_entropy(model(x), y) for x, y in batches)``.

    Raises:
        AdapterError: as of `inject`; there is no loss, or a layer has no part in one.
    """
    weights = {path: layer.weight for path, layer in check_layers(model, list(find_parts(model, targets))).items()}
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    sums: list[Tensor] | None = None
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for loss in losses:
            gradients = _gradients(loss, weights)
            sums = gradients if sums is None else [total + new for total, new in zip(sums, gradients, strict=True)]
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
    if sums is None:
        raise AdapterError("lora_sb_gradients got no loss: give at least one batch")
    for weight, total in zip(weights.values(), sums, strict=True):
        weight.grad = total


def _gradients(loss: Tensor, weights: Mapping[str, Tensor]) -> list[Tensor]:
    if not loss.requires_grad:
        raise AdapterError(
            "a loss without gradient: compute it inside the iteration, as a generator does, with gradients enabled"
        )
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    for path, gradient in zip(weights, gradients, strict=True):
        if gradient is None:
            raise AdapterError(f"layer {path!r} has no part in the loss: leave it out of the targets")
    return [gradient for gradient in gradients if gradient is not None]


def _gradient(base: BaseLayer) -> Tensor:
    """Returns the gradient of the layer's weight."""
    gradient = base.weight.grad
    if gradient is None:
        raise AdapterError(
            f"LoRAXS init='gradient' on {base}: its weight has no gradient; call lora_sb_gradients(model, targets, "
            "losses) just before inject"
        )
    if not gradient.isfinite().all():
        raise AdapterError(f"LoRAXS init='gradient' on {base}: the gradient is not finite; look for NaN in the batches")
    return gradient
