"""Methods that peft has, each under one name, for any torch module and with the same targets as our own adapters.

| name         | what it is                                                    | source                      |
| :----------- | :------------------------------------------------------------ | :-------------------------- |
| `lora`       | W + s B A                                                     | arXiv 2106.09685            |
| `rslora`     | LoRA with s = alpha / sqrt(rank)                              | arXiv 2312.03732            |
| `dora`       | direction by LoRA, length of each row trained apart           | arXiv 2402.09353            |
| `pissa`      | LoRA that starts at the leading singular vectors of W         | arXiv 2404.02948            |
| `olora`      | LoRA that starts at the QR decomposition of W                 | arXiv 2406.01775            |
| `eva`        | LoRA whose A starts at principal components of the inputs     | arXiv 2410.07170            |
| `orthogonal` | LoRA whose product starts at zero with neither factor zero    | peft's LoraConfig           |
| `randlora`   | full-rank sum of random bases, their diagonals trained        | arXiv 2502.00987            |
| `vera`       | shared random factors, two vectors trained                    | arXiv 2310.11454            |
| `miss`       | one matrix shared by all blocks of inputs                     | arXiv 2409.15371            |
| `bat`        | block affine update of W, of the same paper (Bone)            | arXiv 2409.15371            |
| `loha`       | elementwise product of two low-rank products                  | 2108.06098, 2309.14859      |
| `lokr`       | Kronecker product of a matrix and a low-rank product          | arXiv 2309.14859            |
| `hira`       | W times a low-rank product, element by element                | ICLR 2025, TwJrTz9cRS       |
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vision_lowrank.adapters.layers import AdaptedLayer, BaseLayer
from vision_lowrank.adapters.methods import check_alpha, check_dropout, check_rank
from vision_lowrank.adapters.targets import Targets, by_passes, check_layers, find_modules, find_targets, named_like
from vision_lowrank.errors import AdapterError

if TYPE_CHECKING:  # peft brings transformers with it, which takes seconds to import
    from peft import PeftModel

# a layer may get up to this many times the rank, the average stays (arXiv 2410.07170, rho)
_EVA_SPREAD = 2

# types of the weights that pissa and olora start from
_DECOMPOSED = (torch.float32, torch.float16, torch.bfloat16)

# what of a convolution is usual, as far as a tuner may compute as if it were so
_USUAL: dict[str, tuple[Any, ...]] = {
    "groups": (1,),
    "padding_mode": ("zeros",),
    "dilation": ((1,), (1, 1), (1, 1, 1)),
}


@dataclasses.dataclass(frozen=True)
class PeftMethod:
    """What a name stands for in peft.

    Attributes:
        config: class of the configuration.
        settings: our names of settings, with peft's.
        fixed: settings of peft that make the method.
        layers: kinds of layers it is right on.
        unread: attributes of a convolution that its computation leaves out.
        scale: alpha / rank where no alpha is given, from peft's defaults.
        rank_rule: what the rank has to be, in words, and as a function of rank, outputs and inputs of a layer.
    """

    config: str
    settings: Mapping[str, str]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layers: tuple[type[nn.Module], ...] = (nn.Linear,)
    unread: tuple[str, ...] = ()
    scale: int = 1
    rank_rule: tuple[str, Callable[[int, int, int], bool]] = ("", lambda rank, outputs, inputs: True)


def _lora(**changes: Any) -> PeftMethod:
    everywhere = PeftMethod(
        "LoraConfig",
        {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
        layers=(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
        unread=("groups", "padding_mode", "dilation"),
    )
    return dataclasses.replace(everywhere, **changes)


def _lora_on_linear(start: str, *rank_rule: Any) -> PeftMethod:
    return _lora(fixed={"init_lora_weights": start}, layers=(nn.Linear,), rank_rule=rank_rule)


_OF_WEIGHT = ("at most the smaller side of the weight", lambda rank, outputs, inputs: rank <= min(outputs, inputs))
_KERNELS_TO_2D = (nn.Linear, nn.Conv1d, nn.Conv2d)

# what a rank takes room for up to here does no harm, and peft may never use it
HARMLESS_RANK = 4096

PEFT_METHODS: Mapping[str, PeftMethod] = {
    "lora": _lora(),
    "rslora": _lora(fixed={"use_rslora": True}),
    "dora": _lora(fixed={"use_dora": True}),
    "pissa": _lora_on_linear("pissa", *_OF_WEIGHT),
    "olora": _lora_on_linear("olora", *_OF_WEIGHT),
    "eva": _lora_on_linear(
        "eva", "at most half the inputs", lambda rank, outputs, inputs: _EVA_SPREAD * rank <= inputs
    ),
    "orthogonal": _lora_on_linear("orthogonal", "even", lambda rank, outputs, inputs: rank % 2 == 0),
    "randlora": PeftMethod(
        "RandLoraConfig",
        {"rank": "r", "alpha": "randlora_alpha", "dropout": "randlora_dropout", "seed": "projection_prng_key"},
        scale=20,
    ),
    "vera": PeftMethod("VeraConfig", {"rank": "r", "dropout": "vera_dropout", "seed": "projection_prng_key"}),
    "miss": PeftMethod(
        "MissConfig",
        {"rank": "r", "dropout": "miss_dropout"},
        rank_rule=("at most the inputs", lambda rank, outputs, inputs: rank <= inputs),
    ),
    "bat": PeftMethod(
        "MissConfig",
        {"rank": "r"},
        {"init_weights": "bat"},
        rank_rule=(
            "a divisor of outputs and inputs",
            lambda rank, outputs, inputs: outputs % rank == inputs % rank == 0,
        ),
    ),
    "loha": PeftMethod("LoHaConfig", {"rank": "r", "alpha": "alpha"}, layers=_KERNELS_TO_2D, unread=("padding_mode",)),
    "lokr": PeftMethod(
        "LoKrConfig",
        {"rank": "r", "alpha": "alpha", "factor": "decompose_factor"},
        layers=_KERNELS_TO_2D,
        unread=("padding_mode",),
    ),
    "hira": PeftMethod(
        "HiraConfig",
        {"rank": "r", "dropout": "hira_dropout"},
        layers=(*_KERNELS_TO_2D, nn.Conv3d),
        unread=("groups", "padding_mode"),
    ),
}


def inject_peft(
    model: nn.Module,
    name: str,
    targets: Targets,
    *,
    rank: int,
    train: Targets = (),
    inputs: Iterable[Tensor | Sequence[Tensor]] = (),
    **settings: Any,
) -> "PeftModel":
    """Puts a method of peft on every targeted layer, in place, and freezes everything else.

    The outcome is peft's: `merge_and_unload()` gives the plain module, `save_pretrained(folder)` writes peft's folder
    and `peft.PeftModel.from_pretrained(base, folder)` reads it. At start the model computes what it did, to rounding.
    `pissa` and `olora` move part of the base weights into the adapter: without it the base is another model.

    Args:
        model: any module without adapters.
        name: one of `PEFT_METHODS`.
        targets: layers, see `targets.find_targets`.
        rank: the method's rank; for `miss` and `bat` the side of a block.
        train: modules to train beside the adapters and to save with them, such as the head; named as targets are.
        inputs: batches of the model's input, (batch, channels, height, width), or of its inputs in order; they must
            have a length. Only `eva` reads them; of several processes each is to get the same.
        settings: `alpha` (numerator of the scale; by default the rank, for `randlora` 20 times the rank), `dropout`
            (probability for a value of the adapter's input), `seed` (of random bases) and `factor` (of `lokr`), where
            the method has them.

    Returns:
        The peft model around `model`.

    Raises:
        AdapterError: an unknown name or setting, a value out of range, targets that match nothing or that the method
            cannot take, or a model that has adapters already. The model is then as it was.
    """
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuner = _find_tuner(name)
    options = _options(name, tuner, rank, settings)
    if any(isinstance(module, AdaptedLayer | BaseTunerLayer) for module in model.modules()):
        raise AdapterError("the model has adapters already, and peft would freeze them: merge or remove them first")
    if not hasattr(peft, tuner.config):
        raise AdapterError(f"peft {peft.__version__} has no {tuner.config}, which {name} needs: install a newer peft")

    paths = find_targets(model, targets)
    for path, layer in check_layers(model, paths).items():
        _check_layer(name, tuner, rank, path, layer)
        _check_owner(name, model, path)
    heads = find_modules(model, train)
    _check_heads(model, paths, heads)
    if name == "eva":
        _check_rows(model, paths, inputs, rank)
        options["eva_config"] = peft.EvaConfig(rho=_EVA_SPREAD)
    config = getattr(peft, tuner.config)(
        # a pattern of whole names, since peft takes the names in a list as ends of names
        target_modules="|".join(re.escape(path) for path in paths),
        modules_to_save=heads or None,
        **tuner.fixed,
        **options,
    )
    training = model.training
    # the factors of eva have no values until they get those of the components
    adapted = peft.get_peft_model(model, config, low_cpu_mem_usage=name == "eva")
    if name == "eva":
        peft.initialize_lora_eva_weights(
            adapted,
            inputs,
            forward_fn=_forward,
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=_rows,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    return adapted.train(training)


def load_peft(model: nn.Module, folder: str | Path) -> nn.Module:
    """Returns the model with adapters of a folder of peft merged into its weights, and the modules trained with them.

    Args:
        model: the very one that the adapters were put on, without them; it is changed.
        folder: written by `save_pretrained` of what `inject_peft` returns; has `adapter_config.json` and
            `adapter_model.safetensors`.

    Raises:
        AdapterError: the folder is of no method here, damaged, or of another model.
    """
    import peft

    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        # peft would ask the hub for a repository of that name
        raise AdapterError(f"{folder} has no adapter_config.json: give a folder that save_pretrained wrote")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        known = {tuner.config for tuner in PEFT_METHODS.values()}
        if type(config).__name__ not in known:
            raise AdapterError(f"{folder}: a {type(config).__name__}, which is none of {', '.join(sorted(known))}")
        if getattr(config, "megatron_config", None) is not None:
            # peft would import the module that it names
            raise AdapterError(f"{folder}: its megatron_config has code imported; do not trust it")
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            given = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118  safe_open is no dict
        _check_ranks(config, max((size for shape in given.values() for size in shape), default=0), folder)
        adapted = peft.get_peft_model(model, config)
        # peft itself leaves random what the file lacks
        if wrong := sorted(given.keys() ^ peft.get_peft_model_state_dict(adapted).keys()):
            which = "is not of this model" if wrong[0] in given else "is missing"
            raise AdapterError(f"{folder}: {len(wrong)} entries differ from the model's; {wrong[0]} {which}")
        adapted.load_adapter(str(folder), "default")
        merged: nn.Module = adapted.merge_and_unload()
    # peft tells what is wrong with a folder by all of these
    except (
        OSError, ValueError, TypeError, LookupError, RuntimeError, AttributeError, ArithmeticError, AssertionError,
        re.error, SafetensorError,
    ) as error:  # fmt: skip
        raise AdapterError(f"{folder}: no adapters of peft for this model ({error}); train them anew") from error
    if astray := [name for name, weight in merged.named_parameters() if not weight.isfinite().all()]:
        raise AdapterError(f"{folder}: with its adapters {astray[0]} is not finite; train them anew")
    return merged


def _check_ranks(config: Any, largest: int, folder: Path) -> None:
    """Compares ranks with the largest side of a tensor in the folder, before peft makes room for what they ask.

    Not that of LoKr, whose factors are full matrices where the rank is large.

    Raises:
        AdapterError: a rank is none, or larger.
    """
    if type(config).__name__ == "LoKrConfig":
        return
    ranks = [config.r, getattr(config, "mini_r", 1), *getattr(config, "rank_pattern", {}).values()]
    for rank in ranks:
        check_rank("rank", rank)
        if rank > max(largest, HARMLESS_RANK):
            raise AdapterError(
                f"{folder}: rank {rank} is above {largest}, the largest side of its tensors; do not trust it"
            )


def _find_tuner(name: str) -> PeftMethod:
    if name not in PEFT_METHODS:
        near = difflib.get_close_matches(name, PEFT_METHODS, n=3, cutoff=0.5) or list(PEFT_METHODS)
        raise AdapterError(f"unknown method {name!r} of peft; near names: {', '.join(near)}")
    return PEFT_METHODS[name]


def _options(name: str, tuner: PeftMethod, rank: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings under peft's names."""
    for key in settings:
        if key not in tuner.settings:
            raise AdapterError(f"{name} has no setting {key!r}; it has {', '.join(tuner.settings)}")
    check_rank("rank", rank)
    check_rank("factor", settings.get("factor", 1))
    check_alpha(settings.get("alpha", rank))
    check_dropout(name, settings.get("dropout", 0.0))
    chosen = {"rank": rank, **settings}
    if "alpha" in tuner.settings:
        chosen.setdefault("alpha", tuner.scale * rank)
    return {tuner.settings[key]: value for key, value in chosen.items()}


def _check_layer(name: str, tuner: PeftMethod, rank: int, path: str, layer: BaseLayer) -> None:
    """Refuses what peft computes wrongly, cannot merge, or stops at with the model half changed.

    Raises:
        AdapterError: the layer's kind, one of its attributes, or the rank on it.
    """
    remedy = "leave it out of the targets, or use adapters.inject with a method that takes it, such as LoRA"
    if not isinstance(layer, tuner.layers):
        kinds = ", ".join(kind.__name__ for kind in tuner.layers)
        raise AdapterError(f"layer {path!r} is a {type(layer).__name__}, {name} of peft is for {kinds}: {remedy}")
    if not isinstance(layer, nn.Linear):
        for what in tuner.unread:
            if (value := getattr(layer, what)) not in _USUAL[what]:
                raise AdapterError(f"layer {path!r} has {what}={value!r}, which {name} of peft leaves out: {remedy}")
    if isinstance(layer, nn.Conv3d) and layer.kernel_size[:2] == (1, 1):
        # its special case for 1 x 1 kernels looks at the first two sides only
        raise AdapterError(f"layer {path!r} has the kernel {layer.kernel_size}, which peft cannot merge: {remedy}")
    if tuner.fixed.get("init_lora_weights") in ("pissa", "olora") and layer.weight.dtype not in _DECOMPOSED:
        raise AdapterError(
            f"the weight of layer {path!r} is {layer.weight.dtype}, and {name} of peft starts from float32, float16 or "
            "bfloat16: call model.float() first"
        )
    if tuner.fixed.get("use_dora") and not layer.weight.flatten(1).any(dim=1).all():
        raise AdapterError(f"layer {path!r} has rows of zeros, by whose norm {name} would divide: {remedy}")
    if tuner.fixed.get("init_lora_weights") == "pissa" and not layer.weight.any():
        raise AdapterError(f"the weight of layer {path!r} is zero, and {name} of it could not learn: {remedy}")
    words, fits = tuner.rank_rule
    outputs, inputs = layer.weight.shape[:2]
    if not fits(rank, outputs, inputs):
        raise AdapterError(
            f"{name} rank={rank} on layer {path!r} with {outputs} outputs and {inputs} inputs: it has to be {words}"
        )


def _check_owner(name: str, model: nn.Module, path: str) -> None:
    """Refuses a layer whose owner reads its weight: peft's layer then gives that of the base and learns nothing."""
    owner_path, _, child = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    if by_passes(owner, child):
        raise AdapterError(
            f"layer {path!r} belongs to a {type(owner).__name__}, whose forward reads its weight without calling it, "
            f"so {name} of peft would do nothing: leave it out of the targets, or, where timm has that switch, set "
            "qkv_bias_separate = True on its owner"
        )


def _check_heads(model: nn.Module, paths: Sequence[str], heads: Sequence[str]) -> None:
    """Refuses modules to train where peft, which compares ends of names, would take more or drop targets."""
    for head in heads:
        for path in paths:
            if f".{head}." in f".{path}.":
                raise AdapterError(
                    f"module {head!r} is to be trained as a whole, but peft would then leave out the target {path!r}: "
                    "take one of the two out"
                )
    if pair := named_like(model, heads):
        head, path = pair
        raise AdapterError(
            f"peft would train {path!r} with {head!r}, since its name ends so: train both, or use adapters.inject"
        )


def _check_rows(model: nn.Module, paths: Sequence[str], inputs: Iterable[Any], rank: int) -> None:
    """Refuses batches through which peft would go for ever, as it does where a layer gets fewer rows than components.

    Raises:
        AdapterError: there is no batch, or the first one is too small for a layer.
    """
    batch = next(iter(inputs), None) if isinstance(inputs, Sized) else None
    if batch is None:
        raise AdapterError(
            "eva starts at the principal components of each layer's inputs: give batches as inputs=..., in a list or a "
            "DataLoader"
        )
    counts = dict.fromkeys(paths, 0)

    def count(path: str, _: nn.Module, layer_input: tuple[Tensor, ...]) -> None:
        counts[path] = len(_rows(layer_input))

    hooks = [model.get_submodule(path).register_forward_pre_hook(partial(count, path)) for path in paths]
    training = model.training
    try:
        with torch.no_grad():
            _forward(model.eval(), batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    for path, rows in counts.items():
        if rows < _EVA_SPREAD * rank:
            raise AdapterError(
                f"eva: a batch of inputs brings {rows} rows to layer {path!r}, and rank {rank} needs "
                f"{_EVA_SPREAD * rank}: give larger batches, or take a lower rank"
            )


def _forward(model: nn.Module, batch: Tensor | Sequence[Tensor]) -> Any:
    device = next(model.parameters()).device
    return model(*(tensor.to(device) for tensor in ([batch] if isinstance(batch, Tensor) else batch)))


def _rows(layer_input: tuple[Tensor, ...], *_: Any) -> Tensor:
    """Returns what a linear layer gets as a matrix, one row a token."""
    return layer_input[0].reshape(-1, layer_input[0].shape[-1]).contiguous()
