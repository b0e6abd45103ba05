"""From a prepared scene to images: base models, noise by seed, sampling, decoding."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vision_lowrank.errors import CheckpointError, ConfigError


def load_base(folder_or_name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Loads a base model as a pipeline of diffusers.

    Args:
        folder_or_name: folder with `model_index.json`, or a name on the hub.
        dtype: of its weights.
        device: where they go.

    Raises:
        CheckpointError: it cannot be found, downloaded or read.
        ConfigError: it is neither Stable Diffusion 1 or 2 nor XL.
    """
    from diffusers import DiffusionPipeline

    # diffusers takes a folder's own classes only from modules that are imported already
    import vision_lowrank.composer.pipeline  # noqa: F401

    if Path(folder_or_name).is_dir() and not (Path(folder_or_name) / "model_index.json").is_file():
        raise CheckpointError(
            f"base {folder_or_name}: no model_index.json there; give the folder of a diffusers pipeline"
        )
    try:
        with _quiet_diffusers():
            pipeline: Any = DiffusionPipeline.from_pretrained(folder_or_name, torch_dtype=dtype)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"base {folder_or_name}: cannot be loaded ({reason[:300]}); give the folder of a diffusers pipeline, or a "
            "name on the hub where there is a network"
        ) from error
    check_base(pipeline, folder_or_name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Keeps diffusers from speaking of parts that are not its own, and of `torch_dtype`, which old versions need."""
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    verbosity = logging.get_verbosity()
    libraries = [library for library in (logging, transformers_logging) if library.is_progress_bar_enabled()]
    logging.set_verbosity_error()
    for library in libraries:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        for library in libraries:
            library.enable_progress_bar()


def check_base(pipeline: Any, name: str) -> None:
    """Refuses pipelines of other architectures.

    Raises:
        ConfigError: there is no UNet with cross-attention, or another text encoder than CLIP's.
    """
    unet = getattr(pipeline, "unet", None)
    kinds = {type(unet).__name__} | {
        type(getattr(pipeline, part)).__name__ for part in ("text_encoder", "text_encoder_2") if hasattr(pipeline, part)
    }
    if kinds not in (
        {"UNet2DConditionModel", "CLIPTextModel"},
        {"UNet2DConditionModel", "CLIPTextModel", "CLIPTextModelWithProjection"},
    ):
        raise ConfigError(
            f"base {name} is a {type(pipeline).__name__} of {', '.join(sorted(kinds))}; composition works with Stable "
            "Diffusion 1, 2 and XL"
        )


def latent_shape(pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
    """Returns channels, height and width of the latents of an image.

    Raises:
        ConfigError: latents do not cover the image exactly.
    """
    factor = pipeline.vae_scale_factor
    if height % factor or width % factor:
        raise ConfigError(f"an image of {height} x {width} pixels; this model makes multiples of {factor}")
    return pipeline.unet.config.in_channels, height // factor, width // factor


def seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    """Returns a generator on the processor for each seed: for `draw_noise`, and then for schedulers that add noise."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(pipeline: Any, height: int, width: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Draws noise (S, channels, height of the latent, its width), that of a seed the same on every device.

    Args:
        pipeline: the base model.
        height: of the image in pixels.
        width: of the image in pixels.
        generators: one an image.

    Raises:
        ConfigError: latents do not cover the image exactly.
    """
    shape = latent_shape(pipeline, height, width)
    noise = [torch.randn(shape, generator=generator) for generator in generators]
    return torch.stack(noise).to(pipeline.unet.device, pipeline.unet.dtype)


@torch.no_grad()
def decode(pipeline: Any, latents: Tensor) -> np.ndarray:
    """Turns finished latents into images, uint8 (S, height, width, 3).

    Raises:
        ConfigError: the autoencoder's pixels are not finite.
    """
    vae = pipeline.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    mean, deviation = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    # that of SDXL overflows in float16, and says so
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.float()
    try:
        latents = latents.to(vae.dtype)
        if mean is not None and deviation is not None:
            mean, deviation = (torch.tensor(values).to(latents).view(-1, 1, 1) for values in (mean, deviation))
            latents, shift = latents * deviation, shift + mean
        # one by one: the autoencoder's maps are the largest of all
        scaled = (latent[None] / vae.config.scaling_factor + shift for latent in latents)
        images = [vae.decode(latent, return_dict=False)[0] for latent in scaled]
    finally:
        if upcast:
            vae.half()
    found = torch.cat(images).float()
    if not found.isfinite().all():
        raise ConfigError("the autoencoder's pixels are not finite; compose in float32 or bfloat16")
    pixels = (found / 2 + 0.5).clamp(0, 1) * 255
    array: np.ndarray = pixels.round().byte().movedim(1, -1).cpu().numpy()
    return array
