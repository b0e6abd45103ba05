"""YAML files as records: dataclasses whose annotations say what each key holds, checked key by key."""

import difflib
import reprlib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from vision_lowrank.errors import VisionLowRankError

T = TypeVar("T")
# values in messages; its arguments are known since Python 3.12 only
_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxdict, _SHOWN.maxlist, _SHOWN.maxstring, _SHOWN.maxother = 3, 20, 20, 200, 200


def read_record(record: type[T], path: Path, kind: str, error: type[VisionLowRankError]) -> T:
    """Reads a YAML file into a dataclass.

    Annotations may be dataclasses, tuples and dicts of these, optional, and plain types. Where a dataclass has a single
    field without default and that is a text, the text alone stands for it.

    Args:
        record: the dataclass.
        path: the file.
        kind: what the file is, for messages.
        error: raised for whatever is wrong with the file.
    """
    where = f"{kind} {path}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    # dates and numbers that are none are no errors of YAML's own, nor is a nesting that has no end
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as problem:
        raise error(f"{where}: no valid YAML: {' '.join(str(problem).split())}") from problem
    built: T = _Builder(where, f"the {kind}", error).build(record, content, "")
    return built


def make_record(record: type[T], content: Mapping[str, Any], where: str, error: type[VisionLowRankError]) -> T:
    """Makes a dataclass of a mapping as `read_record` does.

    Args:
        record: the dataclass.
        content: what it is made of.
        where: what that belongs to, for messages.
        error: raised for whatever is wrong with it.
    """
    built: T = _Builder(where, "it", error).build(record, content, "")
    return built


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a question after the known name most like this one, or an empty text."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


@dataclass(frozen=True)
class _Builder:
    where: str
    whole: str
    error: type[VisionLowRankError]

    def build(self, hint: Any, value: Any, key: str) -> Any:
        """Turns parsed YAML into the annotated type `hint`, or tells which key is wrong."""
        origin, arguments = get_origin(hint), get_args(hint)

        def wrong() -> VisionLowRankError:
            # the whole text of nested aliases would have no bounds
            return self.error(
                f"{self.where}: {key or self.whole} is {_SHOWN.repr(value)}, which is not {describe(hint)}"
            )

        if is_dataclass(hint):
            needed = [item.name for item in fields(hint) if _is_needed(item)]
            if isinstance(value, str) and len(needed) == 1 and get_type_hints(hint)[needed[0]] is str:
                value = {needed[0]: value}
            if not isinstance(value, Mapping):
                raise wrong()
            return self._dataclass(hint, value, key)
        if origin in (Union, types.UnionType):
            if value is None and type(None) in arguments:
                return None
            for option in arguments:
                if option in (int, str) and type(value) is option:
                    return value
            only = next(option for option in arguments if option is not type(None))
            if get_origin(only) is Literal and value not in get_args(only):
                choices = ", ".join(map(str, get_args(only)))
                raise self.error(f"{self.where}: {key} is {value!r}; it can be {choices}, or null")
            return self.build(only, value, key)
        if origin is tuple:
            if not isinstance(value, list):
                raise wrong()
            return tuple(self.build(arguments[0], item, f"{key}[{index}]") for index, item in enumerate(value))
        if origin is dict:
            counted = arguments[0] is int
            if not isinstance(value, Mapping) or (counted and any(type(name) is not int for name in value)):
                raise wrong()
            return {
                name if counted else str(name): self.build(arguments[1], item, f"{key}.{name}")
                for name, item in value.items()
            }
        if origin is Literal:
            if value not in arguments:
                choices = " or ".join(map(str, arguments))
                raise self.error(f"{self.where}: {key} is {value!r}; it can be {choices}")
            return value
        if hint is float and type(value) is int:
            return float(value)
        if hint is not Any and type(value) is not hint:
            raise wrong()
        return value

    def _dataclass(self, hint: Any, value: Mapping[Any, Any], key: str) -> Any:
        known = {item.name: item for item in fields(hint)}
        prefix = f"{key}." if key else ""
        for name in value:
            if name not in known:
                question = nearest(str(name), known)
                raise self.error(f"{self.where}: unknown key {prefix}{name}{question}; keys: {', '.join(known)}")
        for name, item in known.items():
            if name not in value and _is_needed(item):
                raise self.error(f"{self.where}: {prefix}{name} is missing; add it")
        hints = get_type_hints(hint)
        return hint(**{name: self.build(hints[name], item, prefix + name) for name, item in value.items()})


def _is_needed(item: Any) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def describe(hint: Any) -> str:
    """Returns in words what an annotation stands for."""
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if is_dataclass(hint):
        return f"a mapping with the keys {', '.join(item.name for item in fields(hint))}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in arguments)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (tuple, list, Sequence):
        counted = origin is tuple and arguments[1:] not in ((), (...,))
        return f"a list of {len(arguments)}" if counted else "a list"
    if origin is dict and arguments[:1] == (int,):
        return "a mapping by whole numbers"
    names = {
        dict: "a mapping",
        Mapping: "a mapping",
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        types.NoneType: "null",
    }
    return names.get(origin, getattr(origin, "__name__", str(hint)))
