"""Features of a task's samples by a frozen encoder, extracted once and kept by what they were made of."""

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from rich.progress import track
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from vision_lowrank.evaluation.metrics import IGNORE
from vision_lowrank.models.encoders import Encoder, checked_image_features, checked_patch_features
from vision_lowrank.runs import atomic_path
from vision_lowrank.tasks.raster_tasks import TARGETS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Features:
    """What a frozen encoder makes of samples.

    Attributes:
        values: of images float32 (n, dim), or of patches (n, h, w, dim) for segmentation.
        targets: classes (n,), labels (n, K), or masks (n, H, W).
        earlier_seconds: that an earlier call took to extract them, 0 where this one did.
    """

    values: np.ndarray
    targets: np.ndarray
    earlier_seconds: float = 0.0

    def patches(self, patch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns patches as rows (n h w, dim), and the labels of their pixels (n h w, patch_size^2).

        Args:
            patch_size: pixels along a side of a patch; those beyond the image are `IGNORE`.
        """
        rows, columns = (count * patch_size for count in self.values.shape[1:3])
        height, width = self.targets.shape[1:]
        masks = np.pad(self.targets, ((0, 0), (0, rows - height), (0, columns - width)), constant_values=IGNORE)
        labels = rearrange(masks, "n (i p) (j q) -> (n i j) (p q)", p=patch_size, q=patch_size)
        return self.values.reshape(-1, self.values.shape[-1]), labels


def extract(
    encoder: Encoder,
    samples: Any,
    kind: str,
    identity: Mapping[str, Any],
    cache: Path,
    batch_size: int,
    num_workers: int,
    device: str,
) -> Features:
    """Returns the features of samples, from `cache` where they were extracted before.

    Args:
        encoder: prepared, in evaluation mode, on `device`.
        samples: map-style data set; see `image_tasks.TaskData`.
        kind: of the task.
        identity: what tells this encoder from others, as JSON holds it.
        cache: folder.
        batch_size: samples at once.
        num_workers: processes that read samples.
        device: cpu or cuda.
    """
    about = {**identity, "samples": samples.fingerprint, "kind": kind, "layout": 3}
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    path = cache / f"{key}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as file:
            return Features(file["values"], file["targets"], float(file["seconds"]))
    values, targets = [], []
    started = time.perf_counter()
    loader = DataLoader(samples, batch_size, num_workers=num_workers)
    for batch in track(loader, f"features of {encoder.name}", transient=True):
        with torch.no_grad():
            values.append(_features(encoder, batch, kind, device).float().cpu().numpy())
        targets.append(batch[TARGETS[kind]].numpy())  # type: ignore[index]
    found = Features(np.concatenate(values), np.concatenate(targets))
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, values=found.values, targets=found.targets, seconds=time.perf_counter() - started)
    return found


def _features(encoder: Encoder, batch: Mapping[str, Tensor], kind: str, device: str) -> Tensor:
    inputs = [batch[name].to(device) for name in ("image", "wavelengths", "gsd")]
    if kind == "segmentation":
        return rearrange(checked_patch_features(encoder, *inputs), "b d h w -> b h w d")
    return checked_image_features(encoder, *inputs)


def count_gmacs(encoder: Encoder, samples: Any, kind: str, device: str) -> float:
    """Returns 1e9 multiply-adds of one sample's features, matrix products and convolutions only."""
    batch = {name: value[None] for name, value in samples[0].items()}
    # fused kernels of attention are not counted on every device
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        _features(encoder, batch, kind, device)
    return counter.get_total_flops() / 2e9


def weights_digest(module: nn.Module) -> str:
    """Returns the sha256 of names and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
