"""AdamW with groups and a schedule of the learning rate, shared by all tasks."""

import math
from collections.abc import Callable

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vision_lowrank.adapters.lora_plus import lora_plus_groups
from vision_lowrank.errors import ConfigError, TrainingError

# 2^32, of which a seed's remainder is what counts, by the golden ratio: seeds of a thousand accumulated batches and a
# million steps do not meet
BATCHES_APART = 2_654_435_769


def warmup_cosine(total_steps: int, warmup: float) -> Callable[[int], float]:
    """Returns the factor on the learning rate: a line from 0 to 1, then half a cosine to 0 after the last step.

    Args:
        total_steps: length of training in optimiser steps.
        warmup: share of it that the line takes.

    Raises:
        ConfigError: the warm-up is no share of training.
    """
    if not 0 <= warmup < 1:
        raise ConfigError(f"task.warmup is {warmup}; give a share of training from 0 up to, but not, 1")
    rise = max(1, round(warmup * total_steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, total_steps - rise))))

    return factor


def check_optimisation(learning_rate: float, weight_decay: float, warmup: float) -> None:
    """Refuses settings of a task that no training could begin with.

    Raises:
        ConfigError: rate or decay is negative, or the warm-up is no share of training.
    """
    if not 0 <= learning_rate < math.inf:
        raise ConfigError(f"task.learning_rate is {learning_rate}; give a number from 0 up")
    if not 0 <= weight_decay < math.inf:
        raise ConfigError(f"task.weight_decay is {weight_decay}; give a number from 0 up")
    warmup_cosine(1, warmup)


def check_loss(epoch: int, loss: float) -> None:
    """Ends a training that went astray.

    Raises:
        TrainingError: the loss of the epoch, counted from 0, is not finite.
    """
    if not math.isfinite(loss):
        raise TrainingError(
            f"epoch {epoch + 1}: the training loss is {loss}; lower task.learning_rate, or train with "
            "trainer.precision=32-true"
        )


def adamw(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    factor: Callable[[int], float],
    betas: tuple[float, float] = (0.9, 0.999),
    rate_ratio: float | None = None,
    fused: bool = False,
) -> OptimizerLRSchedulerConfig:
    """Returns what `configure_optimizers` of a LightningModule returns: AdamW, its rate scheduled a step at a time.

    Parameters with one axis and those that `model.no_weight_decay()` names are not decayed; frozen ones take no part.
    With `rate_ratio` the factors B of the model's LoRAs learn so many times as fast, see `lora_plus_groups`. `fused`
    updates a parameter in one pass over memory on processors too, the same but for rounding; such a task has to be a
    `ClippedFused`.

    Raises:
        AdapterError: a ratio below 1, or for a model without such factors.
    """
    if rate_ratio is None:
        spare = getattr(model, "no_weight_decay", tuple)
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=spare())
    else:
        groups = lora_plus_groups(model, learning_rate, rate_ratio, weight_decay)
    groups = [group for group in groups if group["params"]]
    # on other devices PyTorch knows best
    on_processor = next(model.parameters()).device.type == "cpu"
    optimizer = AdamW(groups, lr=learning_rate, betas=betas, fused=True if fused and on_processor else None)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def seed_batch(task: L.LightningModule, seed: int, batch_index: int) -> None:
    """Seeds torch's generator by step and batch alone, so that a resumed run draws what the uninterrupted one drew.

    Batches whose gradients are accumulated to one step draw each its own; the first of them as if it were the only one.

    Args:
        task: in training.
        seed: of the task, and of the process where each is to draw its own.
        batch_index: in the epoch.
    """
    within = batch_index % task.trainer.accumulate_grad_batches
    torch.manual_seed(seed + task.global_step + BATCHES_APART * within)


class ClippedFused(L.LightningModule):
    """A task whose gradients can be clipped before a fused step."""

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by norm before a fused step too: Lightning refuses it, for the sake of scaled gradients."""
        if gradient_clip_val and optimizer.defaults["fused"] and gradient_clip_algorithm in (None, "norm"):
            self.trainer.precision_plugin.clip_grad_by_norm(optimizer, gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
