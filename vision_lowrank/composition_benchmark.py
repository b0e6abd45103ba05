"""Success, confusion, vanishing and boxes of ways to compose sprites, on scenes drawn at random.

No scene is chosen by hand: concepts, backgrounds, sizes and places follow from the seed alone.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vision_lowrank.composer.methods import plan
from vision_lowrank.composer.render import load_base
from vision_lowrank.composer.scene_files import load_scene, make_settings
from vision_lowrank.data.sprite_modules import to_tensor
from vision_lowrank.data.sprites import (
    BACKGROUNDS,
    HELD_OUT,
    SIDE,
    SPRITES,
    Placed,
    concept_words,
    lay_out,
    write_caption,
)
from vision_lowrank.errors import ConfigError
from vision_lowrank.evaluation.composition import (
    NONE,
    Edges,
    Outcome,
    Share,
    confusion,
    difference_over_scenes,
    judge,
    mean_over_scenes,
    share_over_scenes,
)
from vision_lowrank.models.sprite_classifier import SpriteClassifier
from vision_lowrank.plots.compositions import save_sheet
from vision_lowrank.precision import choose_device, choose_precision
from vision_lowrank.records import make_record
from vision_lowrank.runs import atomic_path, checked_seeds, open_run, process_rank, write_csv, write_json
from vision_lowrank.sprite_classifier_run import load_classifier
from vision_lowrank.tasks.composition import Job, check_sampling, run_jobs
from vision_lowrank.text_to_image_run import WORLD

# words, commas and tokens that a prompt of the sprites' base may have
LONGEST = 30
# shares by name in the files, with their title in tables
SHARES = {"success": "success", "confusion": "wrong", "vanishing": "vanished", "overlap": "box IoU"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """A row of the table: a method of `composer.methods`, and changes of the benchmark's settings."""

    method: str = "composer"
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """The section `benchmark` of a configuration; see `configs/benchmark/composition.yaml`.

    Numbers of concepts of which there are 0 scenes are left out.

    Raises:
        ConfigError: a value is out of range, or the sheet shows what is no row.
    """

    kind: str
    world: str | None
    scenes: dict[int, int]
    sizes: dict[int, tuple[int, ...]]
    gap: int
    image_seeds: tuple[int, ...]
    steps: int
    guidance_scale: float
    settings: dict[str, Any]
    variants: dict[str, Variant]
    sheet: tuple[str, ...]
    sheet_scenes: int

    def __post_init__(self) -> None:
        if min(self.scenes.values(), default=0) < 0 or not any(self.scenes.values()):
            raise ConfigError(
                f"benchmark.scenes is {self.scenes}; give a number of scenes by number of concepts, one of them above 0"
            )
        object.__setattr__(self, "scenes", {count: scenes for count, scenes in self.scenes.items() if scenes})
        if unsized := [count for count in self.scenes if len(self.sizes.get(count, ())) != 2]:
            raise ConfigError(
                "benchmark.sizes has no smallest and largest size of boxes for scenes of "
                f"{', '.join(map(str, unsized))} concepts"
            )
        if self.gap < 0 or self.sheet_scenes < 1:
            raise ConfigError(
                f"benchmark.gap={self.gap}, benchmark.sheet_scenes={self.sheet_scenes}: give at least 0, and 1"
            )
        checked_seeds(list(self.image_seeds))
        check_sampling("benchmark", self.steps, self.guidance_scale)
        folders = [_folder_name(name) for name in self.variants]
        if not folders or len(set(folders)) < len(folders):
            raise ConfigError(
                f"benchmark.variants is {', '.join(self.variants) or 'empty'}; give at least one, with names that "
                "differ by more than spaces"
            )
        if strange := set(self.sheet) - set(self.variants):
            raise ConfigError(
                f"benchmark.sheet names {', '.join(sorted(strange))}, which is no row of benchmark.variants"
            )


def _folder_name(variant: str) -> str:
    """Returns what the folder of a row is called.

    Raises:
        ConfigError: a folder cannot be called so.
    """
    if not re.fullmatch(r"\w[^/\\\0]*", variant):
        raise ConfigError(
            f"benchmark.variants: {variant!r} is no name of a folder; begin with a letter, and leave out slashes"
        )
    return variant.replace(" ", "_")


