"""Translation between our adapters and the files of peft: names of tensors and `adapter_config.json`.

adapter_config.json         peft_type LORA where peft computes the same, else OWN_TYPE with a list of layers
adapter_model.safetensors   base_model.model.<layer>.lora_A.weight    (rank, in / groups, *kernel)
                            base_model.model.<layer>.lora_B.weight    (out, rank, 1, ...)
                            base_model.model.<module>.<tensor>        modules trained beside the adapter
                            of the other methods, the names of their tensors; parts.q.<tensor> of parts of a layer
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from vision_lowrank import __version__
from vision_lowrank.adapters.layers import BaseLayer
from vision_lowrank.adapters.methods import LoRA, Method
from vision_lowrank.adapters.registry import describe, from_description
from vision_lowrank.errors import AdapterError

PREFIX = "base_model.model."
OWN_TYPE = "VISION_LOWRANK"

# settings of peft's LoraConfig that change what is computed, with the values that mean plain LoRA
_PLAIN = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_dora": (False,),
    "use_qalora": (False,),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}

# initialisations after which peft's base weight is not the weight the file was trained on top of
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def to_config(
    methods: Mapping[str, Method],
    layers: Mapping[str, BaseLayer],
    heads: Sequence[str],
    all_paths: Iterable[str],
    found_by_peft: bool,
) -> dict[str, Any]:
    """Describes adapters as the content of `adapter_config.json`.

    Args:
        methods: settings by layer path.
        layers: base layers by the same paths.
        heads: paths of modules saved beside the adapters.
        all_paths: paths of every module in the model, to see which names would be ambiguous.
        found_by_peft: whether peft takes exactly `heads` for the modules to save, see `targets.named_like`.
    """
    loras = {path: method for path, method in methods.items() if isinstance(method, LoRA)}
    common = {"modules_to_save": list(heads) or None, "base_model_name_or_path": None, "inference_mode": True}
    if len(loras) < len(methods) or not found_by_peft or not all(same_in_peft(layer) for layer in layers.values()):
        description = {path: describe(method) for path, method in methods.items()}
        return {"peft_type": OWN_TYPE, "vision_lowrank": __version__, "layers": description, **common}

    rslora = all(method.rslora for method in loras.values())
    # peft has one rslora flag a file: where layers differ, alpha takes up the difference
    alphas = {
        path: method.alpha if method.rslora == rslora else method.scaling * method.rank
        for path, method in loras.items()
    }
    rank = _most_common(method.rank for method in loras.values())
    alpha = _most_common(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": _most_common(method.dropout for method in loras.values()),
        "rank_pattern": {f"^{re.escape(path)}": method.rank for path, method in loras.items() if method.rank != rank},
        "alpha_pattern": {f"^{re.escape(path)}": value for path, value in alphas.items() if value != alpha},
        "target_modules": _target_modules(list(loras), all_paths),
        "use_rslora": rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        **common,
    }


def lora_from_config(config: Mapping[str, Any], path: str, source: str) -> LoRA:
    """Returns the settings that a LORA configuration gives to a layer.

    Raises:
        AdapterError: `config` lacks a key, holds a value of another kind, or asks for more than plain LoRA.
    """
    patterns = {key: config.get(key) for key in ("rank_pattern", "alpha_pattern")}
    for key, value in patterns.items():
        if not (value is None or isinstance(value, dict)):
            raise AdapterError(f"{source}: {key}={value!r} is no mapping of patterns; save the adapter with peft again")
    for key, allowed in _PLAIN.items():
        if key in config and config[key] not in allowed:
            raise AdapterError(
                f"{source}: {key}={config[key]!r} is not plain LoRA; load it with peft, or merge it there"
            )
    if any(word in str(config.get("init_lora_weights", "")).lower() for word in _REWRITES_BASE):
        raise AdapterError(
            f"{source}: init_lora_weights={config['init_lora_weights']!r} changed the base weights; save it from peft "
            "with path_initial_model_for_weight_conversion, or merge it there"
        )
    try:
        rank, alpha = config["r"], config["lora_alpha"]
    except KeyError as error:
        raise AdapterError(
            f"{source}: key {error} is missing; save the adapter with peft or save_adapter again"
        ) from None
    try:
        rank = _by_pattern(patterns["rank_pattern"], path, rank)
        alpha = _by_pattern(patterns["alpha_pattern"], path, alpha)
    except re.error as error:
        raise AdapterError(
            f"{source}: pattern {error.pattern!r} of rank_pattern or alpha_pattern is none ({error}); save the adapter "
            "with peft again"
        ) from None
    return LoRA(rank, alpha, config.get("lora_dropout", 0.0), config.get("use_rslora", False))


def methods_from_config(config: Mapping[str, Any], keys: Iterable[str], source: str) -> dict[str, Method]:
    """Returns the settings of every adapted layer of a file, by layer path.

    Args:
        config: content of `adapter_config.json`.
        keys: names of the tensors beside it, without `PREFIX`.
        source: the configuration's file name for messages.

    Raises:
        AdapterError: the configuration is of another method, incomplete, or holds a value of another kind.
    """
    kind = config.get("peft_type")
    if kind == OWN_TYPE:
        layers = config.get("layers", {})
        if not isinstance(layers, dict):
            raise AdapterError(f"{source}: layers={layers!r} is no mapping of layers; save the adapter again")
        return {path: from_description(description) for path, description in layers.items()}
    if kind != "LORA":
        raise AdapterError(f"{source}: peft_type={kind!r}; this reads LORA and {OWN_TYPE}: load others with peft")
    paths = dict.fromkeys(key.removesuffix(".lora_A.weight") for key in keys if key.endswith(".lora_A.weight"))
    return {path: lora_from_config(config, path, source) for path in paths}


def check_layers_of_peft(config: Mapping[str, Any], layers: Mapping[str, BaseLayer], source: str) -> None:
    """Refuses a file of peft for layers on which peft computes something else than we do.

    Raises:
        AdapterError: a convolution with groups, dilation or a padding mode.
    """
    for path, layer in layers.items():
        if config["peft_type"] == "LORA" and not same_in_peft(layer):
            raise AdapterError(
                f"{source}: layer {path!r} is {layer}; peft's LoRA ignores groups, dilation and padding mode in its "
                "first factor, so the file means something else there: use it with peft"
            )


def same_in_peft(layer: BaseLayer) -> bool:
    """Whether peft computes our LoRA on this layer: its A ignores groups, dilation and the padding mode."""
    if isinstance(layer, nn.Linear):
        return True
    return layer.groups == 1 and layer.padding_mode == "zeros" and set(layer.dilation) == {1}


def _target_modules(paths: list[str], all_paths: Iterable[str]) -> list[str] | str:
    """Returns full paths, which peft takes as suffixes, or a regular expression where a suffix would match more."""
    chosen = set(paths)
    if any(path.endswith(f".{target}") for path in all_paths if path not in chosen for target in paths):
        return "|".join(re.escape(path) for path in paths)
    return paths


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """Looks a layer up as peft does: the first pattern that matches the end of its path."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
