"""A new concept for a pipeline: words of its own and a LoRA, to be trained by any task, and what a LoRA file holds."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_lowrank.adapters import LoRA, inject
from vision_lowrank.adapters.injection import adapted_layers
from vision_lowrank.adapters.layers import LoRAAdapter
from vision_lowrank.composer.lora_files import LoraWeights, LowRank
from vision_lowrank.errors import ConfigError


class ConceptEmbedding(nn.Module):
    """An embedding whose last rows alone are trained.

    Args:
        known: weight (words, width) of the words that stay as they are.
        rows: first values (new words, width) of the others.
    """

    def __init__(self, known: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.known = nn.Parameter(known, requires_grad=False)
        self.rows = nn.Parameter(rows)

    def forward(self, ids: Tensor) -> Tensor:
        """Takes ids (...) to embeddings (..., width)."""
        return F.embedding(ids, torch.cat([self.known, self.rows]))


def teach(
    pipeline: Any,
    words: Sequence[str],
    like: str,
    method: LoRA,
    unet: Sequence[str],
    text_encoder: Sequence[str],
) -> None:
    """Prepares a pipeline, in place, for the training of a concept; all but the concept is frozen.

    The first words start at random, the last one as a word that the pipeline knows.

    Args:
        pipeline: of diffusers, with one text encoder.
        words: new to its tokenizer.
        like: known word whose meaning comes near.
        method: rank and scale of the LoRA.
        unet: layers of the UNet to adapt, see `adapters.find_targets`.
        text_encoder: those of the text encoder; none leaves it as it is.

    Raises:
        ConfigError: a word is known already, or `like` is not one known word.
        AdapterError: a target matches no layer.
    """
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    like_ids = tokenizer(like, add_special_tokens=False).input_ids
    if len(like_ids) != 1:
        raise ConfigError(f"{like!r} is {len(like_ids)} tokens for this pipeline; give a word that is one")
    if known := sorted(set(words) & tokenizer.get_vocab().keys()):
        raise ConfigError(f"the pipeline knows {', '.join(known)} already; choose other words")
    weight = encoder.get_input_embeddings().weight.detach()
    rows = weight.mean(0) + weight.std(0) * torch.randn(len(words), weight.shape[1], device=weight.device)
    rows[-1] = weight[like_ids[0]]
    tokenizer.add_tokens(list(words))
    inject(pipeline.unet, list(unet), method)
    encoder.requires_grad_(False)
    if text_encoder:
        inject(encoder, list(text_encoder), method)
    encoder.set_input_embeddings(ConceptEmbedding(weight, rows))


def taught(pipeline: Any, words: Sequence[str]) -> LoraWeights:
    """Returns what a pipeline learned since `teach`, in half precision."""
    rows = pipeline.text_encoder.get_input_embeddings().rows.detach().half()
    return LoraWeights(
        unet=_low_rank(pipeline.unet),
        text_encoder=_low_rank(pipeline.text_encoder),
        tokens={word: row[None] for word, row in zip(words, rows, strict=True)},
    )


def _low_rank(model: nn.Module) -> dict[str, LowRank]:
    changes = {}
    for path, layer in adapted_layers(model).items():
        down, up, scale = cast(LoRAAdapter, layer.by_name["default"]).lora_factors()
        changes[path.removeprefix("text_model.")] = LowRank(down.detach().half(), up.detach().half().flatten(1), scale)
    return changes