@dataclass(frozen=True)
class Drawn:
    """A scene of the benchmark."""

    name: str
    background: str
    placed: tuple[Placed, ...]

    @property
    def asked(self) -> list[tuple[str, Edges]]:
        """Name and box of each region, in pixels."""
        return [(item.name, (item.top, item.left, item.top + item.size, item.left + item.size)) for item in self.placed]


def draw_scenes(
    counts: Mapping[int, int], sizes: Mapping[int, Sequence[int]], gap: int, concepts: Sequence[str], seed: int
) -> list[Drawn]:
    """Draws scenes in which each concept is at most once, and apart from the others.

    Args:
        counts: number of scenes by number of concepts.
        sizes: smallest and largest side of a box in pixels by number of concepts.
        gap: pixels between boxes.
        concepts: names to choose from.
        seed: of all that is random.
    """
    generator = np.random.default_rng([seed, 4])
    scenes = []
    for concepts_in_scene, count in counts.items():
        for index in range(count):
            names = generator.choice(sorted(concepts), concepts_in_scene, replace=False).tolist()
            background = str(generator.choice(list(BACKGROUNDS)))
            smallest, largest = sizes[concepts_in_scene]
            placed = lay_out(names, generator, (smallest, largest), overlap=0, gap=gap)
            scenes.append(Drawn(f"{concepts_in_scene}concepts{index:03d}", background, placed))
    return scenes


def scene_content(scene: Drawn, world: Path, settings: Mapping[str, Any], steps: int, scale: float) -> dict[str, Any]:
    """Returns the scene file of a drawn scene."""
    # away from the background alone: guidance then strengthens the concepts and nothing else
    alone = BACKGROUNDS[scene.background]
    regions = [
        {
            "box": {"left": left, "top": top, "right": right, "bottom": bottom},
            "prompt": write_caption([item], scene.background, places=True, call=concept_words),
            "negative_prompt": alone,
            "loras": [str(world / "loras" / f"{name}.safetensors")],
        }
        for item, (name, (top, left, bottom, right)) in zip(scene.placed, scene.asked, strict=True)
    ]
    joined = write_caption(scene.placed, scene.background, places=True, call=concept_words)
    if len(joined.replace(",", " ,").split()) > LONGEST:
        joined = write_caption(scene.placed, None, places=True, call=concept_words)
    return {
        "base": str(world / "pipeline"), "prompt": alone,
        "joined_prompt": joined, "joined_negative_prompt": alone,
        "height": SIDE, "width": SIDE, "regions": regions, "steps": steps, "guidance_scale": scale,
        "settings": dict(settings),
    }  # fmt: skip


def run_composition(config: DictConfig) -> Path:
    """Composes, judges and compares, and returns the folder with images and tables.

    The folder has `scenes/`, a folder of images for each row of the table, `judged.csv` (a line an image),
    `metrics.csv`, `differences.csv`, `confusion.csv`, `table.md`, `sheet.png` and, written last, `metrics.json`.

    Raises:
        VisionLowRankError: an option is wrong, or the world's files are missing or damaged.
    """
    section: Any = OmegaConf.to_container(config.benchmark, resolve=True)
    options = make_record(Options, section, "benchmark", ConfigError)
    world = WORLD if options.world is None else Path(options.world).resolve()
    classifier = load_classifier(world / "classifier")
    concepts = sorted(path.stem for path in (world / "loras").glob("*.safetensors") if path.stem in HELD_OUT)
    if len(concepts) < max(options.scenes):
        raise ConfigError(f"{world / 'loras'} has LoRAs of {len(concepts)} held-out sprites; a scene needs more")
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    pipeline = load_base(str(world / "pipeline"), device=device)
    drawn = draw_scenes(options.scenes, options.sizes, options.gap, concepts, config.seed)
    folder = open_run(config, precision)
    jobs = _jobs(folder, drawn, world, options, pipeline)
    run_jobs(pipeline, [job for group in jobs.values() for job in group], device, config.devices, precision)
    if process_rank() == 0:
        outcomes = {name: _judge(classifier, drawn, group, name) for name, group in jobs.items()}
        _report(folder, drawn, jobs, outcomes, options, concepts)
    return folder


