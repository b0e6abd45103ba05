"""Training without labels by reconstruction of what was hidden: of a scene's patches, or by Hyper-MAE."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from vision_lowrank.data.augmentation import (
    SYMMETRIES,
    apply_symmetry,
    check_shares,
    random_symmetries,
    sample_channels,
    sampled_count,
)
from vision_lowrank.errors import ConfigError
from vision_lowrank.models.hyper_mae import HyperMAE, Reconstruction, Seen
from vision_lowrank.models.less_vit import Patches
from vision_lowrank.processes import SEEDS_APART, current_place, draw_apart, total_over_processes
from vision_lowrank.sharding import shard
from vision_lowrank.tasks.optimisation import adamw, check_loss, check_optimisation, seed_batch, warmup_cosine


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

    Raises:
        ConfigError: an option is out of range.
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
        check_optimisation(learning_rate, weight_decay, warmup)
        if not (0 <= masked_pixels < 1 and 0 <= masked_values < 1 and masked_pixels + masked_values > 0):
            raise ConfigError(
                f"masked_pixels={masked_pixels}, masked_values={masked_values}: give shares from 0 up to, but not, 1, "
                "one of them above 0"
            )
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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the history to a checkpoint, as plain numbers, and what tells that it is of this task."""
        checkpoint["history"] = self.history
        checkpoint["masked_pixels"] = self.masked_pixels

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with the history of a checkpoint."""
        self.history = list(checkpoint["history"])

    def no_weight_decay(self) -> set[str]:
        """Returns the name of a weight that has its shape from the first batch, or, resumed, from the start."""
        return {"decoder.weight"}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Returns AdamW whose rate rises and falls once."""
        factor = warmup_cosine(int(self.trainer.estimated_stepping_batches), self.warmup)
        return adamw(self, self.learning_rate, self.weight_decay, factor)


PASSES: dict[str, tuple[Seen, ...]] = {
    "optical": ("optical",),
    "radar": ("radar",),
    "multi": ("multi",),
    "all": ("optical", "radar", "multi"),
}


