"""Puts adapters into a model and takes them out."""

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from vision_lowrank.adapters.layers import AdaptedLayer, Adapter
from vision_lowrank.adapters.methods import Method
from vision_lowrank.adapters.slices import Sliced
from vision_lowrank.adapters.targets import Targets, check_layers, find_modules, find_parts, walk
from vision_lowrank.errors import AdapterError

# the names of the adapters beside which a module is trained; on the module itself, so that copies keep it
_MARK = "_trained_beside"


def inject(model: nn.Module, targets: Targets, method: Method, name: str = "default", train: Targets = ()) -> list[str]:
    """Puts an adapter on every targeted layer, in place, and freezes everything else.

    The adapted model computes what the model computed, bit for bit, until the adapters are trained; where a method
    starts elsewhere, its description says so. Further calls may add other layers under the same name (with another
    rank, say) or another name on the same layers; contributions are summed.

    Args:
        model: any module.
        targets: layers, see `targets.find_targets`, or parts of fused ones, see `targets.find_parts`: `attn.qkv[q,v]`
            puts an adapter of its own on the queries' and on the values' rows. Several may be given.
        method: settings such as `LoRA(...)`; `registry.METHODS` has all.
        name: the adapter's name, a Python identifier.
        train: modules to train beside the adapters and to save with them, such as the head; named as targets are.

    Returns:
        The paths of the adapted layers, in the model's order.

    Raises:
        AdapterError: a target matches nothing or what cannot be adapted, the name is taken there, or a module to train
            contains an adapted layer. The model is then as it was.
    """
    parts = find_parts(model, targets)
    methods = {path: Sliced(method, some, path.rpartition(".")[2]) if some else method for path, some in parts.items()}
    attach(model, methods, name, find_modules(model, train))
    return list(methods)


def attach(
    model: nn.Module,
    methods: Mapping[str, Method],
    name: str,
    train: list[str],
    built: Mapping[str, Adapter] | None = None,
) -> None:
    """Does the work of `inject` for resolved paths, one method a layer.

    Args:
        model: as for `inject`.
        methods: settings by path.
        name: as for `inject`.
        train: paths of modules to train.
        built: the adapters by path, where they are made already; None makes them.

    Raises:
        AdapterError: as `inject`.
    """
    if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
        raise AdapterError(f"adapter name {name!r}: use a Python identifier that is no attribute of a ModuleDict")
    if not methods:
        raise AdapterError("no target: name at least one layer to adapt")
    layers = check_layers(model, list(methods))
    for path in methods:
        module = model.get_submodule(path)
        if isinstance(module, AdaptedLayer):
            if name in module.adapters:
                raise AdapterError(f"layer {path!r} has an adapter {name!r} already: remove(model, {name!r}) or rename")
            if module.merged:
                raise AdapterError(f"layer {path!r} is merged: call unmerge(model) before adding adapter {name!r}")
    adapted = [*methods, *(path for path, module in walk(model) if isinstance(module, AdaptedLayer))]
    for module_path in [*train, *trained_modules(model)]:
        for path in adapted:
            if f"{path}.".startswith(f"{module_path}."):
                raise AdapterError(
                    f"module {module_path!r} is to be trained as a whole, but its layer {path!r} is to be adapted: "
                    "take one of the two out"
                )

    if built is None:
        built = {path: method.build(layers[path]) for path, method in methods.items()}
    for path, adapter in built.items():
        module = model.get_submodule(path)
        if not isinstance(module, AdaptedLayer):
            module = AdaptedLayer(layers[path])
            replace_layer(model, path, module)
        adapter.train(module.training)
        module.adapters[name] = adapter
        module.methods[name] = methods[path]
    for path in train:
        module = model.get_submodule(path)
        setattr(module, _MARK, getattr(module, _MARK, frozenset()) | {name})
    _freeze(model)


def freeze_except(model: nn.Module, train: Targets) -> None:
    """Leaves gradients to some modules of a model without adapters, and to nothing else.

    Args:
        model: any module.
        train: the modules, such as the head; named as targets are.

    Raises:
        AdapterError: a name matches no module with parameters.
    """
    paths = find_modules(model, train)
    model.requires_grad_(False)
    for path in paths:
        model.get_submodule(path).requires_grad_(True)


