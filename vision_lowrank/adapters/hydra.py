"""Hydra: one low-rank branch beside the layer and one behind it, which fold into its weight and bias."""

import dataclasses

import torch
from torch import Tensor, nn

from vision_lowrank.adapters.layers import Adapter, BaseLayer, apply_up, apply_weight
from vision_lowrank.adapters.methods import check_alpha, check_dropout, check_rank
from vision_lowrank.errors import AdapterError


@dataclasses.dataclass(frozen=True)
class Hydra:
    r"""Parallel and sequential low-rank update (Kim et al. 2023, arXiv 2309.06922).

    With the layer's own output :math:`z = W x + b`,

    .. math:: y = z + s (B_p (A_p x + a_p) + b_p) + s (B_s (A_s z + a_s) + b_s) ,

    which is the layer with :math:`W' = T W + s B_p A_p` and :math:`b' = T b + s (B_p a_p + b_p) + s (B_s a_s + b_s)`
    where :math:`T = I + s B_s A_s`. A layer without bias could not take :math:`b'`: there the branches have no biases.
    Several Hydras on a layer all read z, so that their order does not matter.

    For a convolution :math:`A_p` has the layer's kernel and the other factors are pointwise.

    Args:
        rank: inner dimension r of both branches, at least 1.
        scale: the factor s, such as 0.1 in the authors' settings for CIFAR.
        dropout: probability of dropping a value between the factors while training.

    Raises:
        AdapterError: a value is out of range.
    """

    rank: int
    scale: float
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_rank("rank", self.rank)
        check_alpha(self.scale)
        check_dropout("Hydra", self.dropout)

    def build(self, base: BaseLayer) -> Adapter:
        """Makes the factors A (Xavier's uniform) and, zero, the factors B and the biases.

        Raises:
            AdapterError: the layer is a convolution with groups.
        """
        if not isinstance(base, nn.Linear) and base.groups > 1:
            raise AdapterError(
                f"Hydra on {base}: its sequential branch mixes all outputs, which a weight in groups cannot hold; "
                "leave the layer out of the targets or use LoRA there"
            )
        return HydraAdapter(base, self.rank, self.scale, self.dropout)


class _Branch(nn.Module):
    """Factors and biases of one branch.

    Attributes:
        down: A, (rank, in, *kernel).
        up: B, (out, rank, 1, ...).
        down_bias: a, (rank,); None beside a layer without bias.
        up_bias: b, (out,); None likewise.
    """

    def __init__(self, base: BaseLayer, rank: int, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        out, new = base.weight.shape[0], base.weight.new_zeros
        self.down = nn.Parameter(nn.init.xavier_uniform_(new(rank, *input_shape)))
        self.up = nn.Parameter(new(out, rank, *(1 for _ in input_shape[1:])))
        biased = base.bias is not None
        self.down_bias = nn.Parameter(new(rank)) if biased else None
        self.up_bias = nn.Parameter(new(out)) if biased else None


class HydraAdapter(Adapter):
    """Adds the branches times the strength; settings as in `Hydra`."""

    def __init__(self, base: BaseLayer, rank: int, scale: float, dropout: float) -> None:
        super().__init__(base)
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        out, *rest = base.weight.shape
        self.parallel = _Branch(base, rank, tuple(rest))
        self.sequential = _Branch(base, rank, (out, *(1 for _ in rest[1:])))

    def forward(self, x: Tensor, y: Tensor, base: BaseLayer) -> Tensor:
        """Adds the contribution for the layer's input `x` to `y`, the output so far."""
        down, down_bias, up, up_bias = self._joined(base, base.weight.dtype)
        factor = self.scale * self.strength
        hidden = self.dropout(apply_weight(base, x, down, down_bias))
        return y + apply_up(hidden, up * factor, None if up_bias is None else up_bias * factor)

    def delta(self, base: BaseLayer) -> tuple[Tensor, Tensor | None]:
        """Returns what the branches add to weight and bias, W' - W and b' - b with the strength in s."""
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        down, down_bias, up, up_bias = self._joined(base, dtype)
        factor = self.scale * self.strength.to(dtype)
        weight = (up.flatten(1) @ down.flatten(1)).view_as(base.weight) * factor
        if down_bias is None or up_bias is None:
            return weight, None
        return weight, (up.flatten(1) @ down_bias + up_bias) * factor

    def _joined(self, base: BaseLayer, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Returns the two branches as one of twice the rank that reads x: A, a, B and b.

        A_s (W x + b) is (A_s W) x + A_s b. Reading x instead of z, the branch does not depend on other adapters of the
        layer, and no second activation is kept for the backward pass.
        """
        parallel, sequential = self.parallel, self.sequential
        behind = sequential.down.to(dtype).flatten(1)
        folded = (behind @ base.weight.to(dtype).flatten(1)).view(-1, *base.weight.shape[1:])
        down = torch.cat([parallel.down.to(dtype), folded])
        up = torch.cat([parallel.up.to(dtype), sequential.up.to(dtype)], dim=1)
        biases = parallel.down_bias, sequential.down_bias, parallel.up_bias, sequential.up_bias, base.bias
        if any(bias is None for bias in biases):
            return down, None, up, None
        a_p, a_s, b_p, b_s, b = (bias.to(dtype) for bias in biases if bias is not None)
        return down, torch.cat([a_p, behind @ b + a_s]), up, b_p + b_s