def _jobs(folder: Path, drawn: Sequence[Drawn], world: Path, options: Options, pipeline: Any) -> dict[str, list[Job]]:
    """Writes the scenes' files and returns what to compose, by row of the table."""
    jobs: dict[str, list[Job]] = {name: [] for name in options.variants}
    for scene in drawn:
        path = folder / "scenes" / f"{scene.name}.yaml"
        content = scene_content(scene, world, options.settings, options.steps, options.guidance_scale)
        with atomic_path(path) as temporary:
            temporary.write_text(yaml.safe_dump(content, sort_keys=False))
        loaded = load_scene(path)
        for name, variant in options.variants.items():
            settings = make_settings({**options.settings, **variant.settings}, f"variant {name}")
            planned = plan(variant.method, loaded, pipeline, settings)
            place = folder / _folder_name(name)
            job = Job(
                *(place, scene.name, planned, SIDE, SIDE, options.image_seeds),
                *(options.steps, options.guidance_scale),
            )
            jobs[name].append(job)
    return jobs


def _judge(classifier: SpriteClassifier, drawn: Sequence[Drawn], jobs: Sequence[Job], name: str) -> list[list[Outcome]]:
    """Returns, for each scene, what each of its images shows."""
    return [
        [
            judge(scene.asked, [(item.name, item.box) for item in classifier.locate(to_tensor(_read(path)))])
            for path in job.images
        ]
        for scene, job in track(list(zip(drawn, jobs, strict=True)), f"judging {name}")
    ]


def _report(
    folder: Path,
    drawn: Sequence[Drawn],
    jobs: Mapping[str, Sequence[Job]],
    outcomes: Mapping[str, Sequence[Sequence[Outcome]]],
    options: Options,
    concepts: Sequence[str],
) -> None:
    """Writes all that is made of the outcomes, and prints the table."""
    counts = [len(scene.placed) for scene in drawn]
    rows, differences = [], []
    values = {name: _values(drawn, found) for name, found in outcomes.items()}
    first = next(iter(values))
    for count in sorted(set(counts)):
        chosen = np.array(counts) == count
        for name, arrays in values.items():
            shares = {
                key: (mean_over_scenes if key == "overlap" else share_over_scenes)(array[chosen])
                for key, array in arrays.items()
            }
            rows.append({"variant": name, "concepts": count, "images": int(chosen.sum()) * len(options.image_seeds)})
            rows[-1] |= {f"{key}{part}": value for key, share in shares.items() for part, value in _parts(share)}
            rows[-1] |= _cost([job for job, used in zip(jobs[name], chosen, strict=True) if used])
            if name != first:
                gap = difference_over_scenes(values[first]["success"][chosen], arrays["success"][chosen])
                parts = {f"success{part}": value for part, value in _parts(gap)}
                differences.append({"variant": f"{first} - {name}", "concepts": count, **parts})
    write_csv(folder / "metrics.csv", rows)
    write_csv(folder / "differences.csv", differences)
    write_csv(folder / "judged.csv", _lines(drawn, outcomes, options.image_seeds))
    write_csv(folder / "confusion.csv", _confusions(drawn, outcomes, concepts))
    with atomic_path(folder / "table.md") as temporary:
        temporary.write_text(markdown(rows))
    _sheet(folder / "sheet.png", drawn, jobs, options)
    write_json(folder / "metrics.json", {"rows": rows, "differences": differences})
    _print(rows)
    logger.info("written to %s", folder)


def _values(drawn: Sequence[Drawn], outcomes: Sequence[Sequence[Outcome]]) -> dict[str, np.ndarray]:
    """Returns each of `SHARES` as an array (scenes, seeds)."""
    names = [[name for name, _ in scene.asked] for scene in drawn]
    return {
        "success": np.array([[one.success for one in found] for found in outcomes], float),
        "confusion": np.array(
            [
                [
                    np.mean([seen not in (name, NONE) for name, seen in zip(asked, one.shown, strict=True)])
                    for one in found
                ]
                for asked, found in zip(names, outcomes, strict=True)
            ]
        ),
        "vanishing": np.array([[np.mean(one.vanished) for one in found] for found in outcomes]),
        "overlap": np.array([[np.mean(one.overlaps) for one in found] for found in outcomes]),
    }


def _parts(share: Share) -> list[tuple[str, float]]:
    return [("", share.value), ("_low", share.low), ("_high", share.high)]


