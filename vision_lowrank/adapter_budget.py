"""Adapters of a wanted number of parameters: the size of each method, a rank or what it has in its place."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vision_lowrank.adapters.methods import Method, blank
from vision_lowrank.adapters.slices import Sliced
from vision_lowrank.adapters.targets import Targets, check_layers, find_parts
from vision_lowrank.errors import AdapterError, ConfigError
from vision_lowrank.instantiate import instantiate
from vision_lowrank.tasks.adapter_training import Batches, PeftAdapter, count_trained, put_adapters

LARGEST = 4096


def count_adapter(
    model: nn.Module, method: Method | PeftAdapter, targets: Targets, batches: Callable[[], Batches]
) -> int:
    """Returns how many parameters a method would train on a model, which stays as it is.

    Raises:
        AdapterError: the method cannot be put there, such as at this rank.
    """
    if isinstance(method, PeftAdapter):
        return count_trained(put_adapters(copy.deepcopy(model), method, targets, (), batches)).adapter
    parts = find_parts(model, targets)
    total = 0
    for path, layer in check_layers(model, list(parts)).items():
        whole = Sliced(method, parts[path], path.rpartition(".")[2]) if parts[path] else method
        total += sum(parameter.numel() for parameter in blank(whole, layer).parameters())
    return total


def resize(settings: Mapping[str, Any], key: str, size: int) -> dict[str, Any]:
    """Returns the settings of a method in another size, all in proportion.

    With the rank grow the ranks of gates, the ranks that are active at a time (whole numbers, at least 1), and alpha,
    so that the scale of the update stays; alpha of rsLoRA with the root.

    Args:
        settings: of the method, as a configuration has them.
        key: what the size is: the rank, or the terms of NOLA.
        size: the new one.
    """
    changed = {**settings, key: size}
    if key == "rank":
        growth = size / settings["rank"]
        for name in {"gate_rank", "active"} & settings.keys():
            changed[name] = max(1, math.floor(settings[name] * growth + 0.5))
        if "alpha" in settings:
            changed["alpha"] = settings["alpha"] * (math.sqrt(growth) if settings.get("rslora") else growth)
    return changed


def size_for_budget(
    model: nn.Module,
    settings: Mapping[str, Any],
    key: str,
    targets: Targets,
    budget: int,
    tolerance: float,
    batches: Callable[[], Batches],
) -> tuple[dict[str, Any], int]:
    """Finds the size at which a method trains nearest to a number of parameters, the head not counted.

    Counts rise with the size, or, as of RandLoRA, fall; sizes that a method refuses are passed over.

    Args:
        model: without adapters.
        settings: of the method, with `_target_`.
        key: what the size is, see `resize`.
        targets: layers, see `adapters.inject`.
        budget: the wanted number.
        tolerance: largest deviation, a share of the budget.
        batches: as for `tasks.adapter_training.put_adapters`.

    Returns:
        The settings, and the number of parameters.

    Raises:
        ConfigError: no size is within the tolerance.
        AdapterError: the method cannot be put on the targets at all.
    """
    counts: dict[int, int] = {}
    refusals: list[AdapterError] = []

    def count(size: int) -> int | None:
        if size not in counts:
            try:
                method = instantiate(resize(settings, key, size))
                counts[size] = count_adapter(model, method, targets, batches)
            except AdapterError as error:
                refusals.append(error)
        return counts.get(size)

    def between(first: int, second: int) -> bool:
        return (counts[first] - budget) * (counts[second] - budget) <= 0

    # powers of two until two neighbours have the budget between them, then ever nearer ones; 0 is none
    low = high = 0
    for size in (1 << power for power in range(LARGEST.bit_length())):
        if count(size) is None:
            continue
        if low and between(low, size):
            high = size
            break
        low = size
    if not low:
        raise refusals[0]
    while True:
        inside = sorted(range(low + 1, high), key=lambda size: abs(2 * size - low - high))
        middle = next((size for size in inside if count(size) is not None), 0)
        if not middle:
            break
        low, high = (low, middle) if between(low, middle) else (middle, high)
    best = min(counts, key=lambda size: (abs(counts[size] - budget), size))
    if abs(counts[best] - budget) > tolerance * budget:
        name = settings.get("name", settings["_target_"].rpartition(".")[2])
        raise ConfigError(
            f"comparison.budget={budget}: the nearest of {name} is {counts[best]} with {key} {best}, further off than "
            f"{100 * tolerance:g} %; give another budget or tolerance, or leave the method out"
        )
    return resize(settings, key, best), counts[best]
