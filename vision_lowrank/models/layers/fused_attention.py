"""PyTorch's fused attention, in the number format in which its gradient is fast."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# numbers in the queries of one head, up to which float32 is the faster on processors with bf16 products
LONGEST = 2**15


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **options: Any
) -> Tensor:
    """Does what `F.scaled_dot_product_attention` does, from which the names are.

    On processors the gradient of PyTorch 2.14's kernel takes up to seven times as long in bfloat16 as in float32
    (docs/speed.md): there what needs a gradient is computed in float32, unless queries are many and heads wide, and
    returned in the format it would have had.
    """
    # autocast leaves float64 as it is
    cast = torch.is_autocast_enabled("cpu") and query.dtype != torch.float64
    wanted = torch.get_autocast_dtype("cpu") if cast else query.dtype
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    few = query.shape[-2] * query.shape[-1] <= LONGEST
    if query.device.type != "cpu" or wanted != torch.bfloat16 or not (differentiated and few):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **options)
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    with torch.autocast("cpu", enabled=False):
        y = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask, dropout_p, **options)
    return y.to(wanted)


class FusedAttention(TorchFunctionMode):
    """Within it, models that call PyTorch's fused attention, those of timm, diffusers and transformers, call ours."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Passes each call of a function of torch on, attention to `fused_attention`."""
        return (fused_attention if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))
