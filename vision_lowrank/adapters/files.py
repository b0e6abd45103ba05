"""Adapters on disk, in peft's layout (see `peft_layout`): as they are, to go on with, or as ordinary LoRAs."""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vision_lowrank import __version__
from vision_lowrank.adapters.injection import adapted_layers, attach, trained_modules
from vision_lowrank.adapters.layers import AdaptedLayer, Adapter, BaseLayer, unrounded
from vision_lowrank.adapters.methods import LoRA, Method, blank
from vision_lowrank.adapters.peft_layout import (
    OWN_TYPE,
    PREFIX,
    check_layers_of_peft,
    methods_from_config,
    same_in_peft,
    to_config,
)
from vision_lowrank.adapters.targets import check_layers, named_like, walk
from vision_lowrank.errors import AdapterError
from vision_lowrank.runs import atomic_path, write_json

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def save_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Writes one adapter and the modules trained beside it; LoRA files are read by peft as they are.

    But not where peft computes something else on a layer (see `export_lora`), or the name of a trained module is the
    end of another's, which peft would take for it: those files say that they are for `load_adapter`.
    The strength is not written: a loaded adapter has strength 1, as at evaluation. Other methods are written with all
    they hold, for `load_adapter`; `export_lora` writes what peft reads.

    Args:
        model: a model with adapters.
        folder: where to write `adapter_model.safetensors` and `adapter_config.json`; made if absent.
        name: the adapter to write. The name itself is not in the file.

    Raises:
        AdapterError: no such adapter, or the adapters are merged.
    """
    model = _plain(model)
    layers = _unmerged_layers(model, name)
    methods = {path: layer.methods[name] for path, layer in layers.items()}
    _write(model, folder, name, methods, {path: _stored(layer.by_name[name]) for path, layer in layers.items()})


@torch.no_grad()
def export_lora(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Writes one adapter as an ordinary LoRA that peft reads, whatever method found it, and its trained modules.

    For methods whose contribution is a product of two factors, such as LoRA-XS, and for adapters of parts of a layer,
    whose ranks add up. What is loaded again is that LoRA, at strength 1, and no longer the method.

    Args:
        model: a model with adapters.
        folder: as for `save_adapter`.
        name: the adapter to write.

    Raises:
        AdapterError: no such adapter, the adapters are merged, a method is no product of two factors, peft computes
            something else on a layer (a convolution with groups, dilation or a padding mode), or would take another
            module for a trained one.
    """
    model = _plain(model)
    layers = _unmerged_layers(model, name)
    if pair := named_like(model, trained_modules(model, name)):
        raise AdapterError(
            f"peft, which compares ends of names, would take {pair[1]!r} for {pair[0]!r}: use save_adapter"
        )
    methods: dict[str, Method] = {}
    tensors = {}
    for path, layer in layers.items():
        with unrounded(layer.base.weight):
            factors = layer.by_name[name].lora_factors()
        if factors is None:
            raise AdapterError(
                f"adapter {name!r} on layer {path!r} is a {layer.methods[name]}, which is no LoRA: write it with "
                "save_adapter, or turn it into a LoRA first where its method can"
            )
        if not same_in_peft(layer.base):
            raise AdapterError(f"peft's LoRA computes something else on layer {path!r}, {layer.base}: use save_adapter")
        down, up, scaling = factors
        methods[path] = LoRA(len(down), scaling * len(down))
        tensors[path] = {"lora_A.weight": down, "lora_B.weight": up}
    _write(model, folder, name, methods, tensors)


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> list[str]:
    """Injects the adapter of a folder written by `save_adapter` or, for LoRA, by peft, with its trained modules.

    Everything is checked before the model is touched. Base frozen, adapters and trained modules with gradients, as
    after `inject`.

    Args:
        model: the model the adapter was trained on, without an adapter of that name.
        folder: holds `adapter_model.safetensors` and `adapter_config.json`.
        name: name to give the adapter.

    Returns:
        The paths of the adapted layers.

    Raises:
        AdapterError: a file is missing or damaged, asks for a method unknown here, or does not belong to this model;
            the name is taken; or a module that another adapter trained beside it would be overwritten.
    """
    model, folder = _plain(model), Path(folder)
    config = _read_config(folder / CONFIG)
    tensors = _read_tensors(folder / WEIGHTS)
    source = str(folder / WEIGHTS)
    with _naming(folder / CONFIG):
        methods = methods_from_config(config, tensors, str(folder / CONFIG))
    if not methods:
        raise AdapterError(f"{source}: holds no adapted layer; save the adapter again")
    paths = {path for path, _ in walk(model)}
    if missing := [path for path in methods if path not in paths]:
        raise AdapterError(
            f"{source}: key {PREFIX}{missing[0]}.lora_A.weight is for a layer that this {type(model).__name__} "
            "does not have: load it into the model it was trained on"
        )
    layers = check_layers(model, list(methods))
    check_layers_of_peft(config, layers, source)
    expected = {
        f"{path}.{key}": tensor
        for path, method in methods.items()
        for key, tensor in _without_memory(method, path, layers[path], source).items()
    }
    heads = _find_heads(model, _names_of_heads(config, source), [key for key in tensors if key not in expected])
    for path in heads:
        expected.update({f"{path}.{key}": tensor for key, tensor in model.get_submodule(path).state_dict().items()})
    _check_tensors(tensors, expected, source)
    for path in set(heads).intersection(trained_modules(model)):
        state = model.get_submodule(path).state_dict()
        if not all(torch.equal(tensor.cpu(), tensors[f"{path}.{key}"]) for key, tensor in state.items()):
            raise AdapterError(
                f"{source}: holds other values of module {path!r} than the adapter that is there, and the model has "
                "one such module: remove(model) first, or load each adapter into a model of its own"
            )

    built = {path: blank(method, layers[path]) for path, method in methods.items()}
    for path, adapter in built.items():
        # not a copy of each tensor: an adapter may check what it loads
        adapter.load_state_dict({key: tensors[f"{path}.{key}"] for key in _stored(adapter)}, strict=False)
    attach(model, methods, name, heads, built)
    with torch.no_grad():
        for path in heads:
            for key, target in model.get_submodule(path).state_dict().items():
                target.copy_(tensors[f"{path}.{key}"])
    return list(methods)


