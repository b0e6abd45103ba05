"""LoRA+: a higher learning rate for the factor that starts at zero."""

from typing import Any

from torch import nn

from vision_lowrank.adapters.injection import adapted_layers
from vision_lowrank.errors import AdapterError


def lora_plus_groups(
    model: nn.Module, learning_rate: float, ratio: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    r"""Returns parameter groups in which every B learns `ratio` times as fast as everything else that is trained.

    LoRA+ (Hayou et al. 2024, arXiv 2402.12354): with one rate for both factors, wide layers hardly learn features; the
    paper advises a ratio of about 16 and a smaller rate for A than plain LoRA has. A schedule that multiplies the
    groups' rates keeps the ratio. Parameters with one axis, such as a head's bias, are not decayed.

    Args:
        model: a model with LoRA or gated LoRA adapters.
        learning_rate: of A, and of modules trained beside the adapters.
        ratio: rate of B by that of A, at least 1.
        weight_decay: of all parameters with more than one axis.

    Returns:
        Groups for any optimiser of torch; those without parameters are left out.

    Raises:
        AdapterError: the ratio is below 1, or no adapter has a trainable factor `lora_B`.
    """
    if not ratio >= 1.0:
        raise AdapterError(f"LoRA+ ratio={ratio}: give at least 1, where 1 is plain LoRA; the paper advises 16")
    fast = {
        parameter
        for layer in adapted_layers(model).values()
        for key, parameter in layer.adapters.named_parameters()
        if key.endswith("lora_B.weight") and parameter.requires_grad
    }
    if not fast:
        raise AdapterError("no adapter has a trainable factor lora_B: LoRA+ is for LoRA; give others one rate")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    slow = [parameter for parameter in trained if parameter not in fast]
    groups = [
        ([parameter for parameter in slow if parameter.ndim > 1], learning_rate, weight_decay),
        ([parameter for parameter in slow if parameter.ndim <= 1], learning_rate, 0.0),
        ([parameter for parameter in trained if parameter in fast], learning_rate * ratio, weight_decay),
    ]
    return [{"params": params, "lr": rate, "weight_decay": decay} for params, rate, decay in groups if params]
