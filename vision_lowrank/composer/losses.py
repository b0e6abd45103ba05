"""The losses on attention maps that draw every concept into its box, and their constants.

`S` is the number of images, (height, width) the size of the maps, `T` of a prompt's tokens. Equations are those of
arXiv 2403.11627 as the original code computes them; a concept's token map is A, a box's mask M.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_lowrank.composer.attention import Maps
from vision_lowrank.composer.layout import Places
from vision_lowrank.errors import ConfigError

LOSSES = ("enhancement", "fill", "region")


@dataclass(frozen=True)
class Constants:
    """Numbers of the method; by default those of the original code.

    Args:
        enhancement: weight of concept enhancement; 0 leaves it out, as with the other two.
        fill: weight of filling the box.
        region: weight of what leaves the box in self-attention.
        top: share of a box's positions whose largest values count.
        least: smallest number of such values. The original has none, so that boxes under five positions leave the
            enhancement and region losses.
        smoothing: width of the smoothing of token maps; 0 for none.
        fill_mean: separate: rows and columns have a mean each. joint: one mean over both, as the paper writes it.
        step_size: of the latent's first step along the gradient.
        largest_step: longest that a step can be, as a share of the latent's norm; None for any. Now and then a gradient
            is many times longer than all others, and makes noise of the image.
        decay: linear: the step's size falls to half of it by the last step. root: its square does.
        patience: step from which a loss that grows ends the optimisation.
        last: step after which it ends in any case; None for never.
        start_step: one step along the gradient before the latent is laid out anew.
        moments: what the latent's mean and deviation become then. original: what they were. normal: those of noise.

    Raises:
        ConfigError: a number is out of range.
    """

    enhancement: float = 8.0
    fill: float = 2.0
    region: float = 10.0
    top: float = 0.2
    least: int = 1
    smoothing: float = 0.5
    fill_mean: Literal["separate", "joint"] = "separate"
    step_size: float = 20.0
    largest_step: float | None = None
    decay: Literal["linear", "root"] = "root"
    patience: int = 5
    last: int | None = 25
    start_step: bool = False
    moments: Literal["original", "normal"] = "original"

    def __post_init__(self) -> None:
        for name in ("enhancement", "fill", "region", "least", "smoothing", "step_size", "patience"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}; give a number from 0 up")
        if self.largest_step is not None and not self.largest_step > 0:
            raise ConfigError(f"largest_step is {self.largest_step}; give a number above 0, or null")
        if not 0 < self.top <= 1:
            raise ConfigError(f"top is {self.top}; give a share above 0, at most 1")
        choices = {"fill_mean": ("separate", "joint"), "decay": ("linear", "root"), "moments": ("original", "normal")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it can be {' or '.join(allowed)}")

    def only(self, terms: Collection[str]) -> "Constants":
        """Returns the same with weight 0 for the losses that are not named."""
        weights = [getattr(self, name) if name in terms else 0.0 for name in LOSSES]
        return replace(self, enhancement=weights[0], fill=weights[1], region=weights[2])

    def step_at(self, step: int, steps: int) -> float:
        """Returns the size of a step along the gradient, `step` counted from 0 of `steps`."""
        left = 1 - 0.5 * step / (steps - 1) if steps > 1 else 1.0
        return self.step_size * (left**0.5 if self.decay == "root" else left)


# the paper gives weights relative to the enhancement's, and no step size: both keep the scale of the code
CONSTANTS = {
    "code": Constants(),
    "paper": Constants(
        region=0.8 * 8, fill_mean="joint", decay="linear", patience=1, last=None, start_step=True, moments="normal"
    ),
}


@dataclass(frozen=True)
class Losses:
    """Weighted terms (S, terms), regions one after the other and in them tokens; a term that is off has none.

    Args:
        enhancement: of each concept token.
        fill_x: of each concept token, along the width.
        fill_y: of each concept token, along the height.
        region: of each region.
    """

    enhancement: Tensor
    fill_x: Tensor
    fill_y: Tensor
    region: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum (S,)."""
        return torch.cat([self.enhancement, self.fill_x, self.fill_y, self.region], 1).sum(1)


