"""All methods by name, and their settings as plain values for files."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from vision_lowrank.adapters.dylora import DyLoRA
from vision_lowrank.adapters.flylora import FlyLoRA
from vision_lowrank.adapters.hydra import Hydra
from vision_lowrank.adapters.lora_xs import LoRAXS
from vision_lowrank.adapters.methods import GatedLoRA, LoRA, Method
from vision_lowrank.adapters.nola import NOLA
from vision_lowrank.adapters.slices import Sliced
from vision_lowrank.adapters.sora import SoRA
from vision_lowrank.errors import AdapterError

METHODS: Mapping[str, type[Method]] = {
    method.__name__: method for method in (LoRA, GatedLoRA, Hydra, NOLA, DyLoRA, SoRA, LoRAXS, FlyLoRA)
}


def describe(method: Method) -> dict[str, Any]:
    """Returns the settings as plain values, which `from_description` reads.

    The method's name is under `method`; where it adapts parts of a layer, `slice` says which.
    """
    if isinstance(method, Sliced):
        return {**describe(method.method), "slice": {"parts": method.parts, "order": method.order}}
    return {"method": type(method).__name__, **dataclasses.asdict(cast(Any, method))}


def from_description(description: Any) -> Method:
    """Rebuilds a method from what `describe` gave.

    Raises:
        AdapterError: no settings, or of an unknown method, or with a wrong one.
    """
    if not isinstance(description, dict):
        raise AdapterError(f"settings {description!r} of an adapter method: give a mapping, with method=its name")
    settings = dict(description)
    name, part = settings.pop("method", None), settings.pop("slice", None)
    if not isinstance(name, str) or name not in METHODS:
        raise AdapterError(f"unknown adapter method {name!r}: this version knows {', '.join(METHODS)}")
    try:
        method = METHODS[name](**settings)
        return method if part is None else Sliced(method, **part)
    except TypeError as error:
        raise AdapterError(f"settings {settings} do not belong to adapter method {name}: {error}") from error