def _plain(model: nn.Module) -> nn.Module:
    """Returns the model that `torch.compile` wrapped, whose names are those of the file, or the model itself."""
    return getattr(model, "_orig_mod", model)


def _unmerged_layers(model: nn.Module, name: str) -> dict[str, AdaptedLayer]:
    layers = adapted_layers(model, name)
    if any(layer.merged for layer in layers.values()):
        raise AdapterError("the adapters are merged: call unmerge(model) before saving them")
    return layers


def _without_memory(method: Method, path: str, layer: BaseLayer, source: str) -> dict[str, Tensor]:
    """Returns the tensors that a method has in a file, on the meta device: a file may ask for any size."""
    stand_in = copy.copy(layer)
    stand_in._parameters = {
        key: None if weight is None else nn.Parameter(weight.detach().to("meta"))
        for key, weight in layer._parameters.items()
    }
    try:
        with _naming(source):
            return _stored(blank(method, stand_in))
    except (RuntimeError, OverflowError, TypeError) as error:  # how torch tells that a size is none
        reason = str(error).partition("\n")[0]
        raise AdapterError(f"{source}: no tensor can be as large as {method} asks for {path!r} ({reason})") from None


@contextmanager
def _naming(source: str | Path) -> Iterator[None]:
    """Puts the file's name in front of what settings are told that do not know where they come from."""
    try:
        yield
    except AdapterError as error:
        raise error if str(error).startswith(str(source)) else AdapterError(f"{source}: {error}") from None


