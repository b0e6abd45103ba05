"""Which layers of a model a user means: name suffixes, globs, regular expressions or a function, and parts of them."""

import difflib
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from vision_lowrank.adapters.layers import AdaptedLayer, BaseLayer
from vision_lowrank.errors import AdapterError

Target: TypeAlias = str | re.Pattern[str] | Callable[[str, nn.Module], bool]
Targets: TypeAlias = Target | Sequence[Target]

SUPPORTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

# a fused projection by the letters of its parts, and the parts that are meant: attn.qkv[q,v]
_PARTS = re.compile(r"(?P<layers>.*[^.])\[(?P<parts>[a-z](,[a-z])*)\]")
_FUSED = {"qkv", "kv", "qk"}

_EMBEDDING = re.compile(r"embed[^.]*\.")  # somewhere in the path of a layer inside an embedding

# these modules hand the weight of the named children to a fused kernel and never call the children
_READS_WEIGHTS_OF = {nn.MultiheadAttention: ("out_proj",), nn.TransformerEncoderLayer: ("linear1", "linear2")}


def find_targets(model: nn.Module, targets: Targets) -> list[str]:
    """Resolves targets to the paths of layers, in the model's order.

    A plain string is a suffix of whole path components: `attn.qkv` means every `....attn.qkv`, and `proj` never means
    `out_proj`. A string with `*`, `?` or `[` is a glob over the whole path, a compiled pattern must match the whole
    path, a function gets path and layer. Globs, patterns and functions only see linear and convolution layers.

    Raises:
        AdapterError: a target matches nothing, layers of a kind that has no adapters, or parts of layers; or, as a
            plain suffix, both linear and convolution layers (in a ViT `proj` is the attention's projection and the
            patch embedding), or layers inside and outside an embedding.
    """
    found = find_parts(model, targets)
    for path, parts in found.items():
        if parts:
            raise AdapterError(
                f"target for parts {','.join(parts)} of layer {path!r}: here only whole layers are taken, leave out "
                "the brackets"
            )
    return list(found)


def find_parts(model: nn.Module, targets: Targets) -> dict[str, str]:
    """Resolves targets as `find_targets` does, and those for parts of fused layers as well.

    A string that ends in letters in brackets, with commas between them, is for parts of layers: `attn.qkv[q,v]` is
    queries and values of every `....attn.qkv`. What is before the brackets is a suffix or a glob.

    Returns:
        The letters of the parts by path, in the model's order; empty for a whole layer.

    Raises:
        AdapterError: as `find_targets`; or a layer is no fused projection of equal parts one after the other, or is
            targeted both as a whole and in part.
    """
    chosen: dict[str, set[str]] = {}
    for target in as_sequence(targets):
        match = _PARTS.fullmatch(target) if isinstance(target, str) else None
        parts = set(match["parts"].split(",")) if match else set()
        for path in _find_one(model, match["layers"] if match else target):
            if parts:
                _check_fused(model, path, parts)
            if bool(chosen.setdefault(path, parts)) != bool(parts):
                raise AdapterError(f"layer {path!r} is targeted as a whole and in part: leave out one of the two")
            chosen[path] = chosen[path] | parts
    order = {path: _last(path) for path, _ in walk(model) if path in chosen}
    return {path: "".join(letter for letter in name if letter in chosen[path]) for path, name in order.items()}


def find_modules(model: nn.Module, names: Targets) -> list[str]:
    """Resolves names of modules of any kind in the same way, for instance the head to train beside the adapters.

    Raises:
        AdapterError: a name matches no module with parameters.
    """
    modules = {path: module for path, module in walk(model) if next(module.parameters(), None) is not None}
    found: dict[str, None] = {}
    for name in as_sequence(names):
        matches = [path for path, module in modules.items() if _matches(name, path, module)]
        if not matches:
            raise AdapterError(f"no module to train matches {_text(name)}; {_near(name, modules)}")
        # a glob such as head* also matches what lies below a match, which comes with it
        for path in matches:
            if not any(path.startswith(f"{other}.") for other in matches):
                found.update(dict.fromkeys(_called(path, modules)))
    return list(found)