class HyperMAEPretraining(L.LightningModule):
    """Hyper-MAE on tiles of any sensors (arXiv 2503.12843); AdamW with warm-up and cosine.

    Everything random (symmetries, channels, masks) comes from torch's generator, which each step seeds anew, so that a
    run, resumed or not, repeats exactly. Validation masks are the same in every epoch.

    Args:
        model: to train.
        learning_rate: highest rate.
        weight_decay: of matrices.
        warmup: share of training in which the rate rises.
        betas: of AdamW.
        modal_mode: what is seen in a step: optical, radar or multi channels; all: three passes whose losses are added;
            random: one of the three.
        channel_sampling: least and largest share of the channels that a training step uses at all, drawn anew for each
            step (the successor's hierarchical channel sampling); None for all channels.

    Attributes:
        history: one mapping a finished epoch: epoch, losses of training and validation by part, rate.

    Raises:
        ConfigError: an option is out of range.
    """

    def __init__(
        self,
        model: HyperMAE,
        learning_rate: float,
        weight_decay: float,
        warmup: float,
        betas: Sequence[float] = (0.9, 0.95),
        modal_mode: Literal["optical", "radar", "multi", "all", "random"] = "optical",
        channel_sampling: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if modal_mode not in (*PASSES, "random"):
            raise ConfigError(f"modal_mode is {modal_mode!r}; it can be {', '.join(PASSES)} or random")
        check_shares(channel_sampling)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"task.betas={list(betas)}: give two numbers from 0 up to, but not, 1")
        self.model = model
        check_optimisation(learning_rate, weight_decay, warmup)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.betas = (float(betas[0]), float(betas[1]))
        self.modal_mode = modal_mode
        self.channel_sampling = channel_sampling
        self.seed = torch.initial_seed()
        self.history: list[dict[str, float]] = []

    def configure_model(self) -> None:
        """Shares out the weights among the processes, with trainer=fsdp."""
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh["data_parallel"])

    def check_channels(self, name: str, count: int) -> None:
        """Refuses optical images of which a step could see no channel.

        Args:
            name: of their source, for errors.
            count: of their channels.

        Raises:
            ConfigError: the least share of `channel_sampling` and `channel_mask_ratio` leave none, or a pass sees radar
                alone.
        """
        if self.modal_mode not in ("optical", "multi"):
            raise ConfigError(
                f"task.modal_mode={self.modal_mode} sees radar, but of source {name} the images have none; use optical"
            )
        least = count if self.channel_sampling is None else sampled_count(count, self.channel_sampling[0])
        if self.model.visible_channels(least) < 1:
            raise ConfigError(
                f"source {name}: a step may have {least} of {count} channels, of which channel_mask_ratio "
                f"{self.model.channel_mask_ratio} leaves none visible; lower it, or raise the least share of "
                "task.channel_sampling"
            )

    def patches(self, batch: Mapping[str, Tensor]) -> tuple[Patches, Tensor]:
        """Cuts up a batch as `data.tile_module` gives it, perhaps with `radar` and `radar_wavelengths`.

        Returns:
            The patches, and which of their pixels have values, bool (batch, positions, pixels).
        """
        encoder = self.model.encoder
        radar = (batch.get("radar"), batch.get("radar_wavelengths"))
        patches = encoder.patches(batch["image"], batch["wavelengths"], batch["gsd"], *radar)
        height, width = batch["valid"].shape[-2:]
        # what only continues a tile to whole patches does not count
        rest = (0, -width % encoder.patch_size, 0, -height % encoder.patch_size)
        valid = F.pad(batch["valid"].unsqueeze(1).to(patches.pixels.dtype), rest)
        cut = encoder.cut(valid, batch["wavelengths"][:, :1], batch["gsd"], 1).pixels
        return patches, cut[:, 0] > 0

    def reconstruct(
        self, patches: Patches, valid: Tensor, modal_mode: str, generator: torch.Generator | None = None
    ) -> list[Reconstruction]:
        """Returns one reconstruction for each pass of a mode."""
        if modal_mode == "random":
            modal_mode = ("optical", "radar", "multi")[int(torch.randint(3, (), generator=generator))]
        passes = PASSES[modal_mode]
        noise = [self.model.draw_noise(patches, seen, generator, current_place()) for seen in passes]
        if self.training:
            # dropout, unlike masks, is each process's own
            draw_apart()
        return [self.model.reconstruct(patches, seen, drawn, valid) for seen, drawn in zip(passes, noise, strict=True)]

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """Returns the loss of a batch of tiles."""
        batch = sample_channels(_turn(batch), self.channel_sampling)
        losses = self._losses(self.reconstruct(*self.patches(batch), self.modal_mode))
        count = total_over_processes(len(batch["image"]), batch["image"].device)
        for name, value in losses.items():
            self.log(
                f"train/{name}", value, on_step=False, on_epoch=True, prog_bar=name == "loss",
                batch_size=count, sync_dist=True,
            )  # fmt: skip
        return losses["loss"]

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        """Logs the losses of held-out tiles, all channels used, under masks that depend on the batch's number only."""
        generator = torch.Generator().manual_seed(self.seed + SEEDS_APART - 1 - batch_index)
        losses = self._losses(self.reconstruct(*self.patches(batch), self.modal_mode, generator))
        # Lightning rounds the mean number of processes down: of these it is whole
        count = len(batch["image"]) * current_place()[1]
        for name, value in losses.items():
            self.log(f"val/{name}", value, prog_bar=name == "loss", batch_size=count, sync_dist=True)

    @staticmethod
    def _losses(passes: Sequence[Reconstruction]) -> dict[str, Tensor]:
        return {
            "loss": torch.stack([result.loss for result in passes]).sum(),
            "position loss": torch.stack([result.position_loss for result in passes]).sum(),
            "channel loss": torch.stack([result.channel_loss for result in passes]).sum(),
        }

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        """Ties everything random to step and batch, so that a resumed run draws what the uninterrupted one drew.

        Processes that train together draw the same, each for the whole batch.
        """
        seed_batch(self, self.seed + SEEDS_APART, batch_index)

    def on_train_epoch_end(self) -> None:
        """Adds a line to the history.

        Raises:
            TrainingError: the loss is not finite.
        """
        row = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        check_loss(self.current_epoch, row["train/loss"])
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.history.append({"epoch": float(self.current_epoch + 1), **row, "learning rate": rate})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the history to a checkpoint, as plain numbers, and what tells that it is of this task."""
        checkpoint["history"] = self.history
        checkpoint["modal_mode"] = self.modal_mode

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with the history of a checkpoint."""
        self.history = list(checkpoint["history"])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Returns AdamW whose rate rises and falls once."""
        factor = warmup_cosine(int(self.trainer.estimated_stepping_batches), self.warmup)
        return adamw(self.model, self.learning_rate, self.weight_decay, factor, self.betas)


def _turn(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Applies one random symmetry of the square to all that a batch shows of the ground."""
    index = int(torch.randint(SYMMETRIES, ()))
    shown = ("image", "radar", "valid")
    return {name: apply_symmetry(value, index) if name in shown else value for name, value in batch.items()}
