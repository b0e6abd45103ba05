"""Trainings that share a frozen stem and meet the same patches over and over: the stem computes each patch once.

Trainings of several methods, rates and seeds on one base, and the maps that they draw, differ only above the stem.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from hashlib import blake2b

import torch
from torch import Tensor, nn

from vision_lowrank.models.layers.spectral_stem import SpectralStem
from vision_lowrank.tasks.scene_classification import SceneClassification

# bytes of features above which a memory starts anew
LIMIT = 1 << 30
# patches that a stem computes at a time, never more nor fewer: kernels round differently from one size to another, and
# what is remembered must not depend on who asked first
CHUNK = 32


class StemMemory:
    """What a stem made of patches, found by their very bytes and the number format of the work."""

    def __init__(self) -> None:
        self._features: dict[tuple[bytes, torch.dtype], Tensor] = {}
        self._bytes = 0

    def recall(self, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Returns `compute(x)`, of which only patches not met before are computed.

        Args:
            compute: maps (batch, ...) to (batch, ...), each sample by itself.
            x: patches (batch, ...) without gradient.
        """
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        rows = x.detach().cpu().contiguous().numpy()
        keys = [(blake2b(row, digest_size=16).digest(), dtype) for row in rows]
        if self._bytes > LIMIT:
            self._features.clear()
            self._bytes = 0
        new = list({key: place for place, key in enumerate(keys) if key not in self._features}.values())
        for start in range(0, len(new), CHUNK):
            part = new[start : start + CHUNK]
            with torch.no_grad():
                # a copy, so that rows which only fill up the chunk are not held
                found = compute(x[part + part[:1] * (CHUNK - len(part))])[: len(part)].clone()
            self._features |= {keys[place]: row for place, row in zip(part, found, strict=True)}
            self._bytes += found.nbytes
        return torch.stack([self._features[key] for key in keys])


@lru_cache(maxsize=1)
def stem_memory(weights: bytes) -> StemMemory:
    """Returns the memory of the stem whose weights have this digest, for all trainings of the process."""
    return StemMemory()


class FrozenStemClassification(SceneClassification):
    """Trains as its parent does, to rounding, in a fraction of the time where a `SpectralStem` is frozen.

    A stem with anything to train in it, adapters among it, is applied as ever. Without `mixup` a training meets each
    patch in eight symmetries and no others; mixtures are all new, and would be remembered for nothing.
    """

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Maps a batch to logits (batch, num_classes) in float32."""
        stem = next((module for module in self.model.modules() if isinstance(module, SpectralStem)), None)
        if stem is None or any(parameter.requires_grad for parameter in stem.parameters()):
            return super().forward(batch)
        memory, compute = stem_memory(_digest(stem)), stem.forward
        # for this call alone: the model's weights keep their names, and its copies know of no memory
        stem.forward = lambda x: memory.recall(compute, x)  # type: ignore[method-assign]
        try:
            return super().forward(batch)
        finally:
            del stem.forward


def _digest(stem: nn.Module) -> bytes:
    digest = blake2b(digest_size=16)
    for name, value in stem.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().numpy())
    return digest.digest()
