"""Small models with every kind of layer that takes adapters."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 8), (3, 6)),
    "linear tokens, no bias": (lambda: nn.Linear(6, 8, bias=False), (2, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 2), padding=1, bias=False), (2, 6, 5, 5)),
    "conv2d dilated, reflected": (
        lambda: nn.Conv2d(6, 8, 3, padding=2, dilation=2, padding_mode="reflect"),
        (2, 6, 7, 7),
    ),
    "conv2d groups": (lambda: nn.Conv2d(6, 8, 3, padding="same", groups=2), (2, 6, 5, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (2, 6, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(6, 8, (3, 1, 2), stride=(1, 2, 1)), (2, 6, 4, 5, 5)),
    "conv3d groups": (lambda: nn.Conv3d(6, 9, 2, groups=3), (1, 6, 3, 3, 3)),
}


class Toy(nn.Module):
    """Volumes (batch, 1, 4, 6, 6) to 3 logits through Conv3d, Conv2d, Conv1d and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 4, (3, 3, 3), padding=(0, 1, 1))
        self.mix = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.GELU())
        self.proj = nn.Conv1d(6, 6, 3, padding=1)
        self.mlp = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.stem(x).flatten(1, 2)).flatten(2)
        return self.head(self.mlp(self.proj(x).transpose(1, 2)).mean(1))


# a batch for the toy
VOLUME = torch.randn(2, 1, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def make_toy() -> Toy:
    torch.manual_seed(0)
    return Toy().eval()


def perturb(model: nn.Module) -> nn.Module:
    """Gives every trainable parameter a value that a training might have left."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model
