"""LoRA-Pro: gradients of the factors that move the product as the full gradient would, as far as factors can."""

import torch
from torch import Tensor, nn

from vision_lowrank.adapters.injection import adapted_layers
from vision_lowrank.adapters.layers import LoRAAdapter
from vision_lowrank.adapters.slices import SlicedAdapter
from vision_lowrank.errors import AdapterError


@torch.no_grad()
def adjust_gradients(model: nn.Module, name: str | None = None) -> None:
    r"""Replaces the gradients of all LoRA factors by LoRA-Pro's; call it between `backward` and the optimiser's step.

    (Wang et al. 2024, arXiv 2407.18242; see `adjusted_gradients`.) It is linear in the gradients: with several backward
    passes a step, call it once after the last, and a loss scaler or a mean over processes may come before it. Layers
    without gradients are passed over, and so are adapters at strength 0 and adapters that are no plain LoRA. The
    paper's own Adam keeps moments in the size of the weight; here they are the optimiser's, of the factors. Adapters
    that differ from row to row have no one gradient of a weight and are not meant.

    Args:
        model: a model with LoRA adapters, convolutions included.
        name: the adapters to adjust; None adjusts all.

    Raises:
        AdapterError: there are no such adapters, or only one of the two factors has a gradient.
    """
    adapters = [
        (path, *found)
        for path, layer in adapted_layers(model, name).items()
        for other, adapter in layer.by_name.items()
        if name in (None, other)
        for found in _plain_loras(adapter)
    ]
    if not adapters:
        raise AdapterError("the model has no plain LoRA adapter to adjust: LoRA-Pro needs inject(..., LoRA(...))")
    for path, adapter, scaling in adapters:
        down, up = adapter.lora_A.weight, adapter.lora_B.weight
        if (down.grad is None and up.grad is None) or scaling == 0:
            continue
        if down.grad is None or up.grad is None:
            raise AdapterError(f"layer {path!r}: one of lora_A and lora_B has no gradient; LoRA-Pro trains both")
        new_down, new_up = adjusted_gradients(
            down.flatten(1), up.flatten(1), down.grad.flatten(1), up.grad.flatten(1), scaling
        )
        down.grad.copy_(new_down.view_as(down))
        up.grad.copy_(new_up.view_as(up))


def adjusted_gradients(
    down: Tensor, up: Tensor, down_grad: Tensor, up_grad: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    r"""Returns gradients of A and B whose first-order change of :math:`s B A` is nearest to the full gradient g.

    With :math:`g_A = s B^\top g` and :math:`g_B = s g A^\top`,

    .. math::
        \hat g_A = s^{-2} (B^\top B)^{-1} g_A + X A, \qquad
        \hat g_B = s^{-2} (I - P_B)\, g_B (A A^\top)^{-1} - B X,

    where :math:`P_B` projects onto the columns of B. For every X the change
    :math:`s B \hat g_A + s \hat g_B A = g - (I - P_B)\, g\, (I - P_A)` is the same. X makes
    :math:`\|\hat g_A - g_A\|^2 + \|\hat g_B - g_B\|^2` least: it solves
    :math:`B^\top B X + X A A^\top = -s^{-2} (B^\top B)^{-1} g_A A^\top`. Inverses are pseudo-inverses, so B = 0 before
    the first step gives :math:`\hat g_A = 0`.

    Args:
        down: A, (rank, in).
        up: B, (out, rank).
        down_grad: :math:`g_A`, (rank, in).
        up_grad: :math:`g_B`, (out, rank).
        scaling: s, not zero.

    Returns:
        :math:`\hat g_A` and :math:`\hat g_B`, at least in float32.
    """
    dtype = torch.promote_types(down.dtype, torch.float32)
    down, up, down_grad, up_grad = (tensor.to(dtype) for tensor in (down, up, down_grad, up_grad))
    up_axes, up_values = _gram_eigen(up)
    down_axes, down_values = _gram_eigen(down.T)
    up_inverse = (up_axes * _inverse(up_values)) @ up_axes.T
    down_inverse = (down_axes * _inverse(down_values)) @ down_axes.T
    new_down = up_inverse @ down_grad / scaling**2
    right_side = -new_down @ down.T
    # in the eigenvectors of both Gram matrices the Sylvester equation is one division an entry
    quotients = (up_axes.T @ right_side @ down_axes) * _inverse(up_values[:, None] + down_values)
    free = up_axes @ quotients @ down_axes.T
    outside = up_grad - up @ (up_inverse @ (up.T @ up_grad))
    return new_down + free @ down, outside @ down_inverse / scaling**2 - up @ free


def _plain_loras(adapter: nn.Module) -> list[tuple[LoRAAdapter, float]]:
    """Returns the plain LoRAs that an adapter is or, on parts of a layer, consists of, each with its whole scale."""
    parts = list(adapter.parts.values()) if isinstance(adapter, SlicedAdapter) else [adapter]
    outer = adapter.strength.item() if isinstance(adapter, SlicedAdapter) else 1.0
    # a subclass may cut or scale its factors in another way, so it is no plain LoRA
    return [(part, part.scaling * part.strength.item() * outer) for part in parts if type(part) is LoRAAdapter]


def _gram_eigen(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Returns eigenvectors (rank, rank), as columns, and eigenvalues (rank,) of FᵀF for a factor F (size, rank).

    Eigenvalues that rounding cannot tell from zero are zero.
    """
    size, rank = factor.shape
    # of F itself, since squaring first would lose half of the digits
    _, values, axes = torch.linalg.svd(torch.linalg.qr(factor, mode="r").R)
    values = torch.where(values > max(size, rank) * torch.finfo(values.dtype).eps * values[0], values, 0.0)
    return axes.T, torch.nn.functional.pad(values, (0, rank - len(values))).square()


def _inverse(values: Tensor) -> Tensor:
    """Returns 1 / value, and 0 for 0."""
    return torch.where(values > 0, 1.0 / values, 0.0)
