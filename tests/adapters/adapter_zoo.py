"""Small models with every kind of layer that takes adapters."""

from collections.abc import Callable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vision_lowrank.adapters import inject

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


# a batch for the ViT
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def make_vit(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3).eval()
    nn.init.normal_(model.head.weight, std=0.2)
    return model


def adapted_layer(kind: str, method: object) -> tuple[nn.Module, Tensor]:
    """Returns a model of one adapted layer, in double precision, and an input."""
    make, shape = LAYERS[kind]
    torch.manual_seed(3)
    model = nn.Sequential(make()).double().eval()
    inject(model, "0", method)
    return model, torch.randn(shape, dtype=torch.float64)


def train_steps(model: nn.Module, x: Tensor, labels: list[int], learning_rate: float, steps: int) -> list[float]:
    """Trains what can be trained on one batch; returns the loss before each step."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), torch.tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def perturb(model: nn.Module) -> nn.Module:
    """Gives every trainable parameter a value that a training might have left."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model
