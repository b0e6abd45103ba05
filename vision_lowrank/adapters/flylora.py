"""FlyLoRA: a frozen sparse random projection that also chooses which ranks each token uses."""

import dataclasses
import math

import torch
from torch import Tensor, nn

from vision_lowrank.adapters.dylora import find_adapters
from vision_lowrank.adapters.layers import Adapter, BaseLayer, Factor, apply_up, apply_weight, weight_product
from vision_lowrank.adapters.methods import check_alpha, check_rank
from vision_lowrank.adapters.nola import check_seed, layer_seed
from vision_lowrank.errors import AdapterError
from vision_lowrank.processes import sum_over_processes


@dataclasses.dataclass(frozen=True)
class FlyLoRA:
    r"""Update by the k ranks a token excites most (Zou et al. 2025, arXiv 2510.08396).

    .. math:: h = A x, \qquad y = W x + \frac{\alpha}{r} B (m(h) \odot h),

    where m is 1 at the k largest :math:`|h_i + d_i|` of the token and 0 elsewhere. A is random and frozen, each of its
    rows with the share k / r of entries that are not zero, these from :math:`N(0, 1 / r^2)`; B starts at zero and is
    all that is trained. In a convolution a token is an output position and A sees its receptive field.

    The bias d, zero at first, keeps the ranks in use: `balance_ranks`, after each step of the optimiser, moves
    :math:`d_i` by :math:`u\,\mathrm{sign}(\bar c - c_i)`, with :math:`c_i` the number of tokens of the step that chose
    rank i and :math:`\bar c` its mean. The paper's two published programs differ in the selection and the update; this
    follows the formulas above in both, and passes the gradient on to x.

    The choice depends on the input, so a layer merges only with k = r, where this is a LoRA with A frozen. Adapters
    trained with one seed on one base share A.

    Args:
        rank: inner dimension r, at least 1.
        alpha: numerator of the scale; twice the rank in the paper's experiments.
        active: ranks k a token uses, from 1 to `rank`.
        balance_rate: step u of the bias, at least 0.
        seed: a whole number of at least 0.

    Raises:
        AdapterError: a value is out of range.
    """

    rank: int
    alpha: float
    active: int
    balance_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check_rank("rank", self.rank)
        check_alpha(self.alpha)
        check_rank("active", self.active)
        if self.active > self.rank:
            raise AdapterError(f"FlyLoRA active={self.active}: give at most the rank, {self.rank}")
        if not 0.0 <= self.balance_rate < math.inf:
            raise AdapterError(f"FlyLoRA balance_rate={self.balance_rate!r}: give a finite number of at least 0")
        check_seed(self.seed)

    @property
    def scaling(self) -> float:
        """The factor of the low-rank branch."""
        return self.alpha / self.rank

    def build(self, base: BaseLayer) -> Adapter:
        """Makes the frozen A and the zero B.

        Raises:
            AdapterError: the layer is a convolution with groups.
        """
        _check_whole(base)
        return FlyLoRAAdapter(base, self, layer_seed(base, self.seed))

    def blank(self, base: BaseLayer) -> Adapter:
        """Makes what `build` makes, for a file to fill.

        Raises:
            AdapterError: as `build`.
        """
        _check_whole(base)
        return FlyLoRAAdapter(base, self, None)


