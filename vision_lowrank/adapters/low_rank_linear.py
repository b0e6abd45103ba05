r"""Linear layers whose weight is never stored: low rank for pretraining and compression, and with dense columns.

Shapes: the weight W is (out, in), A ("down") is (rank, in), B ("up") is (out, rank). All layers here have `weight` and
`bias` as `nn.Linear` has them, so code that reads them without calling the layer computes the same.
"""

import math
from collections.abc import Callable, Iterable
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_lowrank.adapters import methods
from vision_lowrank.adapters.layers import unrounded
from vision_lowrank.adapters.targets import Targets, check_layers, find_targets, walk
from vision_lowrank.errors import AdapterError

_Layer = TypeVar("_Layer", bound=nn.Module)


class FactorisedLinear(nn.Module):
    """A linear layer that computes its weight from smaller tensors; stands in a model where `layer` stood.

    Args:
        layer: gives sizes, mode and the bias, which is taken over as it is.
    """

    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.register_parameter("bias", cast(nn.Parameter | None, layer.bias))
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """The (out, in) weight, differentiable."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in) to (..., out)."""
        return F.linear(x, self.weight, self.bias)

    def dense(self) -> nn.Linear:
        """Returns the plain layer that computes the same, with the same bias."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        with unrounded(next(self.parameters())):
            layer.weight = nn.Parameter(self.weight.detach().clone())
        layer.register_parameter("bias", self.bias)
        return layer.train(self.training)


class LowRankLinear(FactorisedLinear):
    r"""Computes :math:`y = s\,B A x + b` and trains A and B, as the low-rank models of arXiv 2505.22922.

    Args:
        layer: the layer to stand for.
        down: A, (rank, in).
        up: B, (out, rank).
        scaling: s.

    Raises:
        AdapterError: the rank is above the smaller side of the weight, where factors hold no less than the weight.
    """

    def __init__(self, layer: nn.Linear, down: Tensor, up: Tensor, scaling: float = 1.0) -> None:
        super().__init__(layer)
        check_rank(layer, len(down))
        self.scaling = scaling
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)

    @property
    def weight(self) -> Tensor:
        """The (out, in) weight s B A, differentiable."""
        return self.up @ self.down * self.scaling

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in) to (..., out)."""
        return F.linear(F.linear(x, self.down) * self.scaling, self.up, self.bias)

    @torch.no_grad()
    def refactorise_(self) -> None:
        r"""Balances the factors in place: B A stays, and :math:`B^\top B = A A^\top` becomes its singular values.

        With the singular value decomposition :math:`B A = U \Sigma V^\top` they are :math:`B = U \Sigma^{1/2}` and
        :math:`A = \Sigma^{1/2} V^\top`. Moments that an optimiser holds for the old factors are wrong afterwards: see
        `refactorise`.
        """
        dtype = torch.promote_types(self.up.dtype, torch.float32)
        # B A itself, which may be large, is never formed
        up_basis, up_triangle = torch.linalg.qr(self.up.to(dtype))
        down_basis, down_triangle = torch.linalg.qr(self.down.to(dtype).T)
        left, values, right = torch.linalg.svd(up_triangle @ down_triangle.T)
        root = values.sqrt()
        self.up.copy_(up_basis @ (left * root))
        self.down.copy_((down_basis @ (right.T * root)).T)


