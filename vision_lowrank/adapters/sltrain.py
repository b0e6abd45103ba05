"""SLTrain: a weight that is the sum of a low-rank and a sparse part, for pretraining."""

import itertools
import math

import torch
from torch import Tensor, nn

from vision_lowrank.adapters.low_rank_linear import FactorisedLinear, check_rank, replace_linear
from vision_lowrank.adapters.methods import check_alpha
from vision_lowrank.adapters.targets import Targets
from vision_lowrank.errors import AdapterError


class SLTrainLinear(FactorisedLinear):
    r"""A linear layer with the weight :math:`\tfrac{\alpha}{r} B A \oplus_I V`.

    (SLTrain, Han et al. 2024, arXiv 2406.02214.) I is a random set of places that never changes; V holds one trained
    number for each. The layer trains rank (out + in) + ⌊density out in⌋ numbers. B starts at zero, A as `nn.Linear`
    starts, V uniform between :math:`\pm 1/\sqrt{in}`. The weight is formed in every forward pass: what is saved is
    optimiser state and gradients, not arithmetic.

    Args:
        layer: gives sizes, precision and bias; its weight is given up.
        rank: r, at most the smaller side of the weight.
        alpha: numerator of the scale of the low-rank part.
        density: share of the weight's places in I, above 0 and at most 1.
        seed: of the draw of I, which leaves torch's global generator alone.

    Raises:
        AdapterError: a value is out of range.
    """

    support: Tensor

    def __init__(self, layer: nn.Linear, rank: int, alpha: float, density: float, seed: int) -> None:
        super().__init__(layer)
        check_rank(layer, rank)
        check_alpha(alpha)
        if not 0.0 < density <= 1.0:
            raise AdapterError(f"SLTrain density={density}: give a share above 0 and at most 1, such as 0.03")
        weight = layer.weight
        places = int(density * weight.numel())
        generator = torch.Generator().manual_seed(seed)
        self.scaling = alpha / rank
        self.down = nn.Parameter(weight.new_empty(rank, layer.in_features))
        self.up = nn.Parameter(weight.new_zeros(layer.out_features, rank))
        self.values = nn.Parameter(weight.new_empty(places))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        nn.init.uniform_(self.values, -(layer.in_features**-0.5), layer.in_features**-0.5)
        # in the checkpoint too: without it V means nothing
        support = torch.randperm(weight.numel(), generator=generator)[:places].sort().values
        self.register_buffer("support", support.to(weight.device))

    @property
    def weight(self) -> Tensor:
        """The (out, in) weight, differentiable."""
        low_rank = self.up @ self.down * self.scaling
        # under autocast the product is narrower than V
        return low_rank.flatten().index_add(0, self.support, self.values.to(low_rank.dtype)).view_as(low_rank)


def to_sltrain(model: nn.Module, targets: Targets, rank: int, alpha: float, density: float, seed: int = 0) -> list[str]:
    """Puts `SLTrainLinear` layers in place of layers, to be pretrained; each draws its own places.

    Args:
        model: any module.
        targets: linear layers, see `targets.find_targets`.
        rank: inner dimension of the low-rank part.
        alpha: numerator of its scale.
        density: share of each weight's places that the sparse part fills.
        seed: of the first layer's draw; the others count on from it.

    Returns:
        The paths of the replaced layers.

    Raises:
        AdapterError: see `replace_linear`, or a value is out of range.
    """
    seeds = itertools.count(seed)
    return list(replace_linear(model, targets, lambda layer: SLTrainLinear(layer, rank, alpha, density, next(seeds))))
