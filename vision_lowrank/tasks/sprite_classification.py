"""Training of the classifier of sprites."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from vision_lowrank.models.sprite_classifier import SpriteClassifier, crop
from vision_lowrank.tasks.optimisation import adamw, check_loss, check_optimisation, warmup_cosine


class SpriteClassification(L.LightningModule):
    """Cross-entropy on crops; AdamW with warm-up and cosine.

    Args:
        model: to train.
        learning_rate: highest rate.
        weight_decay: of matrices and kernels.
        warmup: share of training in which the rate rises.

    Attributes:
        history: one mapping a finished epoch: epoch, loss of training, accuracy on held-out crops.
    """

    def __init__(self, model: SpriteClassifier, learning_rate: float, weight_decay: float, warmup: float) -> None:
        super().__init__()
        self.model = model
        check_optimisation(learning_rate, weight_decay, warmup)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.history: list[dict[str, float]] = []

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """Returns the loss of a batch {"image": (B, 3, side, side), "box": (B, 4), "label": (B,)}, boxes in pixels."""
        logits = self.model(crop(batch["image"], batch["box"]))
        loss = F.cross_entropy(logits.float(), batch["label"], label_smoothing=0.05)
        count = len(batch["label"])
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=count, sync_dist=True)
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        """Logs the share of held-out crops that are told right."""
        right = (self.model(crop(batch["image"], batch["box"])).argmax(-1) == batch["label"]).float().mean()
        self.log("val/accuracy", right, prog_bar=True, batch_size=len(batch["label"]), sync_dist=True)

    def on_train_epoch_end(self) -> None:
        """Adds a line to the history.

        Raises:
            TrainingError: the loss is not finite.
        """
        row = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        check_loss(self.current_epoch, row["train/loss"])
        self.history.append({"epoch": float(self.current_epoch + 1), **row})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the history to a checkpoint, as plain numbers, and what tells that it is of this task."""
        checkpoint["history"] = self.history
        checkpoint["sprites"] = self.model.names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with the history of a checkpoint."""
        self.history = list(checkpoint["history"])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Returns AdamW whose rate rises and falls once."""
        factor = warmup_cosine(int(self.trainer.estimated_stepping_batches), self.warmup)
        return adamw(self.model, self.learning_rate, self.weight_decay, factor)
