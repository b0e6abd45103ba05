"""How LoRA files are laid out: opening them, and translating names of tensors to modules of diffusers and transformers.

peft, diffusers   unet.<module>.lora_A.weight                          base_model.model.<module>.lora_A.weight
old diffusers     unet.<attention>.processor.to_k_lora.down.weight     text_encoder.<module>.lora_linear_layer.up.weight
Mix-of-Show       <module>_lora.down.weight, <module>.lora_down.weight, with unet. or text_encoder. put in front
kohya             lora_unet_<module, dots as underscores>.lora_down.weight, lora_te_, lora_te1_, lora_te2_; also .alpha;
                  SDXL with the block names of its first release: input_blocks, middle_block, output_blocks, out
our own tokens    lora_tokens.<token>, lora_tokens_2.<token>: embeddings for the first and the second text encoder
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vision_lowrank.errors import VisionLowRankError

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
TOKENS = {"tokens": "lora_tokens.", "tokens_2": "lora_tokens_2."}

# names that peft and diffusers give to a LoRA in a folder, in the order in which they are looked for
_IN_FOLDER = (
    *("adapter_model.safetensors", "pytorch_lora_weights.safetensors"),
    *("adapter_model.bin", "pytorch_lora_weights.bin"),
)
_PICKLED = (".pth", ".pt", ".bin", ".ckpt")
_MIX_OF_SHOW_TOKENS = "new_concept_embedding"

# what a key starts with; without any of these the module's own name tells the component
_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "base_model.model.": None,
    "": None,
}

_TOP_OF_UNET = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks", "conv_out")
_TOP_OF_TEXT_ENCODER = ("embeddings", "encoder", "final_layer_norm", "text_projection")

_PART = r"lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|lora_linear_layer\.down|lora_linear_layer\.up"
_KEY = re.compile(rf"(?P<factor>.+?)[._](?P<part>{_PART})\.weight|(?P<scaled>.+)\.alpha")

# names that hold an underscore of their own; kohya writes dots as underscores too
_WITH_UNDERSCORE = (
    *_TOP_OF_UNET,
    *("transformer_blocks", "to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out"),
    *("conv_shortcut", "time_emb_proj", "linear_1", "linear_2"),
    *("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb"),
    *("in_layers", "emb_layers", "out_layers", "skip_connection"),
    *("text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "final_layer_norm", "text_projection"),
)
_NAMES = re.compile(rf"(?:{'|'.join(_WITH_UNDERSCORE)})(?=_|$)|[^_]+")

_RELEASED_TOP = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_RELEASED_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_RELEASED_KIND = {"0": "resnets", "1": "attentions"}
_RELEASED_INNER = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_RELEASED_RESAMPLING = {"op": "downsamplers.0.conv", "conv": "upsamplers.0.conv"}

# the first diffusers named the text encoder's attention as the UNet's
_OLD_TEXT_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class LoraFileError(VisionLowRankError):
    """A LoRA file is damaged, incomplete, of a kind that is not read, or made for another base model."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of a LoRA file belongs.

    Args:
        component: unet, text_encoder or text_encoder_2.
        module: canonical name of the module in it.
        part: first factor, second factor, or the number that the scale is made of.
        prefix: what stood before the module's name in the file.
        path: the module's name as it stood in the file.
    """

    component: str
    module: str
    part: Literal["down", "up", "alpha"]
    prefix: str
    path: str


def locate(key: str) -> Place | None:
    """Translates the name of a tensor; None if it is not part of a LoRA of a UNet or a CLIP text encoder."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    stem = match["factor"] or match["scaled"]
    part: Literal["down", "up", "alpha"] = "alpha"
    if match["part"] is not None:
        part = "down" if match["part"].endswith(("A", "down")) else "up"
    prefix = next(prefix for prefix in _PREFIXES if stem.startswith(prefix))
    path = stem.removeprefix(prefix)
    module = _canonical(".".join(_NAMES.findall(path)) if prefix.startswith("lora_") else path)
    top = module.partition(".")[0]
    component = _PREFIXES[prefix] or ("unet" if top in _TOP_OF_UNET else "text_encoder")
    if top not in (_TOP_OF_UNET if component == "unet" else _TOP_OF_TEXT_ENCODER):
        return None
    return Place(component, module, part, prefix, path)


