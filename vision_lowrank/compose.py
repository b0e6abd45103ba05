"""Composes several LoRAs in one image: python -m vision_lowrank.compose scene=NAME [key=value ...]; see configs/."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from PIL import Image, ImageDraw

from vision_lowrank.composer.methods import plan
from vision_lowrank.composer.render import latent_shape, load_base
from vision_lowrank.composer.scene_files import LoadedScene, constants_of, load_scene, make_settings
from vision_lowrank.console import run_as_command, start
from vision_lowrank.errors import ConfigError
from vision_lowrank.precision import choose_device
from vision_lowrank.runs import atomic_path, check_command, checked_seeds, open_run, process_rank, write_csv, write_json
from vision_lowrank.shipped import CONFIGS
from vision_lowrank.tasks.composition import Job, check_sampling, run_jobs

# files that a run has beside those of its scenes
OWN_FILES = ("scenes", "metrics", "provenance")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

logger = logging.getLogger(__name__)


def run(config: DictConfig) -> Path:
    """Composes the images of one or several scenes and returns the folder they are in.

    The folder has, for each scene, `SCENE-seedN.png`, `SCENE-layout.png` (the first of them with the boxes),
    `SCENE-losses.csv` and `SCENE.json`, and `scenes.json`, `metrics.json`, `config.yaml` and `provenance.json`.

    Raises:
        VisionLowRankError: a scene, its LoRAs, the base model or an option is wrong.
    """
    check_command(config, settings=Mapping[str, Any] | None)
    names = list(config.scene) if isinstance(config.scene, ListConfig) else [config.scene]
    scenes = [load_scene(name) for name in names]
    if len({scene.name for scene in scenes}) < len(scenes) or len({scene.base for scene in scenes}) > 1:
        raise ConfigError(f"scene={names}: several scenes need names of their own and one base")
    if taken := [scene.name for scene in scenes if scene.name in OWN_FILES]:
        raise ConfigError(f"scene={names}: {taken[0]}.json is a file of the run itself; give the scene another name")
    if config.dtype not in DTYPES:
        raise ConfigError(f"dtype={config.dtype}: it can be {', '.join(DTYPES)}")
    seeds = checked_seeds([config.seed] if config.seeds is None else config.seeds)
    options: Any = OmegaConf.to_container(config.settings, resolve=True) if config.settings is not None else {}
    changed = [_changed(scene.file.settings, options) for scene in scenes]
    settings = [make_settings(one, f"scene {scene.name}") for scene, one in zip(scenes, changed, strict=True)]
    device = choose_device(config.device)
    numbers = [
        (
            scene.file.steps if config.steps is None else config.steps,
            scene.file.guidance_scale if config.guidance_scale is None else config.guidance_scale,
        )
        for scene in scenes
    ]
    for scene, (steps, scale) in zip(scenes, numbers, strict=True):
        check_sampling(f"scene {scene.name}", steps, scale)
    pipeline = load_base(scenes[0].base, DTYPES[config.dtype], device)
    plans = []
    for scene, one in zip(scenes, settings, strict=True):
        size = latent_shape(pipeline, scene.file.height, scene.file.width)[1:]
        planned = plan(config.method, scene, pipeline, one)
        planned.check(pipeline.unet, pipeline.scheduler, size)
        plans.append(planned)
    folder = open_run(config, config.dtype)
    _keep_scenes(folder, scenes)
    jobs = [
        Job(folder, scene.name, planned, scene.file.height, scene.file.width, seeds, *sampling)
        for scene, planned, sampling in zip(scenes, plans, numbers, strict=True)
    ]
    run_jobs(pipeline, jobs, device, config.devices)
    if process_rank() == 0:
        _finish(folder, scenes, jobs)
    return folder


def _changed(settings: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a scene's settings with those of the command in them; single constants leave the scene's others."""
    both = {**settings, **options}
    if "constants" in both:
        both["constants"] = {**constants_of(settings), **constants_of(options)}
    return both


def _keep_scenes(folder: Path, scenes: Sequence[LoadedScene]) -> None:
    """Writes down the scenes of a run; raises ConfigError where one that is resumed had others."""
    if process_rank() > 0:
        return
    # as JSON gives them back
    facts = json.loads(json.dumps({scene.name: {**asdict(scene.file), "files": scene.files()} for scene in scenes}))
    path = folder / "scenes.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else facts
    except ValueError as error:
        raise ConfigError(f"{path}: damaged ({error}); begin a new run") from error
    for name, found in facts.items():
        if changed := [key for key, value in found.items() if before.get(name, {}).get(key) != value]:
            raise ConfigError(
                f"resume={folder}: scene {name} has other {', '.join(changed)} now than when that run began; put them "
                "back, or begin a new run"
            )
    write_json(path, facts)


def _finish(folder: Path, scenes: Sequence[LoadedScene], jobs: Sequence[Job]) -> None:
    """Writes what is made of finished jobs."""
    seconds = {}
    for scene, job in zip(scenes, jobs, strict=True):
        facts = json.loads(job.record.read_text())
        seconds[scene.name] = facts["seconds"] / len(job.seeds)
        with atomic_path(folder / f"{scene.name}-layout.png") as temporary:
            draw_layout(np.asarray(Image.open(job.images[0])), scene).save(temporary, format="PNG")
        columns = [f"seed {seed}" for seed in job.seeds]
        losses = [{"step": step, **dict(zip(columns, row, strict=True))} for step, row in enumerate(facts["losses"])]
        write_csv(folder / f"{scene.name}-losses.csv", losses)
    count = sum(len(job.seeds) for job in jobs)
    total = sum(value * len(job.seeds) for value, job in zip(seconds.values(), jobs, strict=True))
    write_json(folder / "metrics.json", {"images": count, "seconds": total, "seconds_per_image": seconds})
    logger.info("%d image(s) in %.1f s, written to %s", count, total, folder)


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


@hydra.main(config_path=str(CONFIGS), config_name="compose", version_base="1.3")
def main(config: DictConfig) -> None:
    """Composes what `config` describes; exits with status 2 after an error that the user can mend."""
    run_as_command(lambda: run(config))


if __name__ == "__main__":
    start(main)
