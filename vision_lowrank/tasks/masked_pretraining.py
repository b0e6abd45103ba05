"""Masked reconstruction of a scene without labels, which makes the base that adapters are trained on."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from vision_lowrank.data.augmentation import random_symmetries
from vision_lowrank.tasks.optimisation import adamw, warmup_cosine


class MaskedPretraining(L.LightningModule):
    """Hides pixels and components of patches; the model's last map has to tell what was there.

    A share of the pixels loses its whole spectrum and a share of the remaining values is hidden by itself, so that both
    the neighbours and the rest of the spectrum have to be used. A linear layer reads each position of the map; the loss
    is the mean square over hidden values, in standardised units (1 is what predicting the mean costs).

    Args:
        model: has `forward_features` from (batch, channels, side, side) to (batch, map, map, width).
        channels: components or bands of a patch.
        learning_rate: highest rate.
        weight_decay: of matrices and kernels.
        warmup: share of training in which the rate rises.
        masked_pixels: share of the pixels that are hidden.
        masked_values: share of the other pixels' values that are hidden.
    """

    def __init__(
        self,
        model: Any,
        channels: int,
        learning_rate: float,
        weight_decay: float,
        warmup: float,
        masked_pixels: float,
        masked_values: float,
    ) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.masked_pixels = masked_pixels
        self.masked_values = masked_values
        self.decoder = nn.LazyLinear(channels)
        self.history: list[dict[str, float]] = []

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """Returns the loss of a batch {"image": (batch, channels, side, side)}."""
        image = random_symmetries(batch["image"])
        scale = image.std((0, 2, 3), keepdim=True) + 1e-6
        pixels = torch.rand_like(image[:, :1]) < self.masked_pixels
        hidden = pixels | (torch.rand_like(image) < self.masked_values)
        features = self.model.forward_features(image.masked_fill(hidden, 0))
        # each position of the map speaks for the pixels around its centre
        predicted = F.interpolate(self.decoder(features.float()).permute(0, 3, 1, 2), image.shape[-2:], mode="bilinear")
        loss = (((predicted - image) / scale).square() * hidden).sum() / hidden.sum()
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(image), sync_dist=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """Adds a line to the history."""
        loss = float(self.trainer.callback_metrics["train/loss"])
        self.history.append({"epoch": float(self.current_epoch + 1), "train/loss": loss})

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Returns AdamW whose rate rises and falls once."""
        factor = warmup_cosine(int(self.trainer.estimated_stepping_batches), self.warmup)
        return adamw(self, self.learning_rate, self.weight_decay, factor)