def _called(path: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Returns the path, or those of the modules in it where it is a mere container, which peft could not take."""
    if not isinstance(modules[path], nn.ModuleList | nn.ModuleDict):
        return [path]
    children = [f"{path}.{name}" for name, _ in modules[path].named_children()]
    return [inner for child in children if child in modules for inner in _called(child, modules)]


def named_like(model: nn.Module, heads: Sequence[str]) -> tuple[str, str] | None:
    """Returns a module to train, and another whose name ends in its name: peft, which compares ends, takes both."""
    others = [path for path, module in walk(model) if path not in heads and next(module.parameters(), None) is not None]
    return next(((head, path) for path in others for head in heads if path.endswith(head)), None)


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields path and module below `model`; an adapted layer is one module, its inside is not entered."""
    inside = None
    for path, module in model.named_modules():
        if path == "" or (inside is not None and path.startswith(inside)):
            continue
        inside = f"{path}." if isinstance(module, AdaptedLayer) else None
        yield path, module


def base_of(module: nn.Module) -> nn.Module:
    """Returns the layer below the adapters, or the module itself where there are none."""
    return module.base if isinstance(module, AdaptedLayer) else module


def check_layers(model: nn.Module, paths: Sequence[str]) -> dict[str, BaseLayer]:
    """Returns the layers at `paths`, below adapters that are there already, if adapters can be put on all of them.

    Raises:
        AdapterError: a layer is of a kind without adapters, its owner by-passes it, or its weight is shared with
            another layer or computed from other tensors.
    """
    # a block that is registered twice is one place: what holds the layer counts, not by which names it is reached
    modules = dict(model.named_modules(remove_duplicate=False))
    owners: dict[int, dict[tuple[int, str], str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holder, _, child = name.rpartition(".")[0].rpartition(".")
        owners.setdefault(id(parameter), {}).setdefault((id(modules[holder]), child), name)
    layers = {}
    for path in paths:
        layers[path] = layer = _check_kind(model, path)
        if len(names := owners[id(layer.weight)].values()) > 1:
            raise AdapterError(
                f"the weight of layer {path!r} is shared ({', '.join(names)}): an adapter would change one place only; "
                "leave the layer out of the targets or untie the weight"
            )
    return layers


def by_passes(owner: nn.Module, child: str) -> bool:
    """Whether an owner's forward takes the weight of a child without calling it, as far as its source tells.

    Not so where it looks at the weight's type, device or shape only. timm's attentions (BEiT, EVA-02, Swin V2) both
    call their fused layer and read it: what they do depends on their settings.
    """
    try:
        source = inspect.getsource(type(owner).forward)
    except (OSError, TypeError):  # built in, or typed in
        return False
    layer = rf"\bself\.{re.escape(child)}"
    if not re.search(rf"{layer}\.weight\b(?!\.(dtype|device|shape)\b)", source):
        return False
    biased = getattr(owner, "q_bias", None) is not None and not getattr(owner, "qkv_bias_separate", False)
    return biased or re.search(rf"{layer}\(", source) is None


def as_sequence(targets: Targets) -> Sequence[Target]:
    """Wraps a single target in a list."""
    return [targets] if isinstance(targets, str | re.Pattern) or callable(targets) else list(targets)


def _check_kind(model: nn.Module, path: str) -> BaseLayer:
    """Returns the layer at `path` if it computes what its class promises, from a weight of its own."""
    layer = base_of(model.get_submodule(path))
    parent_path, _, child = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    for owner, children in _READS_WEIGHTS_OF.items():
        if isinstance(parent, owner) and child in children:
            raise AdapterError(
                f"layer {path!r} belongs to an {owner.__name__}, which reads its weight without calling it, so an "
                "adapter would do nothing: leave it out, or use an attention made of plain linear layers (as timm's)"
            )
    if not isinstance(layer, SUPPORTED):
        names = ", ".join(kind.__name__ for kind in SUPPORTED)
        raise AdapterError(f"layer {path!r} is a {type(layer).__name__}; adapters are for {names}")
    kind = next(kind for kind in SUPPORTED if isinstance(layer, kind))
    for method in ("forward", "_conv_forward"):
        if getattr(type(layer), method, None) is not getattr(kind, method, None):
            raise AdapterError(
                f"layer {path!r} is a {type(layer).__name__}, whose {method} is not that of {kind.__name__}, so its "
                "adapter would compute something else: leave it out of the targets"
            )
    if parametrize.is_parametrized(layer) or "weight" not in layer._parameters:
        raise AdapterError(
            f"the weight of layer {path!r} is computed from other tensors (a parametrization, weight norm or pruning): "
            "make it plain first, for instance with torch.nn.utils.parametrize.remove_parametrizations"
        )
    return layer


def _check_fused(model: nn.Module, path: str, parts: set[str]) -> None:
    """Refuses parts of a layer whose rows are not known to be whole parts one after the other."""
    name, rows = _last(path), len(cast(Tensor, base_of(model.get_submodule(path)).weight))
    owner = model.get_submodule(path.rpartition(".")[0])
    if name not in _FUSED or not parts <= set(name):
        raise AdapterError(
            f"parts {','.join(sorted(parts))} of layer {path!r}: parts are letters of the layer's name, which is one "
            f"of {', '.join(sorted(_FUSED))}; adapt the whole layer"
        )
    if getattr(owner, "head_first", False) or hasattr(owner, "key_dim"):
        # as in MaxViT and in TinyViT and EfficientFormer
        raise AdapterError(
            f"layer {path!r} of a {type(owner).__name__} has its rows head by head, not part by part: adapt it whole"
        )
    heads, width = getattr(owner, "num_heads", None), getattr(owner, "head_dim", None)
    if isinstance(heads, int) and isinstance(width, int) and rows != len(name) * heads * width:
        # as in the global attention of GC ViT, whose qkv is keys and values
        raise AdapterError(
            f"layer {path!r} has {rows} rows, not {len(name)} parts of {heads} heads of {width}: it is fused in "
            "another way than its name says, adapt it whole"
        )


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _find_one(model: nn.Module, target: Target) -> list[str]:
    modules = {path: base_of(module) for path, module in walk(model)}
    layers = {path: module for path, module in modules.items() if isinstance(module, SUPPORTED)}
    matches = [path for path, layer in layers.items() if _matches(target, path, layer)]
    if not matches:
        others = [
            path for path, module in modules.items() if isinstance(target, str) and _matches(target, path, module)
        ]
        if others:
            kind = type(modules[others[0]]).__name__
            names = ", ".join(kind.__name__ for kind in SUPPORTED)
            raise AdapterError(f"target {_text(target)} matches {others[0]!r}, a {kind}; adapters are for {names}")
        raise AdapterError(f"target {_text(target)} matches no layer; {_near(target, layers)}")
    if isinstance(target, str) and not _is_glob(target):
        linear = [path for path in matches if isinstance(layers[path], nn.Linear)]
        convolutions = [path for path in matches if path not in linear]
        if linear and convolutions:
            raise AdapterError(
                f"target {target!r} matches linear layers ({linear[0]!r}, {len(linear)} in all) and convolutions "
                f"({convolutions[0]!r}, {len(convolutions)} in all): name more of the path, such as "
                f"{'.'.join(linear[0].split('.')[-2:])!r}, or use a glob such as '*{target}' to mean both"
            )
        embeddings = [path for path in matches if _EMBEDDING.search(path)]
        if 0 < len(embeddings) < len(matches):
            other = next(path for path in matches if path not in embeddings)
            raise AdapterError(
                f"target {target!r} matches layers of an embedding ({embeddings[0]!r}, {len(embeddings)} in all) and "
                f"others ({other!r}, {len(matches) - len(embeddings)} in all): name more of the path, such as "
                f"{'.'.join(other.split('.')[-2:])!r}, or use a glob such as '*{target}' to mean both"
            )
    return matches


def _matches(target: Target, path: str, module: nn.Module) -> bool:
    if isinstance(target, re.Pattern):
        return target.fullmatch(path) is not None
    if not isinstance(target, str):
        return bool(target(path, module))
    if _is_glob(target):
        return fnmatchcase(path, target)
    return path == target or path.endswith(f".{target}")


def _is_glob(target: str) -> bool:
    return any(sign in target for sign in "*?[")


def _text(target: Target) -> str:
    return repr(target.pattern if isinstance(target, re.Pattern) else target)


def _near(target: Target, candidates: Iterable[str]) -> str:
    """Says which suffixes of the candidates' paths look like the target, or else which are the most frequent."""
    suffixes: Counter[str] = Counter()
    for path in candidates:
        parts = path.split(".")
        suffixes.update(".".join(parts[-length:]) for length in (1, 2) if length <= len(parts))
    if not suffixes:
        return "the model has no such layers at all"
    wanted = target if isinstance(target, str) else ""
    near = difflib.get_close_matches(wanted, suffixes, n=5, cutoff=0.5)
    return (
        f"near names: {', '.join(near)}"
        if near
        else f"names there are: {', '.join(n for n, _ in suffixes.most_common(8))}"
    )
