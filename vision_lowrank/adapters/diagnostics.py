"""What a training did to a model: intruder dimensions, effective rank, and whether it learned richly or lazily."""

import dataclasses
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from vision_lowrank.adapters.layers import AdaptedLayer, unrounded
from vision_lowrank.adapters.targets import Targets, base_of, find_targets
from vision_lowrank.errors import AdapterError


@dataclasses.dataclass(frozen=True)
class Intruders:
    """Singular vectors of a trained weight beside those of the weight it started from.

    Attributes:
        similarity: (top, rank) absolute cosines of the first left singular vectors after, and of all before.
        count: how many of the first vectors after are near none before.
    """

    similarity: Tensor
    count: int


@torch.no_grad()
def intruder_dimensions(before: Tensor, after: Tensor, top: int = 10, threshold: float = 0.5) -> Intruders:
    """Finds intruder dimensions: strong directions of a trained weight that the original weight did not have.

    They mark how LoRA differs from full fine-tuning, and go with forgetting (Shuttleworth et al. 2024, arXiv
    2410.21228). One of the `top` left singular vectors after is an intruder if its cosine with every left
    singular vector before is below `threshold`. Convolutions are compared as (out, rest) matrices.

    Args:
        before: weight, (out, ...).
        after: weight of the same shape.
        top: first singular vectors to look at.
        threshold: between 0 and 1.

    Raises:
        AdapterError: the shapes differ.
    """
    if before.shape != after.shape or before.ndim < 2:
        shapes = f"{tuple(before.shape)} and {tuple(after.shape)}"
        raise AdapterError(f"weights of shapes {shapes}: compare two weights of one layer, with two axes or more")
    dtype = torch.promote_types(before.dtype, torch.float32)
    old, new = (torch.linalg.svd(weight.flatten(1).to(dtype), full_matrices=False).U for weight in (before, after))
    with unrounded(old):
        similarity = (new[:, :top].T @ old).abs()
    return Intruders(similarity, int((similarity.amax(dim=1) < threshold).sum()))


def layer_intruders(
    before: nn.Module, after: nn.Module, targets: Targets, top: int = 10, threshold: float = 0.5
) -> dict[str, Intruders]:
    """Compares the weights of the same layers in two models, adapters of the second included, of the first not.

    A fully trained model is compared with the one it started from; an adapted model can be given twice, since its base
    is what it started from.

    Args:
        before: the model at start.
        after: the model after training, with layers of the same names.
        targets: linear and convolution layers, see `targets.find_targets`.
        top: first singular vectors to look at.
        threshold: see `intruder_dimensions`.

    Returns:
        What was found, by path.

    Raises:
        AdapterError: a target matches nothing, or an adapter has no weight because it depends on the input.
    """
    return {
        path: intruder_dimensions(
            _base_weight(before.get_submodule(path)), _weight(path, after.get_submodule(path)), top, threshold
        )
        for path in find_targets(before, targets)
    }


def effective_rank(matrix: Tensor) -> float:
    r"""Returns the entropy rank :math:`\exp(-\sum_i p_i \ln p_i)` with :math:`p_i = \sigma_i / \sum_j \sigma_j`.

    (Roy and Vetterli 2007.) It is k for k equal singular values and never above the rank. The low-rank initialisations
    that make learning lazier or richer (Liu et al. 2023, arXiv 2310.08513) differ in it.

    Args:
        matrix: any weight, taken as (out, rest).
    """
    values = torch.linalg.svdvals(matrix.flatten(1).to(torch.promote_types(matrix.dtype, torch.float32)))
    if not values.any():
        return 0.0
    return torch.special.entr(values / values.sum()).sum().exp().item()


def kernel_alignment(first: Tensor, second: Tensor) -> float:
    r"""Returns :math:`\langle K, K' \rangle / (\|K\| \|K'\|)` of two (samples, samples) kernels, 1 for equal ones."""
    return ((first * second).sum() / (first.norm() * second.norm())).item()


def representation_alignment(before: Tensor, after: Tensor) -> float:
    r"""Returns the alignment of the kernels :math:`X X^\top` of two representations of the same samples.

    Near 1 means that hidden features hardly moved: lazy learning. The kernels are not centred.

    Args:
        before: (samples, ...) features at start.
        after: (samples, ...) features later; their size may differ.

    Raises:
        AdapterError: the numbers of samples differ.
    """
    if len(before) != len(after):
        raise AdapterError(f"{len(before)} and {len(after)} samples: give features of the same samples")
    old, new = before.flatten(1), after.flatten(1)
    with unrounded(old):
        return kernel_alignment(old @ old.T, new @ new.T)


def tangent_kernel_alignment(before: nn.Module, after: nn.Module, inputs: Tensor) -> float:
    """Returns the alignment of two models' tangent kernels; near 1 is lazy learning, see `tangent_kernel`.

    Args:
        before: the model at start; with adapters, if `after` has some, so that the kernels are of the same parameters.
        after: the model later.
        inputs: (samples, ...) batch, some tens of samples.

    Raises:
        AdapterError: see `tangent_kernel`.
    """
    return kernel_alignment(tangent_kernel(before, inputs), tangent_kernel(after, inputs))


def tangent_kernel(model: nn.Module, inputs: Tensor) -> Tensor:
    r"""Returns :math:`K_{ij} = \sum_c \langle \nabla_\theta f_c(x_i), \nabla_\theta f_c(x_j) \rangle`.

    The sum is over the model's outputs c, the gradients are by the parameters that are trained. Needs memory for
    samples times trained parameters and one backward pass for each sample and output.

    Args:
        model: a model in evaluation mode with parameters that have a gradient.
        inputs: (samples, ...) batch, some tens of samples.

    Returns:
        (samples, samples) kernel.

    Raises:
        AdapterError: the model is in training mode, or all of it is frozen.
    """
    if model.training:
        raise AdapterError("the tangent kernel of a model in training mode depends on chance: call model.eval() first")
    parameters = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    if not parameters:
        raise AdapterError("all parameters are frozen: the tangent kernel is over those with a gradient")

    def output(values: dict[str, Tensor], sample: Tensor, place: int) -> Tensor:
        return cast(Tensor, functional_call(model, values, (sample[None],))).flatten()[place]

    with torch.no_grad():
        outputs = model(inputs[:1]).numel()
    kernel = inputs.new_zeros(len(inputs), len(inputs))
    # fused attention kernels cannot be mapped over samples
    with sdpa_kernel(SDPBackend.MATH):
        for place in range(outputs):
            slopes = vmap(grad(output), in_dims=(None, 0, None))(parameters, inputs, place)
            for slope in slopes.values():
                kernel += slope.flatten(1) @ slope.flatten(1).T
    return kernel


def _base_weight(layer: nn.Module) -> Tensor:
    """Returns the weight below adapters, also while they are merged into it."""
    if isinstance(layer, AdaptedLayer) and layer.original is not None:
        return layer.original
    return cast(Tensor, base_of(layer).weight)


@torch.no_grad()
def _weight(path: str, layer: nn.Module) -> Tensor:
    """Returns the weight with its adapters."""
    weight = cast(Tensor, base_of(layer).weight)
    if isinstance(layer, AdaptedLayer) and not layer.merged:
        for name, adapter in layer.by_name.items():
            if not adapter.mergeable:
                raise AdapterError(f"adapter {name!r} on layer {path!r} depends on the input and has no weight")
        # at least in float32: small changes would be lost in the weight's own precision
        with unrounded(weight):
            weight, _ = layer.add_deltas(weight.to(torch.promote_types(weight.dtype, torch.float32)), None)
    return weight