class FlyLoRAAdapter(Adapter):
    r"""Adds :math:`f (\alpha / r) B (m(h) \odot h)` with the strength f; settings as in `FlyLoRA`.

    Attributes:
        fly_A: the frozen projection, (rank, in, *kernel).
        fly_B: the trained factor, (out, rank, 1, ...).
        fly_d: the balancing bias, (rank,) in float32, for its steps are too small for bfloat16.
        fly_counts: tokens that chose each rank in training mode since d last moved, (rank,). No buffer, which
            DistributedDataParallel would overwrite with the first process's at each forward. Checkpointing of
            activations computes a forward twice and counts twice, which leaves the sign of the move as it is.
    """

    fly_A: Tensor
    fly_d: Tensor

    def __init__(self, base: BaseLayer, settings: FlyLoRA, seed: int | None) -> None:
        super().__init__(base)
        self.settings = settings
        self.mergeable = settings.active == settings.rank
        out, *rest = base.weight.shape
        self.register_buffer("fly_A", base.weight.new_zeros(settings.rank, *rest))
        if seed is not None:
            projection = _sparse_random(settings.rank, math.prod(rest), settings.active, seed)
            self.fly_A.copy_(projection.view_as(self.fly_A))
        self.register_buffer("fly_d", torch.zeros(settings.rank, device=base.weight.device))
        self.fly_counts = torch.zeros_like(self.fly_d)
        self.fly_B = Factor(base.weight.new_zeros(out, settings.rank, *(1 for _ in rest[1:])))

    def forward(self, x: Tensor, y: Tensor, base: BaseLayer) -> Tensor:
        """Adds the contribution for the layer's input `x` to `y`, the output so far."""
        h = apply_weight(base, x, self.fly_A)  # (..., rank) or (batch, rank, *space)
        if not self.mergeable:
            h = h * self._choose(h.detach())
        return y + apply_up(h, self.fly_B.weight * self.strength) * self.settings.scaling

    def delta_weight(self) -> Tensor:
        """Returns f (α / r) B A in the shape of the base weight.

        Raises:
            AdapterError: tokens use some of the ranks only.
        """
        if not self.mergeable:
            raise AdapterError(
                f"FlyLoRA with active={self.settings.active} of {self.settings.rank} ranks has no equivalent weight: "
                "keep it unmerged, or train with active equal to the rank"
            )
        dtype = torch.promote_types(self.fly_A.dtype, torch.float32)
        product = weight_product(self.fly_A.to(dtype), self.fly_B.weight.to(dtype))
        return product * (self.settings.scaling * self.strength.to(dtype))

    def lora_factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Returns A, B and s where tokens use all ranks."""
        return (self.fly_A, self.fly_B.weight, self.settings.scaling) if self.mergeable else None

    def _choose(self, h: Tensor) -> Tensor:
        """Returns the mask m, 1 at the chosen ranks of each token, and in training mode counts."""
        kernel = [1] * (self.fly_A.ndim - 2)
        axis = -1 - len(kernel)
        chosen = (h + self.fly_d.view(-1, *kernel)).abs().topk(self.settings.active, dim=axis).indices
        mask = torch.zeros_like(h).scatter(axis, chosen, 1.0)
        if self.training:
            counts = mask.movedim(axis, -1).reshape(-1, self.settings.rank).sum(0, dtype=torch.float32)
            self.fly_counts = self.fly_counts.to(counts.device) + counts
        return mask


@torch.no_grad()
def balance_ranks(model: nn.Module, name: str | None = None) -> None:
    """Moves the biases d against what tokens chose since the last call; to be called after each step of the optimiser.

    The tokens of all processes that train together count.

    Args:
        model: a model with FlyLoRA adapters.
        name: the adapters to move; None moves all.

    Raises:
        AdapterError: there are no such adapters, or they are merged.
    """
    for *_, adapter in find_adapters(model, FlyLoRAAdapter, name):
        counts = sum_over_processes(adapter.fly_counts.to(adapter.fly_d.device))
        adapter.fly_d += adapter.settings.balance_rate * torch.sign(counts.mean() - counts)
        adapter.fly_counts = torch.zeros_like(counts)


def _check_whole(base: BaseLayer) -> None:
    if not isinstance(base, nn.Linear) and base.groups > 1:
        raise AdapterError(
            f"FlyLoRA on {base}: with groups a position has one h for each group and no common choice of ranks; "
            "leave the layer out of the targets or use LoRA there"
        )


def _sparse_random(rank: int, inputs: int, active: int, seed: int) -> Tensor:
    """Draws A, (rank, inputs) in float32: in each row the share active / rank of entries, at random places."""
    generator = torch.Generator().manual_seed(seed)
    filled = max(1, round(inputs * active / rank))
    places = torch.rand(rank, inputs, generator=generator, device="cpu").topk(filled).indices
    values = torch.randn(rank, filled, generator=generator, device="cpu") / rank
    return torch.zeros(rank, inputs, device="cpu").scatter(1, places, values)
