"""Values of a configuration against the annotations of what they are arguments of, and against least values."""

import inspect
import math
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vision_lowrank.errors import ConfigError
from vision_lowrank.records import describe


def wrong_argument(target: Callable[..., Any], given: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with the first argument that is not as annotated, or None.

    Args:
        target: class or function.
        given: arguments by name, as read from a file: plain values, and mappings for objects that are not made yet.
    """
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
        made = hints.pop("return", None)
        if inspect.isfunction(target) and inspect.isclass(made):
            # a function that makes an object hands to its class what it does not know itself
            hints = get_type_hints(made.__init__) | hints
    # annotations that only a type checker can follow
    except (NameError, TypeError):
        return None
    for name, value in given.items():
        if name in hints and not fits(hints[name], value):
            return f"{name}={value!r} is not {describe(hints[name])}"
    return None


def check_least(least: int, **values: float) -> None:
    """Refuses numbers that are too small.

    Raises:
        ConfigError: a value is below `least`; it is named.
    """
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"{name} is {value}; give at least {least}")


def check_share(**values: float) -> None:
    """Refuses numbers that are no shares of something of which a part has to be left.

    Raises:
        ConfigError: a value is below 0, or 1 or above; it is named.
    """
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ConfigError(f"{name} is {value}; give a share from 0 up to, but not, 1")


def fits(hint: Any, value: Any) -> bool:
    """Tells whether a plain value can stand for an annotation; whole numbers are numbers, NaN is none."""
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if hint is Any:
        return True
    if isinstance(value, float) and math.isnan(value):
        return False
    if origin in (Union, types.UnionType):
        return any(fits(option, value) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin is types.NoneType or value is None:
        return value is None and origin is types.NoneType
    if origin in (bool, int, str):
        return type(value) is origin
    if origin is float:
        return type(value) in (int, float)
    if origin is Path:
        return isinstance(value, str | Path)
    if not inspect.isclass(origin):
        return True
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping) and _items_fit(arguments[1:], value.values())
    if issubclass(origin, Collection):
        if not isinstance(value, list | tuple):
            # one that is still to be made
            return isinstance(value, Mapping) and "_target_" in value
        if issubclass(origin, tuple) and arguments[1:] not in ((), (...,)):
            return len(value) == len(arguments) and all(map(fits, arguments, value))
        return _items_fit(arguments[:1], value)
    # an object of a class: one that is made already, or is still to be made
    return not isinstance(value, bool | int | float | str | Sequence)


def _items_fit(hints: Sequence[Any], values: Collection[Any]) -> bool:
    return not hints or all(fits(hints[0], value) for value in values)
