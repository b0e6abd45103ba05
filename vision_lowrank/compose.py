"""Composes several LoRAs in one image: python -m vision_lowrank.compose scene=NAME [key=value ...]; see configs/."""

import logging
import time
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageDraw

from vision_lowrank.composer.methods import plan
from vision_lowrank.composer.render import decode, draw_noise, load_base
from vision_lowrank.composer.scene_files import LoadedScene, load_scene, make_settings
from vision_lowrank.console import run_as_command
from vision_lowrank.errors import ConfigError
from vision_lowrank.runs import atomic_path, start_run, write_csv, write_json

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

logger = logging.getLogger(__name__)


def run(config: DictConfig) -> Path:
    """Composes the images of a scene and returns the folder they are in.

    The folder has `SCENE-seedN.png`, `layout.png` (the first of them with the boxes), `losses.csv`, `metrics.json`,
    `config.yaml` and `provenance.json`.

    Raises:
        VisionLowRankError: the scene, its LoRAs, the base model or an option is wrong.
    """
    scene = load_scene(config.scene)
    options: Any = OmegaConf.to_container(config.settings, resolve=True)
    settings = make_settings({**scene.file.settings, **options}, f"scene {scene.name}")
    if config.dtype not in DTYPES:
        raise ConfigError(f"dtype={config.dtype}: it can be {', '.join(DTYPES)}")
    steps = scene.file.steps if config.steps is None else config.steps
    guidance_scale = scene.file.guidance_scale if config.guidance_scale is None else config.guidance_scale
    seeds = [config.seed] if config.seeds is None else list(config.seeds)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = load_base(scene.base, DTYPES[config.dtype], device)
    noise = draw_noise(pipeline, scene.file.height, scene.file.width, seeds)
    planned = plan(config.method, scene, pipeline, settings)
    folder = start_run(config, config.dtype, {})
    started = time.perf_counter()
    found = planned.compose(pipeline.unet, pipeline.scheduler, noise, steps, guidance_scale)
    images = decode(pipeline, found.latents)
    seconds = time.perf_counter() - started
    for seed, image in zip(seeds, images, strict=True):
        _save(Image.fromarray(image), folder / f"{scene.name}-seed{seed}.png")
    _save(draw_layout(images[0], scene), folder / "layout.png")
    losses = [
        {"step": step, **{f"seed {seed}": value for seed, value in zip(seeds, row, strict=True)}}
        for step, row in enumerate(found.losses.tolist())
    ]
    write_csv(folder / "losses.csv", losses)
    write_json(folder / "metrics.json", {"seconds": seconds, "seconds_per_image": seconds / len(seeds), "steps": steps})
    logger.info("%d image(s) in %.1f s, written to %s", len(seeds), seconds, folder)
    return folder


def draw_layout(image: np.ndarray, scene: LoadedScene) -> Image.Image:
    """Draws the boxes of a scene with their prompts over an image, uint8 (height, width, 3), at 512 pixels or more."""
    file = scene.file
    scale = max(1, -(-512 // max(file.height, file.width)))
    picture = Image.fromarray(image).resize((file.width * scale, file.height * scale), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    for region in file.regions:
        box = region.box
        edges = (box.left, box.top, box.right, box.bottom)
        sizes = (file.width, file.height) * 2 if max(edges) <= 1 else (1, 1, 1, 1)
        corners = [edge * size * scale for edge, size in zip(edges, sizes, strict=True)]
        pen.rectangle(corners, outline="white", width=3)
        pen.text((corners[0] + 6, corners[1] + 4), region.prompt, fill="white", stroke_width=2, stroke_fill="black")
    return picture


def _save(image: Image.Image, path: Path) -> None:
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


@hydra.main(config_path=str(CONFIGS), config_name="compose", version_base="1.3")
def main(config: DictConfig) -> None:
    """Composes what `config` describes; exits with status 2 after an error that the user can mend."""
    run_as_command(lambda: run(config))


if __name__ == "__main__":
    main()
