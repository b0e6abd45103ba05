"""What one does with adapters that are in a model: move their strength, switch them off, merge, count."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vision_lowrank.adapters.injection import adapted_layers, check_mergeable, trained_modules
from vision_lowrank.adapters.layers import AdaptedLayer, RowStrengths
from vision_lowrank.adapters.targets import walk
from vision_lowrank.errors import AdapterError


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters by kind.

    Attributes:
        base: neither adapter nor head.
        adapter: in adapters.
        head: in the modules trained beside adapters.
        trainable: with a gradient, of any kind.
    """

    base: int
    adapter: int
    head: int
    trainable: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.base + self.adapter + self.head


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts the parameters of any model, each tensor once, merged or not."""
    adapters = set(_adapter_parameters(model, None))
    head = {parameter for path in trained_modules(model) for parameter in model.get_submodule(path).parameters()}
    sizes = {parameter: parameter.numel() for parameter in model.parameters()}
    return ParameterCount(
        base=sum(size for parameter, size in sizes.items() if parameter not in adapters and parameter not in head),
        adapter=sum(sizes[parameter] for parameter in adapters),
        head=sum(sizes[parameter] for parameter in head),
        trainable=sum(size for parameter, size in sizes.items() if parameter.requires_grad),
    )


def adapter_parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """Returns the parameters of the adapters, all or those of one name; the head's are not among them.

    Raises:
        AdapterError: there are none.
    """
    adapted_layers(model, name)
    return _adapter_parameters(model, name)


def set_strength(model: nn.Module, value: float, name: str | None = None) -> None:
    """Sets the factor on the whole contribution of adapters; 0 gives the base's output, 1 is the full adapter.

    Args:
        model: a model with adapters.
        value: the factor.
        name: the adapters to set; None sets all.

    Raises:
        AdapterError: there are no such adapters, they are merged at another strength, or the factor is no finite number
            in their precision; nothing is changed then.
    """
    strengths = _strengths(model, name)
    for path, strength in strengths:
        # written so that NaN fails too
        if not abs(value) <= torch.finfo(strength.dtype).max:
            raise AdapterError(f"strength={value!r}: give a finite number that {strength.dtype} of {path!r} holds")
        if model.get_submodule(path).merged and bool(strength != value):
            raise AdapterError(f"layer {path!r} is merged at strength {strength.item():g}: unmerge(model) to change it")
    for _, strength in strengths:
        strength.fill_(value)


@contextmanager
def full_strength(model: nn.Module) -> Iterator[None]:
    """Sets all strengths to 1 inside the block, for evaluation and export, and puts them back after it.

    Raises:
        AdapterError: there are no adapters, or they are merged at another strength.
    """
    before = [(strength, strength.clone()) for _, strength in _strengths(model, None)]
    set_strength(model, 1.0)
    try:
        yield
    finally:
        for strength, value in before:
            strength.copy_(value)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Lets the model compute as its base inside the block.

    Where activations are checkpointed, `backward` computes them anew and belongs in the block too.

    Raises:
        AdapterError: there are no adapters, or they are merged.
    """
    layers = adapted_layers(model)
    for path, layer in layers.items():
        if layer.merged:
            raise AdapterError(
                f"layer {path!r} is merged, so its adapters cannot be disabled: call unmerge(model) first"
            )
    before = {path: layer.active for path, layer in layers.items()}
    for layer in layers.values():
        layer.active = False
    try:
        yield
    finally:
        for path, layer in layers.items():
            layer.active = before[path]


@contextmanager
def rows(model: nn.Module, weights: Tensor | Mapping[str, Tensor], windows: bool = False) -> Iterator[None]:
    """Gives each sample of a batch its own mix of adapters inside the block.

    The contribution of an adapter to a sample is multiplied by the sample's weight for it, on top of the adapter's
    strength: with strengths of 1, sample i is what a batch of it alone gives after `set_strength(model, w, name)` for
    each of its weights w. Gradients reach the weights. Normalisations that mix samples while training mix these too.
    Where activations are checkpointed, `backward` computes them anew and belongs in the block too.

    Args:
        model: a model with adapters, in training or evaluation.
        weights: (batch, adapters), the adapters in the order in which the model's layers first have them; or (batch,)
            for each name, where adapters that are not named keep the same strength for all samples.
        windows: layers may see several windows of each sample on their first axis, one sample after the other, as
            window attention does. Without it, such layers are an error.

    Raises:
        AdapterError: there are no such adapters, they are merged, or the weights have another shape.
    """
    layers = adapted_layers(model)
    names = list(dict.fromkeys(name for layer in layers.values() for name in layer.adapters))
    if isinstance(weights, Tensor):
        if weights.ndim != 2 or weights.shape[1] != len(names):
            raise AdapterError(
                f"rows: weights of shape {tuple(weights.shape)}, but the model has the adapters {', '.join(names)}: "
                f"give (batch, {len(names)})"
            )
        weights = dict(zip(names, weights.unbind(1), strict=True))
    for name, values in weights.items():
        adapted_layers(model, name)
        if values.ndim != 1 or len(values) == 0:
            raise AdapterError(f"rows: weights of {name!r} have the shape {tuple(values.shape)}: give (batch,)")
    if len(lengths := {len(values) for values in weights.values()}) != 1:
        raise AdapterError(f"rows: weights for batches of {sorted(lengths)} samples: give one for each sample, to each")
    for path, layer in layers.items():
        if layer.merged:
            raise AdapterError(f"layer {path!r} is merged, one weight for all rows: call unmerge(model) first")
    before = {path: layer.row_strengths for path, layer in layers.items()}
    for layer in layers.values():
        layer.row_strengths = RowStrengths(weights, windows)
    try:
        yield
    finally:
        for path, layer in layers.items():
            layer.row_strengths = before[path]


def merge(model: nn.Module) -> None:
    """Folds all adapters at their present strength into the base weights, for faster inference.

    The sum is computed at least in float32 and rounded once to the weight's precision. Merging twice is merging once.

    Raises:
        AdapterError: there are no adapters, one of them cannot be merged, they are disabled, or rows have strengths of
            their own; nothing is changed then.
    """
    layers = adapted_layers(model)
    check_mergeable(layers)
    for layer in layers.values():
        layer.unmerge()
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Puts weights and biases of the base back as they were, the very bits.

    Raises:
        AdapterError: there are no adapters.
    """
    for layer in adapted_layers(model).values():
        layer.unmerge()


def _strengths(model: nn.Module, name: str | None) -> list[tuple[str, Tensor]]:
    """Returns layer path and strength of every adapter of that name."""
    return [
        (path, adapter.strength)
        for path, layer in adapted_layers(model, name).items()
        for other, adapter in layer.by_name.items()
        if name in (None, other)
    ]


def _adapter_parameters(model: nn.Module, name: str | None) -> list[nn.Parameter]:
    layers = [module for _, module in walk(model) if isinstance(module, AdaptedLayer)]
    return [
        parameter
        for layer in layers
        for other, adapter in layer.by_name.items()
        if name in (None, other)
        for parameter in adapter.parameters()
    ]
