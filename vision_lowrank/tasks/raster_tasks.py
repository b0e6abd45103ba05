"""Training of any encoder on a task of rasters: one class an image, several labels an image, or one class a pixel.

    image (B, C, H, W), wavelengths (B, C), gsd (B,) -> encoder -> (B, D) or (B, D, h, w)
    -> head -> (B, K) or (B, K, H, W); UPerNet takes four maps (B, D, h, w)

`B` batch, `C` channels, `H W` pixels, `D` width, `h w` patches of `p` by `p` pixels, `K` classes.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from vision_lowrank.adapters import freeze_statistics
from vision_lowrank.data.augmentation import SYMMETRIES, apply_symmetry
from vision_lowrank.data.scene import IGNORE
from vision_lowrank.errors import ConfigError, DataError, TrainingError
from vision_lowrank.evaluation.task_metrics import METRICS, Kind, image_confusion, score_task
from vision_lowrank.models.encoders import (
    Encoder,
    checked_image_features,
    checked_patch_features,
    checked_patch_maps,
)
from vision_lowrank.models.heads import LinearSegmentationHead, UPerNetHead
from vision_lowrank.tasks.optimisation import adamw, seed_batch, warmup_cosine
from vision_lowrank.tasks.scene_classification import CHOICE

# where a batch has its targets, by the kind of its task
TARGETS: dict[Kind, str] = {"classification": "label", "multilabel": "labels", "segmentation": "mask"}
# numbers that `evaluation.task_metrics` scores, and the targets to score them by, where these are not in them
Outcome: TypeAlias = tuple[np.ndarray, np.ndarray | None]
# the first of the symmetries are the flips, which leave height and width as they are
_FLIPS = 4
# samples that a message names
_NAMED = 8


class RasterModel(nn.Module):
    """An encoder with a head: a linear layer on an image's features, or on each patch's for its pixels; or UPerNet.

    Args:
        encoder: an `nn.Module` that is prepared for the task's channels.
        kind: classification, multilabel or segmentation.
        num_classes: number of logits K.
        head: linear; or, for segmentation, upernet, on four maps of the encoder.

    Raises:
        ConfigError: the kind is none of these, or has no such head.
    """

    def __init__(self, encoder: Encoder, kind: Kind, num_classes: int, head: str = "linear") -> None:
        super().__init__()
        if kind not in TARGETS:
            raise ConfigError(f"the kind of a task is {kind!r}; it can be {', '.join(TARGETS)}")
        self.encoder: Any = encoder
        self.kind = kind
        self.num_classes = num_classes
        self.head: nn.Module
        if head == "upernet" and kind == "segmentation":
            self.head = UPerNetHead([self.encoder.dim] * 4, num_classes, self.encoder.patch_size)
        elif head != "linear":
            raise ConfigError(f"head is {head!r} for {kind}; it can be linear, for segmentation upernet too")
        elif kind == "segmentation":
            self.head = LinearSegmentationHead(self.encoder.dim, num_classes, self.encoder.patch_size)
        else:
            self.head = nn.Linear(self.encoder.dim, num_classes)

    def forward(self, image: Tensor, wavelengths: Tensor, gsd: Tensor | float) -> Tensor:
        """Returns logits (B, K) or (B, K, H, W).

        Args:
            image: (B, C, H, W), normalised.
            wavelengths: nanometres (C,) or (B, C).
            gsd: metres a pixel, one for all or (B,).

        Raises:
            ConfigError: what the encoder returns is not of the shape that it promises.
        """
        if self.kind != "segmentation":
            return cast(Tensor, self.head(checked_image_features(self.encoder, image, wavelengths, gsd)))
        features = checked_patch_maps if isinstance(self.head, UPerNetHead) else checked_patch_features
        logits: Tensor = self.head(features(self.encoder, image, wavelengths, gsd))
        return logits[..., : image.shape[-2], : image.shape[-1]]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters that any part of the encoder wants left alone by weight decay."""
        return {
            f"{path}.{name}"
            for path, module in self.named_modules()
            if module is not self and hasattr(module, "no_weight_decay")
            for name in module.no_weight_decay()
        }


