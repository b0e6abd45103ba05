"""3D-convolutional spectral front-end that keeps apart which component carried what."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from vision_lowrank.errors import ConfigError
from vision_lowrank.models.layers.shared_norm import SharedBatchNorm3d

# side in pixels below which valid convolutions stop
SMALLEST_MAP = 7


def convolve_one_channel(layer: nn.Module, x: Tensor) -> Tensor:
    """Applies a 3D convolution of one channel; under autocast of a processor in float32, cast to autocast's format.

    A product over so few numbers gains nothing from bf16 matrix instructions, and takes twice as long in their format.

    Args:
        layer: the convolution, perhaps with adapters.
        x: (batch, 1, depth, height, width).
    """
    if not torch.is_autocast_enabled("cpu") or x.dtype == torch.float64:
        return layer(x)
    with torch.autocast("cpu", enabled=False):
        y: Tensor = layer(x.to(next(layer.parameters()).dtype))
    return y.to(torch.get_autocast_dtype("cpu"))


class SpectralStem(nn.Module):
    """3D convolutions over (component, row, column), then a learned collapse of the component axis.

    The components are the depth axis of the convolutions. A mean over depth after kernels that all depths share, as in
    the original LoLA-SpecViT, would erase the components' order; here depth is folded into the channels and mixed by a
    1 x 1 convolution with a weight for each (component, feature) pair.

    Convolutions are valid in space as long as the map stays at least `SMALLEST_MAP` wide, and padded by one position
    after that, so patches of any size go through; along the components they are padded to keep their number, and no
    longer than the components are.

    Args:
        num_components: spectral components or bands of the input.
        patch_size: side of the input in pixels.
        channels: output channels of each 3D convolution.
        depths: kernel length of each 3D convolution along the components, odd; clipped to their number.
        dim: width of the output.

    Attributes:
        map_size: side of the output map.

    Raises:
        ConfigError: `channels` and `depths` differ in length, or a kernel length is even.
    """

    def __init__(
        self,
        num_components: int,
        patch_size: int,
        channels: Sequence[int],
        depths: Sequence[int],
        dim: int,
    ) -> None:
        super().__init__()
        if len(channels) != len(depths) or any(depth % 2 == 0 for depth in depths):
            raise ConfigError(f"stem_channels={channels}, stem_depths={depths}: give as many of both, odd depths")
        self.map_size = patch_size
        layers: list[nn.Module] = []
        for before, after, depth in zip([1, *channels], channels, depths, strict=False):
            margin = 0 if self.map_size - 2 >= SMALLEST_MAP else 1
            self.map_size -= 2 - 2 * margin
            # PyTorch 2.14 computes wrong bf16 weight gradients on CPUs where a padded kernel exceeds the first axis
            depth = min(depth, num_components - 1 + num_components % 2)
            padding = (depth // 2, margin, margin)
            # the normalisation has a shift of its own
            layers += [nn.Conv3d(before, after, (depth, 3, 3), padding=padding, bias=False), SharedBatchNorm3d(after)]
            layers += [nn.SiLU()]
        self.convolutions = nn.Sequential(*layers)
        self.collapse = nn.Conv2d(channels[-1] * num_components, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, components, height, width) to (batch, dim, map, map)."""
        first, *others = self.convolutions
        features = convolve_one_channel(first, x.unsqueeze(1))
        for layer in others:
            features = layer(features)
        return self.collapse(rearrange(features, "B C D h w -> B (C D) h w"))
