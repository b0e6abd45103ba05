"""WeLore: a trained model's weights become low-rank factors, each of its own rank, to fit a budget of parameters."""

import dataclasses
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from vision_lowrank.adapters.layers import BaseLayer
from vision_lowrank.adapters.low_rank_linear import LowRankLinear, check_without_adapters, replace, truncated_factors
from vision_lowrank.adapters.targets import Targets, check_layers, find_targets
from vision_lowrank.errors import AdapterError

# halvings after which a threshold in float64 does not move any more
_HALVINGS = 60


@dataclasses.dataclass(frozen=True)
class Factorisation:
    """What became of the targeted layers.

    Attributes:
        ranks: rank of every layer that was replaced, by path; the other targeted layers are as they were.
        threshold: normalised singular values below it were cut off.
        kept: numbers in the targeted weights after, as a share of those before; biases are not counted.
    """

    ranks: dict[str, int]
    threshold: float
    kept: float


def factorise(model: nn.Module, targets: Targets, budget: float) -> Factorisation:
    r"""Replaces trained layers by their truncated singular value decompositions until a budget is met, in place.

    The rule of WeLore (arXiv 2407.11239): singular values of each matrix are normalised,
    :math:`\hat\sigma = (\sigma - \sigma_{min}) / (\sigma_{max} - \sigma_{min})`, and those below one threshold k for
    all layers are cut off, so matrices with few large values lose most. Here k is the smallest one that meets the
    budget, found by bisection, and a layer is replaced only where its factors hold fewer numbers than its weight, that
    is at a rank below out in / (out + in). Biases stay. A convolution becomes one with `rank` outputs and a pointwise
    one.

    To fine-tune as WeLore does, train the replaced layers only: `freeze_except(model, list(result.ranks))`.

    Args:
        model: a trained model.
        targets: linear layers and convolutions without groups, see `targets.find_targets`.
        budget: share of the targeted weights' numbers to keep, above 0 and at most 1.

    Returns:
        Ranks, threshold and the share that was kept.

    Raises:
        AdapterError: the budget is out of range or below what rank 1 everywhere needs, or a target matches nothing or
            what cannot be factorised. The model is then as it was.
    """
    if not 0.0 < budget <= 1.0:
        raise AdapterError(f"budget={budget}: give the share of the parameters to keep, above 0 and at most 1")
    layers = check_layers(model, find_targets(model, targets))
    for path, layer in layers.items():
        check_without_adapters(model, path, layer)
        if not isinstance(layer, nn.Linear) and layer.groups > 1:
            raise AdapterError(f"layer {path!r} is a convolution in {layer.groups} groups: leave it out of the targets")
    spectra = {path: _normalised_spectrum(layer.weight) for path, layer in layers.items()}
    shapes = {path: tuple(layer.weight.flatten(1).shape) for path, layer in layers.items()}
    total = sum(rows * columns for rows, columns in shapes.values())
    if (least := _size(_ranks(1.0, spectra, shapes), shapes)) > budget * total:
        raise AdapterError(
            f"budget={budget}: even rank 1 in every layer needs {least / total:.4f} of the {total:,} numbers; give at "
            "least that, or target larger layers"
        )
    low, high = 0.0, 1.0
    if _size(_ranks(low, spectra, shapes), shapes) <= budget * total:
        high = low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _size(_ranks(middle, spectra, shapes), shapes) > budget * total:
            low = middle
        else:
            high = middle
    ranks = _ranks(high, spectra, shapes)
    new = {path: _factorised(layers[path], rank) for path, rank in ranks.items()}
    for path, module in new.items():
        replace(model, path, module)
    return Factorisation(ranks, high, _size(ranks, shapes) / total)


@torch.no_grad()
def _normalised_spectrum(weight: Tensor) -> Tensor:
    """Returns the singular values of a weight, the largest as 1, the smallest as 0; all 1 where they are equal."""
    values = torch.linalg.svdvals(weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32)))
    # compared with float64 thresholds many times
    values = values.double().cpu()
    spread = values[0] - values[-1]
    return (values - values[-1]) / spread if spread > 0 else torch.ones_like(values)


def _ranks(threshold: float, spectra: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Returns the rank of each layer that its factors make smaller."""
    ranks = {path: int((spectrum >= threshold).sum()) for path, spectrum in spectra.items()}
    return {path: rank for path, rank in ranks.items() if rank * sum(shapes[path]) < shapes[path][0] * shapes[path][1]}


def _size(ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Returns how many numbers all weights hold with these ranks, the others dense."""
    return sum(
        ranks[path] * (rows + columns) if path in ranks else rows * columns for path, (rows, columns) in shapes.items()
    )


def _factorised(layer: BaseLayer, rank: int) -> nn.Module:
    """Returns what computes the nearest weight of that rank, and the layer's own bias."""
    weight = layer.weight.detach()
    down, up = truncated_factors(weight.flatten(1), rank)
    if isinstance(layer, nn.Linear):
        return LowRankLinear(layer, down, up)
    # not its own class, whose constructor may take other arguments
    kind = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(layer, kind))
    first = kind(
        layer.in_channels,
        rank,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        bias=False,
        padding_mode=layer.padding_mode,
        device="meta",
    )
    second = kind(rank, layer.out_channels, 1, bias=False, device="meta")
    first.weight = nn.Parameter(down.view(rank, *weight.shape[1:]))
    second.weight = nn.Parameter(up.view(-1, rank, *(1 for _ in weight.shape[2:])))
    second.register_parameter("bias", cast(nn.Parameter | None, layer.bias))
    return nn.Sequential(first, second).train(layer.training)