def _names_of_heads(config: Mapping[str, Any], source: str) -> list[str]:
    names = config.get("modules_to_save") or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise AdapterError(
            f"{source}: modules_to_save={names!r} in {CONFIG} is no list of names; save the adapter again"
        )
    return names


def _stored(adapter: Adapter) -> dict[str, Tensor]:
    """Returns what of an adapter goes into a file: all but its strength and that of adapters inside."""
    return {key: tensor for key, tensor in adapter.state_dict().items() if key.rpartition(".")[2] != "strength"}


def _write(
    model: nn.Module,
    folder: str | Path,
    name: str,
    methods: Mapping[str, Method],
    adapters: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Writes the tensors of adapters by layer path, and the modules trained beside them."""
    heads = trained_modules(model, name)
    tensors = {f"{path}.{key}": tensor for path, stored in adapters.items() for key, tensor in stored.items()}
    for path in heads:
        tensors.update({f"{path}.{key}": tensor for key, tensor in model.get_submodule(path).state_dict().items()})
    bases = {path: layer.base for path, layer in adapted_layers(model, name).items()}
    config = to_config(methods, bases, heads, [path for path, _ in walk(model)], named_like(model, heads) is None)
    metadata = {"format": "pt"}
    if config["peft_type"] == OWN_TYPE:
        kinds = sorted({layer["method"] for layer in config["layers"].values()})
        metadata |= {"vision_lowrank": __version__, "method": "+".join(kinds)}
    with atomic_path(Path(folder) / WEIGHTS) as temporary:
        # a copy of each, since safetensors refuses tensors that share memory
        save_file(
            {PREFIX + key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()},
            temporary,
            metadata,
        )
    write_json(Path(folder) / CONFIG, config)


def _find_heads(model: nn.Module, names: list[str], keys: list[str]) -> list[str]:
    """Returns the paths of the modules that `modules_to_save` names, by their ends as in peft, and the file holds."""
    matches = [path for path, _ in walk(model) if path.endswith(tuple(names))]
    return [path for path in matches if any(key.startswith(f"{path}.") for key in keys)]


def _check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    for key, tensor in tensors.items():
        if key not in expected:
            raise AdapterError(
                f"{source}: key {PREFIX}{key} is neither part of an adapter known here nor of a module in "
                "modules_to_save that this model has: load it with peft, or into the model it was trained on"
            )
        if tensor.shape != expected[key].shape:
            raise AdapterError(
                f"{source}: key {PREFIX}{key} has shape {tuple(tensor.shape)}, the model and {CONFIG} ask for "
                f"{tuple(expected[key].shape)}: use the model it was trained on, with as many classes"
            )
        if tensor.is_floating_point() != expected[key].is_floating_point():
            raise AdapterError(
                f"{source}: key {PREFIX}{key} holds {tensor.dtype}, the model {expected[key].dtype}; save it again"
            )
        # infinities may be meant, in the mask of a module that is trained as a whole
        if tensor.float().isnan().any():
            raise AdapterError(f"{source}: key {PREFIX}{key} holds NaN: its training went astray, train it again")
    if missing := [key for key in expected if key not in tensors]:
        raise AdapterError(f"{source}: key {PREFIX}{missing[0]} is missing; the file is incomplete, save it again")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path} does not exist: give the folder that save_adapter or peft wrote") from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON ({error}): save or copy the adapter again") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path} holds a {type(config).__name__}, not settings: save or copy the adapter again")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file, which cannot hold code, and takes peft's prefix off the keys."""
    if not path.is_file():
        raise AdapterError(
            f"{path} does not exist; pickled adapters (.bin) are not read: let peft save it as safetensors"
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  safe_open is no dict
    except SafetensorError as error:
        raise AdapterError(f"{path} is damaged ({error}): save or copy the adapter again") from None
    for key in tensors:
        if not key.startswith(PREFIX):
            raise AdapterError(f"{path}: key {key!r} does not start with {PREFIX!r}; save the adapter with peft again")
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
