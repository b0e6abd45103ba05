"""Training of a text-to-image pipeline of diffusers: velocity prediction, weights limited by min-SNR, averaged weights.

diffusers is imported by who builds the pipeline, not here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from vision_lowrank.errors import ConfigError
from vision_lowrank.models.layers.fused_attention import FusedAttention
from vision_lowrank.processes import SEEDS_APART
from vision_lowrank.tasks.optimisation import ClippedFused, adamw, check_loss, check_optimisation, seed_batch


def rise_hold_fall(total_steps: int, warmup: float, cooldown: float) -> Callable[[int], float]:
    """Returns the factor on the learning rate: a line from 0 to 1, 1, and a line to 0 after the last step.

    A run that is resumed with fewer epochs left than planned still cools down.

    Args:
        total_steps: length of training in optimiser steps.
        warmup: share of it that the first line takes.
        cooldown: share of it that the last line takes.

    Raises:
        ConfigError: the shares are negative or more than 1 together.
    """
    if min(warmup, cooldown) < 0 or warmup + cooldown > 1:
        raise ConfigError(
            f"task.warmup={warmup} and task.cooldown={cooldown}: give shares of training, at most 1 together"
        )
    rise, fall = max(1, round(warmup * total_steps)), max(1, round(cooldown * total_steps))

    def factor(step: int) -> float:
        return max(0.0, min(1.0, (step + 1) / rise, (total_steps - step) / fall))

    return factor


class TextToImage(ClippedFused):
    """Trains UNet and text encoder of a pipeline to tell velocities of noised images from captions.

    An image x0 noised to a x0 + s e has the velocity a e - s x0 (progressive distillation, arXiv 2202.00512), whose
    squared error is that of x0 times SNR + 1, with SNR = a^2 / s^2; the weight on x0 is limited to `min_snr` (after
    min-SNR, arXiv 2303.09556), so that details of nearly clean images do not outweigh what is where.

    Everything random comes from torch's generator, which each step seeds anew, so that a run, resumed or not, repeats.

    Args:
        pipeline: of diffusers, with a scheduler that predicts velocities; what requires gradients in it is trained.
        learning_rate: highest rate.
        weight_decay: of matrices.
        warmup: share of training in which the rate rises.
        cooldown: share of training in which it falls.
        min_snr: limit of the weight on x0.
        dropout: share of captions that are left out, for guidance without a classifier.
        average: share of the averaged weights that a step keeps; less in the first steps. None keeps no average.

    Attributes:
        history: one mapping a finished epoch: epoch, step, loss, rate.

    Raises:
        ConfigError: an option is out of range.
    """

    signal: Tensor
    noise: Tensor

    def __init__(
        self,
        pipeline: Any,
        learning_rate: float,
        weight_decay: float,
        warmup: float,
        cooldown: float,
        min_snr: float = 5.0,
        dropout: float = 0.1,
        average: float | None = 0.999,
    ) -> None:
        super().__init__()
        if pipeline.scheduler.config.prediction_type != "v_prediction":
            raise ConfigError(
                f"the scheduler predicts {pipeline.scheduler.config.prediction_type}; this task trains v_prediction"
            )
        if not 0 <= dropout < 1 or min_snr <= 0 or not (average is None or 0 <= average < 1):
            raise ConfigError(
                f"task.dropout={dropout}, min_snr={min_snr}, average={average}: shares are from 0 up to, but not, 1, "
                "and min_snr is positive"
            )
        self.pipeline = pipeline
        self.networks = nn.ModuleDict({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder})
        self.averaged = None if average is None else _averaged(self.networks, average)
        check_optimisation(learning_rate, weight_decay, warmup)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.cooldown = cooldown
        self.min_snr = min_snr
        self.dropout = dropout
        scheduler = pipeline.scheduler
        self.register_buffer("signal", scheduler.alphas_cumprod.sqrt(), persistent=False)  # (times,)
        self.register_buffer("noise", (1 - scheduler.alphas_cumprod).sqrt(), persistent=False)
        self.seed = torch.initial_seed()
        self.history: list[dict[str, float]] = []

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Returns the text encoder's states (B, tokens, width), of prompts filled up to full length as in use."""
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids
        states: Tensor = self.networks["text_encoder"](ids.to(self.device)).last_hidden_state
        return states

    def loss(self, image: Tensor, captions: Sequence[str], times: Tensor, noise: Tensor) -> Tensor:
        """Returns the weighted mean squared error of the velocities.

        Args:
            image: (B, 3, height, width) from -1 to 1.
            captions: B texts.
            times: int64 (B,) steps of the schedule.
            noise: standard normal, of the latents' shape.
        """
        latents = self.pipeline.vae.encode(image)
        signal, deviation = (table[times, None, None, None] for table in (self.signal, self.noise))
        with FusedAttention():
            velocity = self.networks["unet"](
                signal * latents + deviation * noise, times, encoder_hidden_states=self.encode(captions)
            ).sample
        errors = F.mse_loss(velocity.float(), signal * noise - deviation * latents, reduction="none").mean((1, 2, 3))
        # SNR + 1 = 1 / deviation^2, since the squares of signal and deviation add up to 1
        return (errors * (self.min_snr * self.noise[times].square()).clamp(max=1)).mean()

    def training_step(self, batch: Mapping[str, Any], batch_index: int) -> Tensor:
        """Returns the loss of a batch {"image": (B, 3, height, width), "caption": B texts}."""
        image = batch["image"]
        count = len(image)
        captions = [
            "" if left_out else caption
            for caption, left_out in zip(batch["caption"], torch.rand(count) < self.dropout, strict=True)
        ]
        # one time from each of B equal parts of the schedule: less variance than independent ones
        shares = (torch.arange(count) + torch.rand(count)) / count
        times = (shares * len(self.signal)).long().to(self.device)
        noise = torch.randn_like(self.pipeline.vae.encode(image))
        loss = self.loss(image, captions, times, noise)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=count, sync_dist=True)
        return loss

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        """Ties everything random to step and batch, so that a resumed run draws what the uninterrupted one drew."""
        seed_batch(self, self.seed + SEEDS_APART * (1 + self.global_rank), batch_index)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        """Averages the weights after each step, which several batches may have been accumulated to."""
        if self.averaged is not None and self.averaged.n_averaged < self.global_step:
            self.averaged.update_parameters(self.networks)

    def on_train_epoch_end(self) -> None:
        """Adds a line to the history.

        Raises:
            TrainingError: the loss is not finite.
        """
        loss = float(self.trainer.callback_metrics["train/loss"])
        check_loss(self.current_epoch, loss)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        epoch = float(self.current_epoch + 1)
        self.history.append({"epoch": epoch, "step": self.global_step, "train/loss": loss, "learning rate": rate})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the history to a checkpoint, as plain numbers, and what tells that it is of this task."""
        checkpoint["history"] = self.history
        checkpoint["min_snr"] = self.min_snr

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with the history of a checkpoint."""
        self.history = list(checkpoint["history"])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Returns AdamW whose rate rises, stays and falls."""
        factor = rise_hold_fall(int(self.trainer.estimated_stepping_batches), self.warmup, self.cooldown)
        return adamw(self.networks, self.learning_rate, self.weight_decay, factor, fused=True)

    def averaged_pipeline(self) -> Any:
        """Returns a pipeline that shares the averaged networks, or the trained ones where no average is kept."""
        networks: Any = self.networks if self.averaged is None else self.averaged.module
        parts = {**self.pipeline.components, **dict(networks.items())}
        pipeline = type(self.pipeline)(**parts, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def _averaged(networks: nn.ModuleDict, decay: float) -> AveragedModel:
    """Returns an exponential moving average of the networks, the first steps of which forget sooner."""

    def average(averaged: Any, current: Any, count: Any) -> None:
        steps = float(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + steps) / (10 + steps)))

    model = AveragedModel(networks, multi_avg_fn=torch.no_grad()(average))
    return model.requires_grad_(False)