class LostStyleLinear(LowRankLinear):
    r"""Computes :math:`y = B A x + C x_J + b`: the dominant part of a weight, and dense columns J of what remains.

    In the style of LOST (arXiv 2508.02668), whose abstract promises a low-rank part from the leading singular values
    and a channel-wise sparse part from the others. Its exact choice of channels and mixing are not public in code; here
    J are the columns of the remainder with the largest norms, and the parts are summed. A, B and C are trained:
    rank (out + in) + columns out numbers.

    Args:
        layer: the layer to stand for and to start from.
        rank: singular values kept in B A, the largest ones.
        columns: input channels that keep their remainder.

    Raises:
        AdapterError: rank or columns do not fit the layer.
    """

    channels: Tensor

    def __init__(self, layer: nn.Linear, rank: int, columns: int) -> None:
        check_rank(layer, rank)
        if not 1 <= columns <= layer.in_features:
            raise AdapterError(f"columns={columns}: give from 1 to {layer.in_features}, the layer's inputs")
        down, up = truncated_factors(layer.weight, rank)
        super().__init__(layer, down, up)
        rest = layer.weight.detach() - up @ down
        channels = rest.norm(dim=0).topk(columns).indices.sort().values
        self.register_buffer("channels", channels)
        self.columns = nn.Parameter(rest[:, channels])

    @property
    def weight(self) -> Tensor:
        """The (out, in) weight, differentiable."""
        weight = super().weight  # within autocast in its precision
        return weight.index_add(1, self.channels, self.columns.to(weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in) to (..., out)."""
        return super().forward(x) + F.linear(x[..., self.channels], self.columns)


def to_low_rank(model: nn.Module, targets: Targets, rank: int, alpha: float) -> list[str]:
    r"""Puts randomly started `LowRankLinear` layers with :math:`s = \alpha / r` in place of layers, to be pretrained.

    Both factors start as `nn.Linear` starts, since a factor at zero would make the whole layer zero. The layers'
    weights are given up; biases stay.

    Args:
        model: any module.
        targets: linear layers, see `targets.find_targets`.
        rank: r, at most the smaller side of every targeted weight.
        alpha: numerator of the scale.

    Returns:
        The paths of the replaced layers.

    Raises:
        AdapterError: see `replace_linear`, the rank does not fit a layer, or alpha is not finite.
    """
    methods.check_alpha(alpha)

    def make(layer: nn.Linear) -> LowRankLinear:
        check_rank(layer, rank)
        down = layer.weight.new_empty(rank, layer.in_features)
        up = layer.weight.new_empty(layer.out_features, rank)
        for factor in (down, up):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        return LowRankLinear(layer, down, up, alpha / rank)

    return list(replace_linear(model, targets, make))


def to_lost_style(model: nn.Module, targets: Targets, rank: int, columns: int) -> list[str]:
    """Puts `LostStyleLinear` layers in place of layers, started from their weights; see that class.

    Returns:
        The paths of the replaced layers.

    Raises:
        AdapterError: see `replace_linear`, or rank or columns do not fit a layer.
    """
    return list(replace_linear(model, targets, lambda layer: LostStyleLinear(layer, rank, columns)))


def to_dense(model: nn.Module) -> list[str]:
    """Puts a plain linear layer in place of every factorised one, for instance to put adapters on it.

    Returns:
        The paths of the replaced layers.

    Raises:
        AdapterError: there are none.
    """
    layers = {path: module for path, module in walk(model) if isinstance(module, FactorisedLinear)}
    if not layers:
        raise AdapterError("the model has no factorised layers: call to_low_rank, to_sltrain or factorise first")
    for path, layer in layers.items():
        replace(model, path, layer.dense())
    return list(layers)


def refactorise(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Balances all low-rank factors of a model and resets their moments, as arXiv 2505.22922 proposes now and then.

    Args:
        model: a model with `LowRankLinear` layers.
        optimizer: the optimiser that trains it.

    Raises:
        AdapterError: the model has no such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    if not layers:
        raise AdapterError("the model has no low-rank layers to refactorise: call to_low_rank first")
    for layer in layers:
        layer.refactorise_()
        reset_moments(optimizer, [layer.down, layer.up])


def reset_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Lets an optimiser forget what it has gathered for some parameters, step count included.

    With moments at zero but an old step count, Adam's bias correction would be missing and its first steps too long.
    """
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


@torch.no_grad()
def truncated_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""Returns A :math:`= \Sigma^{1/2} V^\top` and B :math:`= U \Sigma^{1/2}`, whose product is nearest to a matrix.

    Args:
        weight: (out, in) matrix.
        rank: singular values kept.

    Returns:
        A (rank, in) and B (out, rank) in the precision of `weight`.
    """
    left, values, right = torch.linalg.svd(
        weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False
    )
    root = values[:rank].sqrt()
    down, up = root[:, None] * right[:rank], left[:, :rank] * root
    return down.to(weight.dtype), up.to(weight.dtype)


def replace_linear(model: nn.Module, targets: Targets, make: Callable[[nn.Linear], _Layer]) -> dict[str, _Layer]:
    """Puts what `make` returns in place of linear layers; all are made before the first is replaced.

    Args:
        model: any module.
        targets: linear layers, see `targets.find_targets`.
        make: gets a layer, returns what is to stand for it.

    Returns:
        The new layers by path, in the model's order.

    Raises:
        AdapterError: a target matches nothing, a layer that is no linear one, has adapters, is by-passed by its owner,
            or shares its weight. The model is then as it was.
    """
    new = {}
    for path, layer in check_layers(model, find_targets(model, targets)).items():
        if not isinstance(layer, nn.Linear):
            raise AdapterError(f"layer {path!r} is a {type(layer).__name__}; name linear layers only")
        check_without_adapters(model, path, layer)
        new[path] = make(layer)
    for path, module in new.items():
        replace(model, path, module)
    return new


def check_without_adapters(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Checks that the base layer found at `path` stands there itself.

    Raises:
        AdapterError: there are adapters on it.
    """
    if model.get_submodule(path) is not layer:
        raise AdapterError(f"layer {path!r} has adapters: call merge_and_remove(model) or remove(model) first")


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module where another one is."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def check_rank(layer: nn.Linear, rank: int) -> None:
    """Checks the inner dimension of factors.

    Raises:
        AdapterError: it is no whole number from 1 to the smaller side of the weight.
    """
    methods.check_rank("rank", rank)
    most = min(layer.in_features, layer.out_features)
    if rank > most:
        size = f"{layer.in_features} inputs and {layer.out_features} outputs"
        raise AdapterError(f"rank={rank} for a layer with {size}: give from 1 to {most}")
