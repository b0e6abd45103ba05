"""Prompts as embeddings: concept tokens found by their ids, LoRAs of the text encoders applied for the call alone.

`T` is the number of a prompt's tokens, `L` of cross-attention layers where tokens have an embedding for each, else 1.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_lowrank.composer.layout import Lora, Text
from vision_lowrank.composer.lora_files import LoraWeights
from vision_lowrank.errors import ConfigError

_UNKNOWN = re.compile(r"<[^<>\s]+>")


@dataclass(frozen=True)
class Encoded:
    """A prompt and its negative, encoded.

    Args:
        text: embeddings of both.
        tokens: where the subject's tokens are in the prompt, the start sign being 0.
        pooled: what SDXL takes besides, (2, width), the negative row first; None for other models.
    """

    text: Text
    tokens: list[int]
    pooled: Tensor | None


def encode(
    pipeline: Any,
    prompt: str,
    negative_prompt: str | None = None,
    loras: Sequence[tuple[LoraWeights, float]] = (),
    subject: str | None = None,
) -> Encoded:
    """Encodes a prompt as the pipeline would with these LoRAs loaded.

    Args:
        pipeline: of diffusers, Stable Diffusion 1, 2 or XL; its encoders are left as they were.
        prompt: may name the tokens of the LoRAs.
        negative_prompt: what to keep away from; None for an empty one, or, where the pipeline has it so, for zeros.
        loras: with their strength.
        subject: the words of the prompt that are the concept; None for the LoRAs' tokens.

    Raises:
        ConfigError: a prompt is too long, names an unknown token or one that two LoRAs mean differently, or the subject
            is not in the prompt.
    """
    encoders = [
        _Encoder(pipeline, suffix, loras) for suffix in ("", "_2") if getattr(pipeline, f"text_encoder{suffix}", None)
    ]
    positive, pooled = _encode_all(encoders, prompt)
    if negative_prompt is None and pooled and pipeline.config.force_zeros_for_empty_prompt:
        negative, negative_pooled = torch.zeros_like(positive[:1]), [torch.zeros_like(pooled[0])]
    else:
        negative, negative_pooled = _encode_all(encoders, negative_prompt or "")
    both = torch.cat([*negative_pooled, *pooled]) if pooled else None
    return Encoded(Text(positive, negative), encoders[0].find(prompt, subject), both)


def _encode_all(encoders: Sequence["_Encoder"], prompt: str) -> tuple[Tensor, list[Tensor]]:
    """Returns (L, T, width), that of several encoders side by side, and then the pooled row of the last (1, width)."""
    found = [encoder.encode(prompt, last=len(encoders) == 1) for encoder in encoders]
    rows = max(len(states) for states, _ in found)
    states = torch.cat([states.expand(rows, -1, -1) for states, _ in found], dim=-1)
    return states, [] if len(encoders) == 1 else [found[-1][1]]


class _Encoder:
    """One text encoder of a pipeline with its tokenizer and what LoRAs change and add."""

    def __init__(self, pipeline: Any, suffix: str, loras: Sequence[tuple[LoraWeights, float]]) -> None:
        self.model: Any = getattr(pipeline, f"text_encoder{suffix}")
        self.tokenizer: Any = getattr(pipeline, f"tokenizer{suffix}")
        self.loras: list[Lora] = [(getattr(lora, f"text_encoder{suffix}"), strength) for lora, strength in loras]
        self.embeddings: dict[str, Tensor] = {}
        self.sources: dict[str, str] = {}
        self.ambiguous: dict[str, str] = {}
        for lora, _ in loras:
            for token, embedding in getattr(lora, f"tokens{suffix}").items():
                source = str(lora.files[0]) if lora.files else "a LoRA"
                if token in self.embeddings and not torch.equal(self.embeddings[token], embedding):
                    self.ambiguous[token] = f"{self.sources[token]} and {source}"
                self.embeddings[token], self.sources[token] = embedding, source
        self.length = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)

    @torch.no_grad()
    def encode(self, prompt: str, last: bool) -> tuple[Tensor, Tensor]:
        """Returns states (L, T, width) of the last layer, or of the one before, and the pooled row (1, width).

        Raises:
            ConfigError: the prompt is too long, or as `tokenize`.
        """
        pieces = self.tokenize(prompt)
        if len(pieces) > self.length - 2:
            raise ConfigError(
                f"prompt {prompt!r} has {len(pieces)} tokens; the text encoder takes {self.length - 2}: shorten it"
            )
        # an id that only holds the place of a concept's token; a special one would end the text
        place = next(index for index in range(len(self.tokenizer)) if index not in self.tokenizer.all_special_ids)
        ids = [place if isinstance(piece, str) else piece for piece in pieces]
        ids = [self.tokenizer.bos_token_id, *ids, self.tokenizer.eos_token_id]
        ids += [self.tokenizer.pad_token_id] * (self.length - len(ids))
        concepts = {index: self.embeddings[piece] for index, piece in enumerate(pieces, 1) if isinstance(piece, str)}
        rows = max((len(embedding) for embedding in concepts.values()), default=1)
        batch = torch.tensor([ids], device=self.model.device).expand(rows, -1)
        with _changed(self.model, self.loras, concepts):
            output = self.model(batch, output_hidden_states=True)
        states = output.last_hidden_state if last else output.hidden_states[-2]
        return states, output[0 if hasattr(output, "text_embeds") else 1][:1]

    def tokenize(self, prompt: str) -> list[int | str]:
        """Returns the prompt's ids, and the names of the concepts' tokens between them.

        Raises:
            ConfigError: a token is in no LoRA, or in several with different embeddings.
        """
        names = sorted(self.embeddings, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, names))})", prompt) if names else [prompt]
        pieces: list[int | str] = []
        for part in parts:
            if part in self.ambiguous:
                raise ConfigError(
                    f"prompt {prompt!r}: token {part} is in {self.ambiguous[part]} with other embeddings; give it one "
                    "of these LoRAs, or train one with another token"
                )
            if part in self.embeddings:
                pieces.append(part)
                continue
            for unknown in _UNKNOWN.findall(part):
                if unknown not in self.tokenizer.get_vocab():
                    known = ", ".join(names) or "none"
                    raise ConfigError(
                        f"prompt {prompt!r}: token {unknown} is in no LoRA given for it (their tokens: {known}); "
                        "correct it or add the LoRA"
                    )
            pieces += self.tokenizer(part, add_special_tokens=False).input_ids
        return pieces

    def find(self, prompt: str, subject: str | None) -> list[int]:
        """Returns the positions of the subject's tokens in the encoded prompt, all that it has.

        Raises:
            ConfigError: it is not in the prompt, or as `tokenize`.
        """
        pieces = self.tokenize(prompt)
        if subject is None:
            return [index for index, piece in enumerate(pieces, 1) if isinstance(piece, str)]
        wanted = self.tokenize(subject)
        starts = [start for start in range(len(pieces)) if wanted and pieces[start : start + len(wanted)] == wanted]
        if not starts:
            raise ConfigError(
                f"subject {subject!r} is not in the prompt {prompt!r}; give words of it, as they are there"
            )
        return sorted({start + offset + 1 for start in starts for offset in range(len(wanted))})


def _add_changes(
    factors: Sequence[tuple[Tensor, Tensor, float]], module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """A forward hook that adds the products of factors (down, up, scale) to a linear layer's output."""
    for down, up, scale in factors:
        output = output + scale * F.linear(F.linear(inputs[0], down), up)
    return output


@contextmanager
def _changed(model: nn.Module, loras: Sequence[Lora], concepts: Mapping[int, Tensor]) -> Iterator[None]:
    """Adds LoRAs to the layers of a text encoder and puts embeddings at positions, until the end of the block."""
    layers = {name.removeprefix("text_model."): module for name, module in model.named_modules()}
    handles = []

    def place(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output.clone()
        for position, embedding in concepts.items():
            output[:, position] = embedding.to(output)
        return output

    try:
        for name in {name: None for changes, _ in loras for name in changes}:
            like = next(iter(layers[name].parameters()))
            factors = [
                (changes[name].down.to(like).flatten(1), changes[name].up.to(like), strength * changes[name].scale)
                for changes, strength in loras
                if name in changes
            ]
            handles.append(layers[name].register_forward_hook(partial(_add_changes, factors)))
        handles.append(layers["embeddings.token_embedding"].register_forward_hook(place))
        yield
    finally:
        for handle in handles:
            handle.remove()
