"""Objects from configuration, in Hydra's notation, but only those on a short list.

A configuration names a class or function by `_target_` and its arguments by keyword:

    {"_target_": "torch.optim.AdamW", "lr": 0.001, "_partial_": True}

Hydra's own `instantiate` calls whatever can be imported, so a configuration file is a program. Here the name must lie
in `ALLOWED`, and so must the module that *defines* the object found under it: a name that reaches another library
through an import of ours is refused. The whole tree is checked before the first call.
"""

import difflib
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vision_lowrank.argument_types import wrong_argument
from vision_lowrank.errors import ConfigError

ALLOWED = (
    "vision_lowrank",
    "torch.optim",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.Trainer",
    "lightning.pytorch.trainer.trainer.Trainer",
    "timm.scheduler",
)


def instantiate(config: DictConfig | Mapping[str, Any], **extra: Any) -> Any:
    """Builds what `config` describes, inner `_target_`s first; mappings and lists without one stay what they are.

    Args:
        config: plain mapping or OmegaConf node. `_partial_: true` beside a `_target_` gives a `functools.partial`.
        **extra: arguments for the outermost target that no file can hold (parameters, a scheduler's optimizer).

    Returns:
        The object; arguments reach it as plain numbers, strings, lists and dicts, never as configuration nodes.

    Raises:
        ConfigError: a target outside the list or not found, an unknown or missing argument, an unresolved value.
    """
    if isinstance(config, DictConfig):
        try:
            plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"configuration key {error.full_key!r}: {str(error).splitlines()[0]}") from error
    else:
        plain = config
    _check(plain, "", extra)
    return _build(plain, extra)


def resolve(target: str) -> Callable[..., Any]:
    """Returns the class or function that the dotted name `target` means.

    Raises:
        ConfigError: the name or the object behind it is not on the list, or there is no such object.
    """
    refused = ConfigError(f"_target_ {target!r} is refused: allowed are classes and functions of {', '.join(ALLOWED)}")
    if not isinstance(target, str) or not re.fullmatch(r"[a-zA-Z]\w*(\.[a-zA-Z]\w*)+", target) or not _allowed(target):
        raise refused
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"_target_ {target!r}: there is no module {error.name!r}") from error
    if not hasattr(module, name):
        raise ConfigError(f"_target_ {target!r}: {module_name} has no {name!r}{_nearest(name, dir(module))}")
    found: Callable[..., Any] = getattr(module, name)
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        raise refused
    home = sys.modules.get(found.__module__)
    # the second half: `__module__` is only a claim, which a decorator may have copied from elsewhere
    if not _allowed(f"{found.__module__}.{found.__qualname__}") or getattr(home, found.__qualname__, None) is not found:
        raise refused
    return found


def _allowed(name: str) -> bool:
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in ALLOWED)


def _check(node: Any, path: str, extra: Mapping[str, Any]) -> None:
    """Resolves every target below `node` and compares its arguments with its signature; calls nothing."""
    if isinstance(node, list | tuple):
        for index, item in enumerate(node):
            _check(item, f"{path}[{index}]", {})
    if not isinstance(node, Mapping):
        return
    for key, value in node.items():
        _check(value, f"{path}.{key}" if path else str(key), {})
    if "_target_" not in node:
        return
    where = f" (at {path})" if path else ""
    special = [key for key in node if str(key).startswith("_") and key not in ("_target_", "_partial_")]
    if special:
        raise ConfigError(f"{special[0]!r} is not supported{where}: use '_target_', '_partial_' and keyword arguments")
    target = resolve(node["_target_"])
    _check_arguments(node["_target_"], inspect.signature(target), {**_arguments(node), **extra}, where, _partial(node))
    _check_types(node["_target_"], target, _arguments(node), where)


def _check_arguments(
    target: str, signature: inspect.Signature, given: Mapping[str, Any], where: str, partial: bool
) -> None:
    parameters = signature.parameters.values()
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    valid = [parameter.name for parameter in named]
    for name in given:
        if name not in valid and not open_ended:
            raise ConfigError(f"{target} has no argument {name!r}{where}{_nearest(name, valid)}; it takes {valid}")
    missing = [p.name for p in named if p.default is p.empty and p.name not in given]
    if missing and not partial:
        raise ConfigError(f"{target} lacks the argument {missing[0]!r}{where}")


def _check_types(target: str, found: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> None:
    """Compares values with annotations, those of this package only: others' are not always meant."""
    if target.startswith("vision_lowrank.") and (problem := wrong_argument(found, arguments)):
        raise ConfigError(f"{problem}{where}; it is an argument of {target}")


def _build(node: Any, extra: Mapping[str, Any]) -> Any:
    if isinstance(node, list | tuple):
        return [_build(item, {}) for item in node]
    if not isinstance(node, Mapping):
        return node
    if "_target_" not in node:
        return {key: _build(value, {}) for key, value in node.items()}
    target = resolve(node["_target_"])
    arguments = {key: _build(value, {}) for key, value in _arguments(node).items()} | dict(extra)
    if _partial(node):
        return functools.partial(target, **arguments)
    try:
        return target(**arguments)
    except TypeError as error:
        # functions that hand **kwargs on pass the check above; their inner constructor knows better
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown and unknown.group(1) in arguments:
            raise ConfigError(f"{node['_target_']} has no argument {unknown.group(1)!r}") from error
        refusal: Exception = error
    except (ValueError, MisconfigurationException) as error:
        refusal = error
    if node["_target_"].startswith("vision_lowrank."):
        raise refusal
    # a library's way to refuse arguments; of our own code it would be a fault
    raise ConfigError(f"{node['_target_']}: {' '.join(str(refusal).split())}") from refusal


def _arguments(node: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}


def _partial(node: Mapping[str, Any]) -> bool:
    return bool(node.get("_partial_", False))


def _nearest(name: str, candidates: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, [item for item in candidates if not item.startswith("_")], n=1)
    return f": did you mean {close[0]!r}?" if close else ""