def remove(model: nn.Module, name: str | None = None) -> None:
    """Takes adapters out, unmerging first; a layer without adapters is its base again, the very bits.

    What `inject` froze stays frozen, and modules trained beside the adapters keep their values.

    Args:
        model: a model with adapters.
        name: the adapter to take out; None takes all.

    Raises:
        AdapterError: no layer has an adapter of that name.
    """
    for path, layer in adapted_layers(model, name).items():
        layer.unmerge()
        for adapter in [name] if name is not None else list(layer.adapters):
            del layer.adapters[adapter], layer.methods[adapter]
        if not layer.adapters:
            replace_layer(model, path, layer.base)
    for path in trained_modules(model, name):
        module = model.get_submodule(path)
        setattr(module, _MARK, frozenset() if name is None else getattr(module, _MARK) - {name})


def merge_and_remove(model: nn.Module) -> None:
    """Writes all adapters at strength 1 into the base weights for good and leaves a model without adapters.

    Raises:
        AdapterError: an adapter cannot be merged, see `AdaptedLayer.merge`; nothing is changed then.
    """
    layers = adapted_layers(model)
    for layer in layers.values():
        layer.unmerge()
    check_mergeable(layers)
    for path, layer in layers.items():
        for adapter in layer.by_name.values():
            adapter.strength.fill_(1.0)
        layer.merge()
        replace_layer(model, path, layer.base)
    for path in trained_modules(model):
        setattr(model.get_submodule(path), _MARK, frozenset())


def check_mergeable(layers: Mapping[str, AdaptedLayer]) -> None:
    """Checks all layers before the first is changed.

    Raises:
        AdapterError: an adapter has no equivalent weight, each row of the batch has its own, or none computes.
    """
    for path, layer in layers.items():
        if not layer.active:
            raise AdapterError(
                f"layer {path!r} computes as its base: leave the block of disabled(model) before merging"
            )
        if layer.row_strengths is not None:
            raise AdapterError(
                f"layer {path!r} has strengths for each row, and one weight cannot serve all rows: leave the block of "
                "rows(model, ...) before merging"
            )
        for name, adapter in layer.by_name.items():
            if not adapter.mergeable:
                training = ", or call model.eval() first if it is one weight then" if layer.training else ""
                raise AdapterError(
                    f"adapter {name!r} on layer {path!r} is a {layer.methods[name]}, which is no single weight for all "
                    f"inputs and cannot be merged: keep it unmerged{training}"
                )


def adapted_layers(model: nn.Module, name: str | None = None) -> dict[str, AdaptedLayer]:
    """Returns the adapted layers by path, all or those with an adapter of that name.

    Raises:
        AdapterError: there are none.
    """
    layers = {path: module for path, module in walk(model) if isinstance(module, AdaptedLayer)}
    if not layers:
        raise AdapterError("the model has no adapters: call inject or load_adapter first")
    if name is None:
        return layers
    chosen = {path: layer for path, layer in layers.items() if name in layer.adapters}
    if not chosen:
        names = sorted({other for layer in layers.values() for other in layer.adapters})
        raise AdapterError(f"the model has no adapter {name!r}; it has {', '.join(names)}")
    return chosen


def trained_modules(model: nn.Module, name: str | None = None) -> list[str]:
    """Returns the paths of the modules trained beside the adapter of that name, or beside any."""
    marks: dict[str, frozenset[str]] = {path: getattr(module, _MARK, frozenset()) for path, module in walk(model)}
    return [path for path, names in marks.items() if (names if name is None else name in names)]


def freeze_statistics(model: nn.Module) -> None:
    """Puts normalisations with frozen parameters in evaluation mode; call it after each `model.train()`.

    Otherwise a frozen base drifts while its adapters train, and the adapter's file alone does not give the model back.
    A normalisation without parameters is frozen unless all of the smallest module with parameters around it is trained.
    """
    for path, module in model.named_modules():
        if isinstance(module, _NormBase):
            trained = [parameter.requires_grad for parameter in module.parameters()]
            if not (any(trained) if trained else _all_trained_around(model, path)):
                module.eval()


def _all_trained_around(model: nn.Module, path: str) -> bool:
    while path:
        path = path.rpartition(".")[0]
        if trained := [parameter.requires_grad for parameter in model.get_submodule(path).parameters()]:
            return all(trained)
    return True


def _freeze(model: nn.Module) -> None:
    """Leaves gradients to adapters and to modules trained beside them, and to nothing else.

    Gradients that frozen weights have are dropped: they take memory and count in the norm that clipping sees.
    """
    trained = [model.get_submodule(path) for path in trained_modules(model)]
    adapters = [layer.adapters for layer in adapted_layers(model).values()]
    kept = {parameter for module in [*trained, *adapters] for parameter in module.parameters()}
    for parameter in model.parameters():
        if parameter not in kept:
            parameter.requires_grad_(False)
            parameter.grad = None
    for module in trained:
        module.requires_grad_(True)


def replace_layer(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module in the place of the one at a path."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