def raster_loss(logits: Tensor, target: Tensor, kind: Kind) -> Tensor:
    """Returns the mean loss of a batch, in float32.

    Args:
        logits: (B, K), or (B, K, H, W) for segmentation.
        target: classes int64 (B,); labels float (B, K) of 0 and 1; or classes int64 (B, H, W).
        kind: "multilabel" is scored label by label; otherwise pixels of the class `IGNORE` do not count, and a batch
            of nothing else has the loss 0.
    """
    logits = logits.float()
    if kind == "multilabel":
        return F.binary_cross_entropy_with_logits(logits, target.float())
    if kind == "segmentation":
        # as rows, since the sum over maps is not repeatable on a GPU
        logits, target = rearrange(logits, "b k h w -> (b h w) k"), target.flatten()
    total = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp(min=1)


class RasterTask(L.LightningModule):
    """Trains what requires gradients in a model, under random flips and quarter turns; AdamW, warm-up and cosine.

    An encoder without trainable parameters stays in evaluation mode. Everything random comes from torch's generator,
    which each step seeds anew, so that a run, resumed or not, repeats. Checkpoints leave frozen parameters out: who
    loads one has the model that training started from. Meant for one device.

    Args:
        model: to train.
        metric: a name of `evaluation.task_metrics.score_task`, logged as `val/<metric>`.
        learning_rate: highest rate.
        weight_decay: of matrices and kernels.
        warmup: share of training in which the rate rises.

    Attributes:
        history: one mapping a finished epoch: epoch, loss, validation metric, choice, rate, seconds.

    Raises:
        ConfigError: the model's kind of task has no such metric.
    """

    def __init__(
        self, model: RasterModel, metric: str, learning_rate: float, weight_decay: float, warmup: float
    ) -> None:
        super().__init__()
        if metric not in METRICS[model.kind]:
            raise ConfigError(f"metric {metric!r} is not one of {model.kind}: {', '.join(METRICS[model.kind])}")
        self.model = model
        self.metric = metric
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.seed = torch.initial_seed()
        self.history: list[dict[str, float]] = []
        self._validated: list[Outcome] = []
        self._started = 0.0

    def train(self, mode: bool = True) -> "RasterTask":
        """Sets the mode; what is frozen keeps its statistics, and a frozen encoder is evaluated without dropout."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.model.encoder.parameters()):
            self.model.encoder.eval()
        freeze_statistics(self.model)
        return self

    def _logits(self, batch: Mapping[str, Tensor], split: str) -> Tensor:
        """Maps a batch of a split to logits (B, K) or (B, K, H, W) in float32.

        Raises:
            DataError: an image holds NaN or infinite values.
            TrainingError: the logits do.
        """
        image = batch["image"]
        logits: Tensor = self.model(image, batch["wavelengths"], batch["gsd"]).float()
        if not logits.isfinite().all():
            if damaged := _not_finite(image, batch["index"]):
                raise DataError(
                    f"{split} sample {damaged}: the image holds NaN or infinite values; mend it or leave it out"
                )
            raise TrainingError(
                f"epoch {self.current_epoch + 1}, {split} sample {_not_finite(logits, batch['index'])}: the output of "
                f"the model trained at a rate of {self.learning_rate:g} is not finite; lower the rate, or train with "
                "precision=32-true"
            )
        return logits

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """Returns the loss of a batch.

        Args:
            batch: `image` (B, C, H, W), `wavelengths` (B, C), `gsd` (B,), the samples' numbers `index` (B,), and
                `label` (B,), `labels` (B, K) or `mask` (B, H, W).
            batch_index: not used.
        """
        image, target = batch["image"], batch[TARGETS[self.model.kind]]
        square = image.shape[-1] == image.shape[-2]
        turns = torch.randint(SYMMETRIES if square else _FLIPS, (len(image),)).tolist()
        if self.model.kind == "segmentation":
            target = _turn(target, turns)
        logits = self._logits({**batch, "image": _turn(image, turns)}, "training")
        loss = raster_loss(logits, target, self.model.kind)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(image))
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        """Collects predictions of validation samples."""
        predictions, targets = self._outcome(batch, "validation")
        if self.model.kind == "segmentation":
            # the metric is of the sum, and matrices of a large validation set would fill the memory
            predictions = predictions.sum(0, keepdims=True)
        self._validated.append((predictions, targets))

    def predict_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Outcome:
        """Returns what `evaluation.task_metrics` scores of a batch, with its targets.

        Classes (B,) and classes; probabilities (B, K) and labels; or confusion matrices (B, K, K) and None.
        """
        return self._outcome(batch, "test")

    def _outcome(self, batch: Mapping[str, Tensor], split: str) -> Outcome:
        logits, target = self._logits(batch, split), batch[TARGETS[self.model.kind]].cpu().numpy()
        if self.model.kind == "multilabel":
            return logits.sigmoid().cpu().numpy(), target
        classes = logits.argmax(1).cpu().numpy()
        if self.model.kind == "classification":
            return classes, target
        pairs = zip(classes, target, strict=True)
        return np.stack([image_confusion(*pair, self.model.num_classes) for pair in pairs]), None

    def on_fit_start(self) -> None:
        """Sets the mode, which the trainer leaves as it is, so that a frozen encoder would start in training mode."""
        self.train()

    def on_train_epoch_start(self) -> None:
        """Notes the time."""
        self._started = time.perf_counter()

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        """Ties turns and dropout to step and batch, so that a resumed run draws what the uninterrupted one drew."""
        seed_batch(self, self.seed, batch_index)

    def on_validation_epoch_start(self) -> None:
        """Forgets what an interrupted validation may have left."""
        self._validated.clear()

    def on_validation_epoch_end(self) -> None:
        """Logs the metric and what the kept epoch is chosen by.

        The best one is kept, and of equals the latest, since late epochs, with their small rate, are the steadier.
        """
        scores = score_task(self.model.kind, *join(self._validated), self.model.num_classes)
        # in the precision of the history, so that equals are equal
        score = float(np.float32(scores[self.metric]))
        good = all(score >= row[f"val/{self.metric}"] for row in self.history)
        self.log(f"val/{self.metric}", score, prog_bar=True)
        self.log(CHOICE, float(self.current_epoch + 1) if good else 0.0)

    def on_train_epoch_end(self) -> None:
        """Adds a line to the history."""
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        seconds = time.perf_counter() - self._started
        epoch = float(self.current_epoch + 1)
        self.history.append({"epoch": epoch, **metrics, "learning rate": rate, "seconds": seconds})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the history to a checkpoint, as plain numbers, and leaves frozen parameters out of it."""
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        checkpoint["state_dict"] = {
            name: value for name, value in checkpoint["state_dict"].items() if name not in frozen
        }
        checkpoint["history"] = self.history
        checkpoint["raster"] = self.model.kind

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with the history of a checkpoint, and puts this model's frozen parameters into it."""
        self.history = list(checkpoint["history"])
        checkpoint["state_dict"] = {**self.state_dict(), **checkpoint["state_dict"]}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Returns AdamW whose rate rises and falls once."""
        factor = warmup_cosine(int(self.trainer.estimated_stepping_batches), self.warmup)
        return adamw(self.model, self.learning_rate, self.weight_decay, factor)


def join(outcomes: Sequence[Outcome]) -> Outcome:
    """Returns predictions and targets of all batches, one after another."""
    targets = [target for _, target in outcomes if target is not None]
    return np.concatenate([found for found, _ in outcomes]), np.concatenate(targets) if targets else None


def _turn(x: Tensor, turns: Sequence[int]) -> Tensor:
    """Applies to each of (B, ..., H, W) the symmetry of its index."""
    return torch.stack([apply_symmetry(one, index) for one, index in zip(x, turns, strict=True)])


def _not_finite(values: Tensor, numbers: Tensor) -> str:
    """Names the samples whose values (B, ...) are not all finite, of the samples with these numbers (B,)."""
    found = numbers[~values.isfinite().flatten(1).all(1)].tolist()
    return ", ".join(map(str, found[:_NAMED])) + (", …" if len(found) > _NAMED else "")