def _cost(jobs: Sequence[Job]) -> dict[str, float | None]:
    """Returns seconds an image, and the rise of memory over what the model takes, of the images made together.

    Seconds are those of the fastest scene: other work on the machine makes some longer, and none shorter.
    """
    records = [json.loads(job.record.read_text()) for job in jobs]
    peaks = [record["peak_megabytes"] for record in records]
    return {
        "seconds_per_image": min(record["seconds"] / len(record["seeds"]) for record in records),
        "peak_megabytes": None if None in peaks else max(peaks),
    }


def _lines(
    drawn: Sequence[Drawn], outcomes: Mapping[str, Sequence[Sequence[Outcome]]], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    return [
        {
            "variant": name, "scene": scene.name, "seed": seed, "asked": " ".join(item.name for item in scene.placed),
            "shown": " ".join(one.shown), "success": one.success, "vanished": sum(one.vanished), "strays": one.strays,
            "overlap": float(np.mean(one.overlaps)),
        }
        for name, found in outcomes.items()
        for scene, images in zip(drawn, found, strict=True)
        for seed, one in zip(seeds, images, strict=True)
    ]  # fmt: skip


def _confusions(
    drawn: Sequence[Drawn], outcomes: Mapping[str, Sequence[Sequence[Outcome]]], concepts: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns a line for each variant and concept: how often its boxes showed what."""
    lines = []
    for name, found in outcomes.items():
        asked: list[str] = []
        shown: list[str] = []
        for scene, images in zip(drawn, found, strict=True):
            for one in images:
                asked += [item.name for item in scene.placed]
                shown += one.shown
        counts = confusion(asked, shown, SPRITES)
        for concept in concepts:
            row = counts[SPRITES.index(concept)].tolist()
            lines.append({"variant": name, "asked": concept, **dict(zip([*SPRITES, NONE], row, strict=True))})
    return lines


def _sheet(path: Path, drawn: Sequence[Drawn], jobs: Mapping[str, Sequence[Job]], options: Options) -> None:
    """Writes the first scenes of each number of concepts, each with its first seed."""
    numbers = [
        number
        for count in dict.fromkeys(len(scene.placed) for scene in drawn)
        for number in [i for i, scene in enumerate(drawn) if len(scene.placed) == count][: options.sheet_scenes]
    ]
    images = {name: [_read(jobs[name][number].images[0]) for number in numbers] for name in options.sheet}
    save_sheet(path, images, [drawn[number].asked for number in numbers])


def _read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def _cells(row: Mapping[str, Any]) -> list[str]:
    """Returns a row of the table: percent with intervals, the overlap as it is."""
    cells = [str(row["variant"]), str(row["concepts"])]
    for key in SHARES:
        scale, digits = (1, 2) if key == "overlap" else (100, 0)
        low, value, high = (f"{scale * row[key + part]:.{digits}f}" for part in ("_low", "", "_high"))
        cells.append(f"{value} [{low}, {high}]")
    peak = row["peak_megabytes"]
    return [*cells, f"{row['seconds_per_image']:.2f}", "-" if peak is None else f"{peak:.0f}"]


HEADER = ["method", "concepts", *(f"{title} %" for title in list(SHARES.values())[:3]), "box IoU", "s / image", "MB"]
# what a terminal has room for
PRINTED = [title for title in HEADER if title not in ("concepts", "MB")]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table for a document."""
    rule = [":---", *("---:" for _ in HEADER[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in [HEADER, rule, *map(_cells, rows)]) + "\n"


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the table by number of concepts, such that a terminal of 80 columns holds it."""
    table = Table(title="mean [95 % interval over scenes]", box=SIMPLE, padding=0, pad_edge=False)
    for index, title in enumerate(PRINTED):
        table.add_column(title, justify="left" if index == 0 else "right", no_wrap=index > 0)
    # else the numbers, which are not broken, leave it nothing
    table.columns[0].min_width = 16
    count = None
    for row in rows:
        if row["concepts"] != count:
            count = row["concepts"]
            table.add_section()
            table.add_row(f"{count} concepts", style="bold")
        cells = dict(zip(HEADER, _cells(row), strict=True))
        table.add_row(*(cells[title].split(" [")[0] if title == "box IoU" else cells[title] for title in PRINTED))
    Console().print(table)
