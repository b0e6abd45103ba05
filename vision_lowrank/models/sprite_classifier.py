"""A small classifier that tells which sprite, or none, a part of a picture shows, and where sprites are."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torchvision.ops import nms

from vision_lowrank.errors import ConfigError

# height and width that every part is brought to
CROP = 32
# of its normalisation
GROUPS = 8
# crops judged together: more do not fit the caches of a CPU, and take twice the time
AT_ONCE = 32
# sides of the windows in which sprites are looked for, as shares of the picture's, and their distance as share of them
WINDOWS = (0.3, 0.36, 0.44, 0.53, 0.64, 0.78, 0.95)
STRIDE = 0.2
# of a find
LEAST_PROBABILITY = 0.5
# intersection over union of two boxes; of two that share more, the surer one stays
LARGEST_OVERLAP = 0.3


@dataclass(frozen=True)
class Found:
    """A sprite in a picture: its name, box (top, left, bottom, right) in pixels, and probability."""

    name: str
    box: tuple[float, float, float, float]
    probability: float


class SpriteClassifier(nn.Module, PyTorchModelHubMixin, library_name="vision-lowrank", license="apache-2.0"):
    """Convolutions at 32, 16 and 8 pixels, means over places, one logit a sprite and, last, one for none.

    Args:
        names: of the sprites.
        width: channels at 32 pixels, a multiple of eight.

    Raises:
        ConfigError: it is none.
    """

    def __init__(self, names: Sequence[str], width: int = 24) -> None:
        super().__init__()
        if width < GROUPS or width % GROUPS:
            raise ConfigError(f"width={width}: give a multiple of {GROUPS}")
        self.names = list(names)
        layers: list[nn.Module] = []
        for before, after, stride in ((3, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)):
            for first, second, step in ((before, after, stride), (after, after, 1)):
                layers += [nn.Conv2d(first, second, 3, step, 1), nn.GroupNorm(GROUPS, second), nn.GELU()]
        self.features = nn.Sequential(*layers)
        # keeps a coarse layout, by which a sprite differs from its parts
        self.head = nn.Linear(4 * width * 16, len(self.names) + 1)

    def forward(self, crops: Tensor) -> Tensor:
        """Takes crops (B, 3, 32, 32) from -1 to 1 to logits (B, sprites + 1).

        Raises:
            ConfigError: the crops have another shape.
        """
        if crops.shape[1:] != (3, CROP, CROP):
            raise ConfigError(f"crops are {tuple(crops.shape)}; give (crops, 3, {CROP}, {CROP}), as `crop` makes them")
        logits: Tensor = self.head(F.adaptive_avg_pool2d(self.features(crops), 4).flatten(1))
        return logits

    @torch.inference_mode()
    def classify(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Tells what parts of an image show.

        Args:
            image: (3, height, width) from -1 to 1.
            boxes: (B, 4) as top, left, bottom, right in pixels.

        Returns:
            Probabilities (B, sprites + 1), of none last.
        """
        parts = [crop(image.expand(len(some), -1, -1, -1), some) for some in boxes.split(AT_ONCE)]
        logits = torch.cat([self(part) for part in parts])
        return logits.float().softmax(-1)

    def locate(self, image: Tensor) -> list[Found]:
        """Returns the sprites of any size in an image (3, side, side) from -1 to 1, the surest first."""
        boxes = _windows(image.shape[-1]).to(image.device)
        probabilities = self.classify(image, boxes)
        best, index = probabilities.max(-1)
        chosen = ((index < len(self.names)) & (best >= LEAST_PROBABILITY)).nonzero().squeeze(1)
        kept = chosen[nms(boxes[chosen][:, [1, 0, 3, 2]], best[chosen], LARGEST_OVERLAP)]
        return [
            Found(self.names[int(index[place])], tuple(boxes[place].tolist()), float(best[place])) for place in kept
        ]


def crop(images: Tensor, boxes: Tensor) -> Tensor:
    """Cuts one box out of each image and brings it to 32 x 32 pixels; what lies outside repeats the edge.

    Args:
        images: (B, 3, height, width).
        boxes: (B, 4) as top, left, bottom, right in pixels.

    Returns:
        Crops (B, 3, 32, 32).
    """
    # four samples a pixel, since large boxes shrink
    count = 2 * CROP
    steps = (torch.arange(count, device=images.device) + 0.5) / count
    top, left, bottom, right = boxes.to(images).unbind(1)
    rows = (top[:, None] + (bottom - top)[:, None] * steps) * 2 / images.shape[-2] - 1  # (B, count)
    columns = (left[:, None] + (right - left)[:, None] * steps) * 2 / images.shape[-1] - 1
    grid = torch.stack([columns[:, None].expand(-1, count, -1), rows[:, :, None].expand(-1, -1, count)], -1)
    samples = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return F.avg_pool2d(samples, 2)


def _windows(side: int) -> Tensor:
    """Returns square windows (W, 4) of all sizes over a square picture."""
    boxes = []
    for share in WINDOWS:
        size = share * side
        count = 1 + round((side - size) / (STRIDE * size))
        edges = torch.linspace(0, side - size, count).tolist()
        boxes += [(top, left, top + size, left + size) for top in edges for left in edges]
    return torch.tensor(boxes)
