"""Composition of many scenes by prediction of Lightning: spread over devices, and resumed where it was stopped."""

import math
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.strategies import DDPStrategy, Strategy
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from vision_lowrank.composer.methods import Plan
from vision_lowrank.composer.render import decode, draw_noise, seeded
from vision_lowrank.errors import ConfigError
from vision_lowrank.memory import PeakMemory
from vision_lowrank.processes import current_place, share_of
from vision_lowrank.runs import atomic_path, write_json

# timesteps that models of diffusion are trained with
MOST_STEPS = 1000
# that a device waits for the others at the end: their jobs can be longer than its own
LONGEST_WAIT = timedelta(days=1)


@dataclass(frozen=True)
class Job:
    """Images of one scene by one method, made together.

    Args:
        folder: where they go.
        name: of the scene.
        plan: the scene, encoded.
        height: of the images in pixels.
        width: of the images in pixels.
        seeds: one an image.
        steps: of denoising.
        guidance_scale: of the positive over the negative prompt.
    """

    folder: Path
    name: str
    plan: Plan
    height: int
    width: int
    seeds: Sequence[int]
    steps: int
    guidance_scale: float

    @property
    def images(self) -> list[Path]:
        """A file for each seed."""
        return [self.folder / f"{self.name}-seed{seed}.png" for seed in self.seeds]

    @property
    def record(self) -> Path:
        """The file that is written last: seconds, memory and losses."""
        return self.folder / f"{self.name}.json"

    @property
    def done(self) -> bool:
        """Whether the images are there."""
        return self.record.is_file() and all(path.is_file() for path in self.images)


class Composition(L.LightningModule):
    """Composes a job a step and writes its files; jobs that are done already are left out.

    `Trainer(..., use_distributed_sampler=False).predict(task)` needs no loader. Each device takes its share of the
    jobs, which can be empty.

    Args:
        pipeline: of diffusers; the base model.
        jobs: what to compose.
    """

    def __init__(self, pipeline: Any, jobs: Sequence[Job]) -> None:
        super().__init__()
        self.pipeline = pipeline
        # registered here, so that they go to each process's device
        self.networks = nn.ModuleList(part for part in pipeline.components.values() if isinstance(part, nn.Module))
        self.jobs = jobs
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def predict_dataloader(self) -> DataLoader[int]:
        """Returns the numbers of this device's share of the jobs that are not done."""
        # one process looks for all: what the others find later would no longer be the same list
        left = self.trainer.strategy.broadcast([number for number, job in enumerate(self.jobs) if not job.done])
        numbers: Any = share_of(left, current_place())
        return DataLoader(numbers, batch_size=None)

    def predict_step(self, number: int, batch_index: int) -> int:
        """Composes one job and returns its number; the record comes last, so that what is cut short is done again."""
        if self.trainer.received_sigterm:
            # Lightning notes the signal, and looks at it in training only
            raise SystemExit(128 + signal.SIGTERM)
        job, pipeline = self.jobs[number], self.pipeline
        generators = seeded(job.seeds)
        noise = draw_noise(pipeline, job.height, job.width, generators)
        started = time.perf_counter()
        with PeakMemory(noise.device) as memory:
            settings = (job.steps, job.guidance_scale, generators)
            found = job.plan.compose(pipeline.unet, pipeline.scheduler, noise, *settings)
            images = decode(pipeline, found.latents)
        seconds = time.perf_counter() - started
        for path, image in zip(job.images, images, strict=True):
            with atomic_path(path) as temporary:
                Image.fromarray(image).save(temporary, format="PNG")
        # NaN, where an image took no step along the gradient, is not JSON
        losses = [[None if math.isnan(value) else value for value in row] for row in found.losses.tolist()]
        facts = {"seeds": list(job.seeds), "seconds": seconds, "peak_megabytes": memory.megabytes, "losses": losses}
        write_json(job.record, facts)
        return number


def check_sampling(where: str, steps: Any, guidance_scale: Any) -> None:
    """Refuses numbers that no sampling could be done with.

    Args:
        where: what they belong to, for messages.
        steps: of sampling.
        guidance_scale: of guidance without a classifier.

    Raises:
        ConfigError: the steps are no whole number from 1 to `MOST_STEPS`, or the scale is no finite number.
    """
    if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
        raise ConfigError(f"{where}: steps={steps}: give a whole number from 1 to {MOST_STEPS}")
    if type(guidance_scale) not in (int, float) or not math.isfinite(guidance_scale):
        raise ConfigError(f"{where}: guidance_scale={guidance_scale}: give a finite number")


def run_jobs(pipeline: Any, jobs: Sequence[Job], device: str, devices: int = 1, precision: str = "32-true") -> None:
    """Runs jobs on some devices, with a progress bar where there are several; returns when all of them are done.

    Args:
        pipeline: of diffusers; the base model.
        jobs: what to compose.
        device: "cpu", "cuda" and the like.
        devices: how many of them.
        precision: Lightning's; "32-true" leaves each weight the type that it has.
    """
    left = sum(not job.done for job in jobs)
    if not left:
        return
    bar: list[Callback] = [RichProgressBar()] if left > 1 else []
    strategy: str | Strategy = DDPStrategy(timeout=LONGEST_WAIT) if devices > 1 else "auto"
    accelerator = "gpu" if device.startswith("cuda") else device
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        use_distributed_sampler=False,
        precision=cast(Any, precision),
        callbacks=bar,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=bool(bar),
        enable_model_summary=False,
        # the method needs gradients
        inference_mode=False,
    )
    trainer.predict(Composition(pipeline, jobs), return_predictions=False)
    if trainer.interrupted:
        raise KeyboardInterrupt
    # what is made of the jobs needs those of all devices
    trainer.strategy.barrier()
