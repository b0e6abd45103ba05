"""Applying a trained model to every pixel of a scene."""

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def autocast(device: str, precision: str) -> torch.autocast:
    """Returns the context in which a model computes as in training with Lightning's precision string."""
    dtype = AUTOCAST.get(precision)
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not None)


def predict_probabilities(
    model: nn.Module, loader: DataLoader[dict[str, Tensor]], precision: str, device: str
) -> Tensor:
    """Runs a model over a loader's samples in their order.

    Args:
        model: maps a batch of the loader to logits (batch, classes, ...); left in evaluation mode on `device`.
        loader: batches.
        precision: Lightning's precision string; "…-mixed" means autocast.
        device: where to compute.

    Returns:
        float32 (samples, classes, ...) on the CPU.
    """
    model.eval().to(device)
    parts = []
    with torch.inference_mode(), autocast(device, precision):
        for batch in track(loader, "classifying pixels", transient=True):
            moved = {name: value.to(device) for name, value in batch.items()}
            parts.append(model(moved).float().softmax(dim=1).cpu())
    return torch.cat(parts)