def _canonical(path: str) -> str:
    path = _of_released_unet(path.removeprefix("text_model.")).replace(".processor.", ".")
    parent, _, name = path.rpartition(".")
    if parent.endswith(".self_attn"):
        return f"{parent}.{_OLD_TEXT_ATTENTION.get(name, name)}"
    return f"{path}.0" if name == "to_out" else path


def _of_released_unet(path: str) -> str:
    """Translates names of the UNet as Stable Diffusion was first released; others stay as they are.

    Its levels are three entries long: two blocks and a resampling going down, three blocks going up.
    """
    if path in _RELEASED_TOP:
        return _RELEASED_TOP[path]
    if match := re.fullmatch(r"middle_block\.([012])\.(.+)", path):
        return f"mid_block.{_RELEASED_MIDDLE[match[1]]}.{_RELEASED_INNER.get(match[2], match[2])}"
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(?:\d\.(op|conv)|([01])\.(.+))", path)
    if match is None or match[1] + match[2] == "input0":
        return path
    down = match[1] == "input"
    block, layer = divmod(int(match[2]) - down, 3)
    if match[3]:
        inner = _RELEASED_RESAMPLING[match[3]]
    else:
        inner = f"{_RELEASED_KIND[match[4]]}.{layer}.{_RELEASED_INNER.get(match[5], match[5])}"
    return f"{'down' if down else 'up'}_blocks.{block}.{inner}"


def open_lora(path: Path) -> tuple[Path, Mapping[str, Tensor], Mapping[str, str]]:
    """Returns the file that holds a LoRA, its tensors by flat keys, and its metadata.

    Raises:
        LoraFileError: there is no such file, it is damaged, or it holds other things than tensors.
    """
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise LoraFileError(f"{path} does not exist: give a LoRA file, or the folder that peft or diffusers wrote")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  safe_open is no dict
                return path, tensors, file.metadata() or {}
        except SafetensorError as error:
            raise LoraFileError(f"{path} is damaged ({error}): copy or save it again") from None
    if path.suffix not in _PICKLED:
        raise LoraFileError(f"{path}: files that end in {path.suffix!r} are not read; give .safetensors or .pth")
    return path, _flat(_unpickled(path), path), {}


def _in_folder(path: Path) -> Path:
    file = next((path / name for name in _IN_FOLDER if (path / name).is_file()), None)
    if file is None:
        raise LoraFileError(f"{path} is a folder without {', '.join(_IN_FOLDER)}: give the LoRA file itself")
    return file


def _unpickled(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise LoraFileError(
            f"{file} is damaged or holds other things than tensors; it is not loaded, since such a file can run code: "
            "get the LoRA as .safetensors, or save its tensors alone"
        ) from None
    except OSError:
        raise
    # the unpickler has no error of its own for damage: it fails with whatever comes of it
    except Exception as error:
        raise LoraFileError(f"{file} is damaged ({error}): copy or save it again") from None


def _flat(content: Any, file: Path) -> dict[str, Tensor]:
    """Gives the keys of Mix-of-Show's nested dictionary a prefix; a flat dictionary stays as it is."""
    if isinstance(content, Mapping):
        content = content.get("params", content)
    if not isinstance(content, Mapping):
        raise LoraFileError(f"{file} holds a {type(content).__name__}, not named tensors; give a LoRA file")
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and key in (_MIX_OF_SHOW_TOKENS, *COMPONENTS):
            prefix = TOKENS["tokens"] if key == _MIX_OF_SHOW_TOKENS else f"{key}."
            tensors |= {f"{prefix}{inner}": tensor for inner, tensor in value.items()}
        else:
            tensors[str(key)] = value
    if other := next((key for key, value in tensors.items() if not isinstance(value, Tensor)), None):
        raise LoraFileError(f"{file}: {other} is a {type(tensors[other]).__name__}, not a tensor; give a LoRA file")
    for key, tensor in tensors.items():
        # of a view, the file need not hold as many numbers as it has
        held = tensor.layout == torch.strided and not tensor.is_meta
        if not held or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise LoraFileError(f"{file}: {key} is sparse, or a view of fewer numbers than it has; save plain tensors")
    return tensors
