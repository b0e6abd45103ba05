"""LoLA-SpecViT at every pixel of an image: what the patches of neighbouring pixels have in common is computed once.

    image with border (D, H + S - 1, W + S - 1) -> maps of stem features (H + h - 1, W + h - 1, C)
    -> tokens of each pixel's patch (H W, h, h, C) -> the model's stages and head -> (H, W, K)

`D` components, `S` patch side in pixels, `H W` pixels to predict, `h` side of a patch's map, `C` width, `K` classes.

Valid convolutions give a place of the scene the same features in every patch. Padded ones do not: zeros stand where the
patch ends, so the features of a place depend on where in the patch it lies, but only within as many positions of the
edge as there were padded convolutions. Positions that nothing tells apart are one class, and each class has one map.
"""

from collections.abc import Iterator, Mapping
from itertools import groupby, product
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vision_lowrank.adapters import AdaptedLayer
from vision_lowrank.models.layers.spectral_stem import convolve_one_channel
from vision_lowrank.models.lola_specvit import LolaSpecViT

# patches at once on a CPU: their activations stay in its caches
CPU_BATCH = 64
# most classes along a side of a patch's map, as a share of its positions, with which sharing pays on a CPU: with 0.7
# (patches of 9) it saves a third of the operations, but takes 1.3 to 2.4 times as long, with 1 up to eight times
CPU_SHARE = 0.5
# features of the class of positions (row, column), (1, channels, D, height, width)
Maps = Mapping[tuple[int, int], Tensor]


class DenseLola(nn.Module):
    """Applies a model to the patch around every pixel; the same as patch by patch but for rounding.

    Padded convolutions with adapters that are not merged are applied patch by patch, and so is all that precedes them;
    likewise where the classes of positions are too many for sharing to pay.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: LolaSpecViT) -> None:
        super().__init__()
        self.model = model
        layers = list(model.stem.convolutions)
        self._layers = list(zip(layers[::3], layers[1::3], layers[2::3], strict=True))
        self._depth = sum(_padded(layer) for layer, *_ in self._layers)
        self.shared = all(isinstance(layer, nn.Conv3d) or not _padded(layer) for layer, *_ in self._layers)

    def forward(self, image: Tensor) -> Tensor:
        """Maps an image with its border to logits (H, W, K), or features (H, W, num_features) of a headless model.

        Memory grows with H W: cut larger images into tiles.

        Args:
            image: (D, H + S - 1, W + S - 1); pixel (0, 0) is that of the patch in the upper left corner.
        """
        height, width = (side - self.model.img_size + 1 for side in image.shape[1:])
        shared = self.shared and self._pays(image.device.type)
        tokens = self._tokens(image, height, width) if shared else self._tokens_by_patch(image)
        batch = CPU_BATCH if image.device.type == "cpu" else len(tokens)
        return torch.cat([self._finish(part) for part in tokens.split(batch)]).unflatten(0, (height, width))

    def _pays(self, device: str) -> bool:
        """Tells whether maps of all classes cost less than the stem on each patch."""
        side = self.model.stem.map_size
        classes = len({_class_of(position, side, self._depth) for position in range(side)})
        return classes <= (CPU_SHARE * side if device == "cpu" else side - 1)

    def _finish(self, tokens: Tensor) -> Tensor:
        """Maps tokens of patches (batch, h, h, C) to logits or features (batch, ...)."""
        x = tokens + self.model.pos_embed
        for stage in self.model.stages:
            x = stage(x)
        return self.model.forward_head(self.model.norm(x))

    def _tokens_by_patch(self, image: Tensor) -> Tensor:
        """Returns the tokens (H W, h, h, C) by applying the stem to each patch."""
        size = self.model.img_size
        patches = rearrange(image.unfold(1, size, 1).unfold(2, size, 1), "D H W i j -> (H W) D i j")
        return torch.cat([self.model.stem(part) for part in patches.split(CPU_BATCH)]).permute(0, 2, 3, 1)

    def _tokens(self, image: Tensor, height: int, width: int) -> Tensor:
        """Returns the tokens (H W, h, h, C), gathered from one map for each class of positions."""
        side, depth = self.model.stem.map_size, self._depth
        maps = {
            place: self.model.stem.collapse(rearrange(features, "B C D y x -> B (C D) y x"))[0].permute(1, 2, 0)
            for place, features in self._features(image[None, None], side)
        }
        tokens = next(iter(maps.values())).new_empty(height, width, side, side, self.model.pos_embed.shape[-1])
        for row, column in product(range(side), repeat=2):
            shared = maps[_class_of(row, side, depth), _class_of(column, side, depth)]
            tokens[:, :, row, column] = shared[row : row + height, column : column + width]
        return tokens.flatten(0, 1)

    def _features(self, x: Tensor, side: int) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Yields the classes of positions in a patch's map and their features after all 3D convolutions."""
        padded = [layers for layers in self._layers if _padded(layers[0])]
        for layer, norm, act in self._layers[: len(self._layers) - len(padded)]:
            x = act(norm(layer(x) if x.shape[1] > 1 else convolve_one_channel(layer, x)))
        maps: Maps = {(0, 0): x}
        for depth, (layer, norm, act) in enumerate(padded, 1):
            classes = sorted({_class_of(position, side, depth) for position in range(side)})
            found = (
                ((row, column), act(norm(_convolve(layer, maps, (row, column), side, depth - 1))))
                for row in classes
                for column in classes
            )
            if depth == len(padded):
                # one at a time, since these are the most and the largest
                yield from found
                return
            maps = dict(found)
        yield from maps.items()


def _padded(layer: nn.Module) -> bool:
    """Tells whether a 3D convolution, perhaps with adapters, continues patches by zeros at their edges."""
    base: Any = layer.base if isinstance(layer, AdaptedLayer) else layer
    return bool(base.padding[1])


def _class_of(position: int, side: int, depth: int) -> int:
    """Returns the least position that `depth` padded convolutions do not tell from this one, of `side` positions."""
    return position if position < depth or position >= side - depth else depth


def _convolve(layer: Any, maps: Maps, place: tuple[int, int], side: int, depth: int) -> Tensor:
    """Applies a padded convolution at a class of positions.

    Args:
        layer: `nn.Conv3d` with a kernel of three rows and columns, without bias.
        maps: features by the classes that `depth` padded convolutions make.
        place: row and column of a position in the patch.
        side: positions along a side of the patch.
        depth: padded convolutions so far.
    """
    height, width = maps[0, 0].shape[-2:]
    parts = []
    for (row, top, bottom), (column, left, right) in product(*(_kernel_parts(line, side, depth) for line in place)):
        x = F.pad(maps[row, column], (1, 1, 1, 1))[..., top : bottom + height - 1, left : right + width - 1]
        kernel = layer.weight[..., top:bottom, left:right]
        parts.append(F.conv3d(x, kernel, padding=(layer.kernel_size[0] // 2, 0, 0)))
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def _kernel_parts(position: int, side: int, depth: int) -> list[tuple[int, int, int]]:
    """Returns which lines of a kernel at a position read which class: (class, first, one after the last)."""
    inside = [line for line in range(3) if 0 <= position + line - 1 < side]
    found = []
    for source, lines in groupby(inside, key=lambda line: _class_of(position + line - 1, side, depth)):
        taken = list(lines)
        found.append((source, taken[0], taken[-1] + 1))
    return found
