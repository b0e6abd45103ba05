"""Low-rank adapters for any torch module: inject, count, scale, schedule, merge, save and load in peft's layout."""

from vision_lowrank.adapters.control import (
    ParameterCount,
    adapter_parameters,
    count_parameters,
    disabled,
    full_strength,
    merge,
    rows,
    set_strength,
    unmerge,
)
from vision_lowrank.adapters.dylora import DyLoRA
from vision_lowrank.adapters.files import export_lora, load_adapter, save_adapter
from vision_lowrank.adapters.flylora import FlyLoRA
from vision_lowrank.adapters.hydra import Hydra
from vision_lowrank.adapters.injection import freeze_except, freeze_statistics, inject, merge_and_remove, remove
from vision_lowrank.adapters.layers import AdaptedLayer, folded_weight
from vision_lowrank.adapters.lora_xs import LoRAXS, lora_sb_gradients
from vision_lowrank.adapters.methods import GatedLoRA, LoRA
from vision_lowrank.adapters.nola import NOLA
from vision_lowrank.adapters.registry import METHODS
from vision_lowrank.adapters.schedule import CyclicalStrength
from vision_lowrank.adapters.sora import SoRA

__all__ = [
    "METHODS",
    "NOLA",
    "AdaptedLayer",
    "CyclicalStrength",
    "DyLoRA",
    "FlyLoRA",
    "GatedLoRA",
    "Hydra",
    "LoRA",
    "LoRAXS",
    "ParameterCount",
    "SoRA",
    "adapter_parameters",
    "count_parameters",
    "disabled",
    "export_lora",
    "folded_weight",
    "freeze_except",
    "freeze_statistics",
    "full_strength",
    "inject",
    "load_adapter",
    "lora_sb_gradients",
    "merge",
    "merge_and_remove",
    "remove",
    "rows",
    "save_adapter",
    "set_strength",
    "unmerge",
]
