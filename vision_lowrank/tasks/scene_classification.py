"""Training of a classifier of patches, or of all pixels of a window, in full or by adapters on a frozen base."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from vision_lowrank.adapters import CyclicalStrength, freeze_statistics, set_strength
from vision_lowrank.data.augmentation import SYMMETRIES, apply_symmetries, check_shares, mixup, sample_channels
from vision_lowrank.data.scene import IGNORE
from vision_lowrank.errors import ConfigError
from vision_lowrank.processes import (
    current_place,
    draw_apart,
    mean_over_processes,
    share_of,
    total_over_processes,
)
from vision_lowrank.tasks.optimisation import (
    ClippedFused,
    adamw,
    check_loss,
    check_optimisation,
    seed_batch,
    warmup_cosine,
)

# what the weights that are kept are chosen by, the larger the better
CHOICE = "val/choice"


def standard_error(accuracy: float, pixels: int) -> float:
    """Returns the standard error of an accuracy measured on so many pixels; of one of 0 or 1 too, by Laplace's rule."""
    share = (accuracy * pixels + 1) / (pixels + 2)
    return math.sqrt(share * (1 - share) / pixels)


class SceneClassification(ClippedFused):
    """Cross-entropy on patches or windows under random symmetries; AdamW with warm-up and cosine.

    A sample's label is its class, or a map of classes with `IGNORE` where a pixel does not count.

    With `cycles`, the strength of the model's adapters and their learning rate follow the cyclical schedule of
    LoLA-SpecViT; validation, test, prediction and what is saved have strength 1. Statistics of frozen normalisations
    stay as they are, with or without adapters.

    Args:
        model: maps what `inputs` name to logits (batch, num_classes) or (batch, num_classes, side, side); perhaps with
            adapters.
        class_counts: training pixels of each class.
        learning_rate: highest rate.
        weight_decay: of matrices and kernels.
        warmup: share of training in which the rate rises.
        label_smoothing: share of the target spread over all classes.
        balance: exponent b of the weight of a class in the loss, its training pixels to the power -b: 0 weighs pixels
            alike, 1 weighs classes alike.
        mixup: alpha of `data.augmentation.mixup`; training accuracies then compare with the larger share's class.
        cycles: settings of `CyclicalStrength` in epochs: `first_cycle`, `growth`, `minimum`; None without adapters, and
            for adapters that keep their strength.
        rate_ratio: how many times as fast the factors B of LoRAs learn (LoRA+); None for one rate.
        inputs: entries of a batch that the model takes: `image`, and of models of any sensor `wavelengths` and `gsd`.
        channel_sampling: see `data.augmentation.sample_channels`.

    Attributes:
        history: one mapping a finished epoch: epoch, loss and accuracy of training and validation, rate, strength.

    Raises:
        ConfigError: an option is out of range.
    """

    class_weights: Tensor

    def __init__(
        self,
        model: nn.Module,
        class_counts: Sequence[int],
        learning_rate: float,
        weight_decay: float,
        warmup: float,
        label_smoothing: float,
        balance: float,
        mixup: float,
        cycles: Mapping[str, Any] | None = None,
        rate_ratio: float | None = None,
        inputs: Sequence[str] = ("image",),
        channel_sampling: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_shares(channel_sampling)
        if not (0 <= label_smoothing < 1 and 0 <= mixup < math.inf and math.isfinite(balance)):
            raise ConfigError(
                f"task.label_smoothing={label_smoothing}, mixup={mixup}, balance={balance}: give a share below 1, a "
                "number from 0 up and a number"
            )
        self.model = model
        check_optimisation(learning_rate, weight_decay, warmup)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.label_smoothing = label_smoothing
        self.mixup = mixup
        self.cycles = cycles
        self.rate_ratio = rate_ratio
        self.inputs = tuple(inputs)
        self.channel_sampling = channel_sampling
        self.history: list[dict[str, float]] = []
        self.validation_pixels = 0
        self.strength: CyclicalStrength | None = None
        self.seed = torch.initial_seed()
        self._restored: dict[str, Any] | None = None
        counts = torch.tensor(class_counts, dtype=torch.float32)
        weights = counts.clamp(min=1).pow(-balance)
        self.register_buffer("class_weights", weights * counts.sum() / (weights * counts).sum(), persistent=False)
        num_classes = len(class_counts)
        scores = MetricCollection(
            {
                "OA": MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORE),
                "AA": MulticlassAccuracy(num_classes, average="macro", ignore_index=IGNORE),
            }
        )
        self.training_scores = scores.clone(prefix="train/")
        self.validation_scores = scores.clone(prefix="val/")

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Maps a batch to logits (batch, num_classes) or (batch, num_classes, side, side) in float32."""
        logits: Tensor = self.model(*(batch[name] for name in self.inputs))
        return logits.float()

    def train(self, mode: bool = True) -> "SceneClassification":
        """Sets the mode; normalisations of a frozen base stay in evaluation mode."""
        super().train(mode)
        if not all(parameter.requires_grad for parameter in self.model.parameters()):
            freeze_statistics(self.model)
        return self

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """Returns the loss of a batch of `image` (batch, channels, side, side) and `label`, see the class."""
        batch = sample_channels(batch, self.channel_sampling)
        label = batch["label"]
        place = current_place()
        turns = share_of(torch.randint(SYMMETRIES, (len(label) * place[1],)), place)
        # mixtures and dropout, unlike symmetries, are each process's own
        draw_apart()
        if label.ndim > 1:
            label = apply_symmetries(label, turns)
        image, partner, share = mixup(apply_symmetries(batch["image"], turns), self.mixup)
        logits = self({**batch, "image": image})
        loss = share * self._loss(logits, label) + (1 - share) * self._loss(logits, label[partner])
        self.training_scores.update(logits, label)
        count = total_over_processes(int((label != IGNORE).sum()), label.device)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=count, sync_dist=True)
        return loss

    def _loss(self, logits: Tensor, label: Tensor) -> Tensor:
        loss = F.cross_entropy(
            logits, label, self.class_weights, ignore_index=IGNORE, label_smoothing=self.label_smoothing
        )
        if current_place()[1] == 1:
            return loss
        # the mean is over all samples of the step, which do not weigh the same on all processes
        weight = self.class_weights[label[label != IGNORE]].sum()
        return loss * (weight / mean_over_processes(weight))

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        """Collects loss and scores of the validation pixels."""
        logits, label = self(batch), batch["label"]
        count = int((label != IGNORE).sum())
        self.validation_pixels += count
        self.validation_scores.update(logits, label)
        loss = F.cross_entropy(logits, label, ignore_index=IGNORE)
        # Lightning rounds the mean number of processes down: of these it is whole
        self.log("val/loss", loss, prog_bar=True, batch_size=count * current_place()[1], sync_dist=True)

    def on_fit_start(self) -> None:
        """Lays out the strength's cycles over the steps of this training."""
        # the trainer leaves modes as they are, so a frozen normalisation would start out in training mode
        self.train()
        if self.cycles is None:
            return
        total = int(self.trainer.estimated_stepping_batches)
        self.strength = CyclicalStrength(total, **self._cycles(total))
        if self._restored is not None:
            self.strength.load_state_dict(self._restored)

    def _cycles(self, total: int) -> dict[str, Any]:
        """Returns the settings of the cycles in optimiser steps."""
        settings = dict(self.cycles or {})
        settings["first_cycle"] = max(2, round(settings["first_cycle"] * total / (self.trainer.max_epochs or 1)))
        return settings

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        """Moves the strength of the adapters, and ties augmentation and dropout to step and batch.

        So a resumed run draws what the uninterrupted one drew, and each of several processes what one draws.
        """
        seed_batch(self, self.seed, batch_index)
        if self.strength is not None:
            # by steps of the optimiser, of which accumulated batches share one
            self.strength.step_count = self.global_step
            self.strength.step(self.model)

    def on_validation_epoch_start(self) -> None:
        """Evaluates, and lets checkpoints hold, the adapters at full strength."""
        if self.strength is not None:
            set_strength(self.model, 1.0)

    def on_validation_epoch_end(self) -> None:
        """Logs the scores of validation and what the kept epoch is chosen by.

        The latest epoch is kept whose overall accuracy is within one standard error of the best so far (the rule of
        Breiman et al. 1984 for choosing among models): a best one among hundred pixels is chance, and late epochs,
        with their small learning rate, are the steadier.
        """
        self.log_dict(self.validation_scores, prog_bar=True)
        accuracy = float(self.validation_scores.compute()["val/OA"])
        best = max([accuracy, *(row["val/OA"] for row in self.history)])
        pixels = self.trainer.strategy.reduce(torch.tensor(self.validation_pixels, device=self.device), reduce_op="sum")
        good = accuracy >= best - standard_error(best, int(pixels))
        self.log(CHOICE, float(self.current_epoch + 1) if good else 0.0, sync_dist=True)
        self.validation_pixels = 0

    def on_train_epoch_end(self) -> None:
        """Adds a line to the history.

        Raises:
            TrainingError: the loss is not finite.
        """
        metrics = {**self.trainer.callback_metrics, **self.training_scores.compute()}
        self.training_scores.reset()
        row = {"epoch": float(self.current_epoch + 1), **{name: float(value) for name, value in metrics.items()}}
        check_loss(self.current_epoch, row["train/loss"])
        row["learning rate"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        if self.strength is not None:
            row["strength"] = self.strength(self.strength.step_count - 1)
        self.history.append(row)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds history and strength to a checkpoint, as plain numbers."""
        checkpoint["history"] = self.history
        checkpoint["strength"] = None if self.strength is None else self.strength.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with the history and strength of a checkpoint."""
        self.history = list(checkpoint["history"])
        self._restored = checkpoint["strength"]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Returns AdamW; the rate falls in one cosine, or in the adapters' cycles."""
        total = int(self.trainer.estimated_stepping_batches)
        if self.cycles is None:
            factor: Callable[[int], float] = warmup_cosine(total, self.warmup)
        else:
            factor = CyclicalStrength(total, **self._cycles(total), warmup=round(self.warmup * total), rising=False)
        return adamw(self.model, self.learning_rate, self.weight_decay, factor, rate_ratio=self.rate_ratio, fused=True)
