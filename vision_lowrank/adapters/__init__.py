"""Low-rank adapters for any torch module: inject, count, scale, schedule, merge, save and load in peft's layout."""

from vision_lowrank.adapters.control import (
    ParameterCount,
    adapter_parameters,
    count_parameters,
    disabled,
    full_strength,
    merge,
    set_strength,
    unmerge,
)
from vision_lowrank.adapters.files import load_adapter, save_adapter
from vision_lowrank.adapters.injection import freeze_except, freeze_statistics, inject, merge_and_remove, remove
from vision_lowrank.adapters.layers import AdaptedLayer, folded_weight
from vision_lowrank.adapters.methods import GatedLoRA, LoRA
from vision_lowrank.adapters.schedule import CyclicalStrength

__all__ = [
    "AdaptedLayer",
    "CyclicalStrength",
    "GatedLoRA",
    "LoRA",
    "ParameterCount",
    "adapter_parameters",
    "count_parameters",
    "disabled",
    "folded_weight",
    "freeze_except",
    "freeze_statistics",
    "full_strength",
    "inject",
    "load_adapter",
    "merge",
    "merge_and_remove",
    "remove",
    "save_adapter",
    "set_strength",
    "unmerge",
]