def token_maps(cross: Tensor, tokens: Sequence[int]) -> Tensor:
    """Takes a concept's maps (S, tokens, height, width) out of (S, height, width, T)."""
    return cross[..., list(tokens)].movedim(-1, 1)


def smoothing_kernel(width: float) -> Tensor:
    """Returns the kernel (3, 3) proportional to exp(-(x^2 + y^2) / (2 width)^2), with sum 1."""
    line = torch.exp(-((torch.arange(-1.0, 2.0, dtype=torch.float64) / (2 * width)) ** 2))
    return torch.outer(line, line) / line.sum() ** 2


def smooth(maps: Tensor, width: float) -> Tensor:
    """Smooths maps (S, tokens, height, width) with `smoothing_kernel`, reflected at the borders."""
    kernel = smoothing_kernel(width).to(maps)[None, None]
    padded = F.pad(maps.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernel).view_as(maps)


def centre_weight(height: int, width: int) -> Tensor:
    """Returns exp(-(u^2 + v^2) / 2) over a box (height, width), u and v from -1 to 1, divided by its largest value."""
    lines = [torch.exp(-(torch.linspace(-1, 1, size, dtype=torch.float64) ** 2) / 2) for size in (height, width)]
    weight = torch.outer(*lines)
    return weight / weight.max()


def evaluate(maps: Maps, tokens: Sequence[Sequence[int]], places: Places, constants: Constants) -> Losses:
    """Computes the losses of all regions.

    A region without cells on these maps has no terms; one without positions outside it has no region loss. One too
    small for the share that counts (`least` is 0) has zeros for the losses of the strongest positions.

    Args:
        maps: attention maps; those of self-attention are needed where the region loss has a weight.
        tokens: for each region, positions of the concept's tokens.
        places: of the regions on these maps.
        constants: weights and other numbers.
    """
    nothing = [maps.cross[0].new_zeros(len(maps.cross[0]), 0)]
    enhancement, fill_x, fill_y, outside = (list(nothing) for _ in range(4))
    height, width = places.size
    for index, cells in enumerate(places.cells):
        if cells is None:
            continue
        top, left, bottom, right = cells
        found = token_maps(maps.cross[index], tokens[index])
        if constants.smoothing:
            found = smooth(found, constants.smoothing)
        inside = found[..., top:bottom, left:right]
        count = max(int(constants.top * inside[0, 0].numel()), constants.least)
        if constants.enhancement and not count:
            enhancement.append(inside.new_zeros(inside.shape[:2]))
        elif constants.enhancement:
            weighted = inside * centre_weight(*inside.shape[2:]).to(inside)
            strongest = weighted.flatten(2).topk(min(count, weighted[0, 0].numel()), sorted=False).values.mean(2)
            enhancement.append(constants.enhancement * (1 - strongest).clamp(min=0))
        if constants.fill:
            lengths = (width, height) if constants.fill_mean == "separate" else (width + height,) * 2
            for terms, axis, length in zip((fill_x, fill_y), (2, 3), lengths, strict=True):
                terms.append(constants.fill * (1 - inside.amax(axis)).abs().sum(2) / length)
        if constants.region and not count:
            outside.append(inside.new_zeros(len(inside), 1))
        elif constants.region and maps.own is not None:
            mask = places.masks[index]
            leaving = maps.own[:, mask][:, :, ~mask].flatten(1)
            if leaving.shape[1]:
                largest = leaving.topk(min(count, leaving.shape[1]), sorted=False).values.mean(1, keepdim=True)
                outside.append(constants.region * largest)
    return Losses(*(torch.cat(terms, 1) for terms in (enhancement, fill_x, fill_y, outside)))
