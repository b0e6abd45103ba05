"""Group normalisation that keeps concepts apart, as the mask of self-attention does.

Mean and deviation of a group of channels are those of the whole map, so what a LoRA changes in its box changes every
position of the image, other concepts' too: they fade, the more the stronger the LoRA is. The paper leaves this as it
is; its LoRAs change cross-attention alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vision_lowrank.composer.layout import Places


class RegionalNorm:
    """Forward hook of an `nn.GroupNorm`: a position is normalised by what it sees, its box and the background.

    Args:
        places: where the regions are on a map of a height and width.
    """

    def __init__(self, places: Callable[[tuple[int, int]], Places]) -> None:
        self.places = places

    def __call__(self, module: nn.GroupNorm, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Maps the layer's input (B, channels, height, width) to an output of the same shape."""
        (x,) = inputs
        height, width = x.shape[2:]
        views = self.places((height, width)).views
        return output if views is None else normalise(module, x, *views)


def normalise(norm: nn.GroupNorm, x: Tensor, view: Tensor, seen: Tensor) -> Tensor:
    """Normalises each position by mean and variance of the positions in its view.

    Args:
        norm: has the number of groups, weight, bias and epsilon.
        x: (B, channels, height, width).
        view: index (N,) of each position's view.
        seen: which positions are in each view, bool (views, N).

    Returns:
        As `x`; statistics are at least in float32.
    """
    grouped = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2).unflatten(1, (norm.num_groups, -1))
    # the mean of all first, so that the difference of mean squares keeps its digits
    grouped = grouped - grouped.mean((2, 3), keepdim=True)
    share = seen.to(grouped) / (seen.sum(1, keepdim=True) * grouped.shape[2])
    mean = grouped.sum(2) @ share.T  # (B, groups, views)
    variance = (grouped.square().sum(2) @ share.T - mean.square()).clamp(min=0)
    factor = (variance + norm.eps).rsqrt()
    out = (grouped - mean[..., None, view]) * factor[..., None, view]
    out = out.flatten(1, 2).unflatten(2, x.shape[2:])
    if norm.affine:
        out = out * norm.weight[:, None, None] + norm.bias[:, None, None]
    return out.to(x.dtype)
