"""Scene files: one YAML that says what to compose, of which LoRAs, and where.

Paths in it are relative to its folder. A LoRA is its file, or `{file: FILE, strength: NUMBER}`. The edges of a box are
fractions of the image if none is above 1, otherwise pixels.
"""

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision_lowrank.composer.conditions import Condition, load_condition
from vision_lowrank.composer.layout import Box, Lora, Region, Scene
from vision_lowrank.composer.lora_files import LoraFileError, LoraWeights, check_fits, read_lora
from vision_lowrank.composer.losses import CONSTANTS
from vision_lowrank.composer.sampler import Settings
from vision_lowrank.composer.text import Encoded, encode
from vision_lowrank.errors import ConfigError
from vision_lowrank.records import make_record, nearest, read_record
from vision_lowrank.shipped import PACKAGE

# along a side: more is a mistake, and would fill memory before anything could say so
MOST_PIXELS = 16384
SCENES_FOLDER = PACKAGE / "assets" / "scenes"


@dataclass(frozen=True)
class LoraEntry:
    """A LoRA file and what its changes of weights are multiplied by."""

    file: str
    strength: float = 1.0


@dataclass(frozen=True)
class BoxEntry:
    """Edges of a box, fractions or pixels."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class RegionEntry:
    """A concept: where, its prompts, and its LoRAs; `subject` is the words of the prompt that name it.

    Without `subject` these are the tokens that the LoRAs bring.
    """

    box: BoxEntry
    prompt: str
    loras: tuple[LoraEntry, ...] = ()
    negative_prompt: str | None = None
    subject: str | None = None


@dataclass(frozen=True)
class ConditionEntry:
    """An image that guides the whole composition; `kind` is controlnet or t2i_adapter, `model` a folder or a name."""

    kind: str
    model: str
    image: str
    strength: float = 1.0


@dataclass(frozen=True)
class SceneFile:
    """What a scene file holds.

    `base` is the folder of a diffusers pipeline, or a name on the hub; `background` LoRAs change the whole image,
    `conditions` guide it; `joined_prompt` names all concepts at once, for the methods that take one prompt (see
    `methods.py`), by default the regions' prompts joined by "and"; `joined_negative_prompt` goes with it, by default
    `negative_prompt`; `steps` and `guidance_scale` are those of sampling; `settings` are changes of `sampler.Settings`,
    its `constants` a preset or changes of single numbers.
    """

    base: str
    prompt: str
    height: int
    width: int
    regions: tuple[RegionEntry, ...] = ()
    background: tuple[LoraEntry, ...] = ()
    conditions: tuple[ConditionEntry, ...] = ()
    negative_prompt: str | None = None
    joined_prompt: str | None = None
    joined_negative_prompt: str | None = None
    steps: int = 50
    guidance_scale: float = 7.5
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedScene:
    """A scene file with its LoRAs read, the same file once.

    Args:
        file: the scene.
        name: its file's name without ending.
        folder: that paths are relative to.
        loras: by path as written in the scene.
    """

    file: SceneFile
    name: str
    folder: Path
    loras: Mapping[str, LoraWeights]
    _conditions: list[Condition] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def base(self) -> str:
        """Folder of the base model, or its name on the hub."""
        folder = self.folder / self.file.base
        return str(folder) if folder.is_dir() else self.file.base

    def of(self, entries: tuple[LoraEntry, ...]) -> list[tuple[LoraWeights, float]]:
        """Returns the LoRAs of some entries with their strengths."""
        return [(self.loras[entry.file], entry.strength) for entry in entries]

    def files(self) -> dict[str, str]:
        """Returns the sha256 of its LoRAs and of the images of its conditions, by path as written in the scene.

        That of a LoRA with settings beside it is over both files, one after the other.
        """
        files: dict[str, tuple[Path, ...]] = {
            entry.image: (self.folder / entry.image,) for entry in self.file.conditions
        }
        files |= {name: lora.files for name, lora in self.loras.items()}
        return {
            name: hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
            for name, paths in files.items()
        }

    def conditions(self, unet: Any) -> list[Condition]:
        """Loads models and images of the conditions at the first call; errors are those of `load_condition`."""
        if not self._conditions:
            size = (self.file.height, self.file.width)
            self._conditions[:] = [
                load_condition(
                    entry.kind,
                    str(self.folder / entry.model) if (self.folder / entry.model).is_dir() else entry.model,
                    self.folder / entry.image,
                    entry.strength,
                    unet,
                    *size,
                    f"scene {self.name}: conditions[{index}]",
                )
                for index, entry in enumerate(self.file.conditions)
            ]
        return self._conditions


def load_scene(name_or_path: str | Path) -> LoadedScene:
    """Reads a scene by name, or by the path of a `.yaml` file, and its LoRA files.

    Raises:
        ConfigError: no such scene, or one with an unknown, missing or wrong field.
        LoraFileError: a LoRA file cannot be read.
    """
    text = str(name_or_path)
    path = Path(text) if text.endswith((".yaml", ".yml")) else SCENES_FOLDER / f"{text}.yaml"
    if not path.is_file():
        known = sorted(item.stem for item in SCENES_FOLDER.glob("*.yaml"))
        raise ConfigError(
            f"scene {text}: not found{nearest(text, known)}; scenes: {', '.join(known)}, or the path of a .yaml file"
        )
    scene = read_record(SceneFile, path, "scene", ConfigError)
    where = f"scene {path}"
    if max(scene.height, scene.width) > MOST_PIXELS:
        raise ConfigError(f"{where}: {scene.height} x {scene.width} pixels; give at most {MOST_PIXELS} along a side")
    if scene.height < 1 or scene.width < 1 or scene.steps < 1:
        raise ConfigError(
            f"{where}: height, width and steps are {scene.height}, {scene.width}, {scene.steps}; give 1 or more"
        )
    for index, region in enumerate(scene.regions):
        _box(region.box, scene, f"{where}: regions[{index}]")
        if region.subject is None and not region.loras:
            raise ConfigError(
                f"{where}: regions[{index}] has neither loras nor a subject; say which words are the concept"
            )
    loras = {"background": scene.background, **{f"regions[{i}]": item.loras for i, item in enumerate(scene.regions)}}
    for place, entries in loras.items():
        for entry in entries:
            if not math.isfinite(entry.strength):
                raise ConfigError(f"{where}: {place}: {entry.file} has strength {entry.strength}; give a finite number")
    files = {entry.file for entries in loras.values() for entry in entries}
    return LoadedScene(scene, path.stem, path.parent, {name: read_lora(path.parent / name) for name in sorted(files)})


def prepare(scene: LoadedScene, pipeline: Any) -> Scene:
    """Encodes the prompts of a scene and places its regions, for `sampler.compose`.

    Args:
        scene: the scene.
        pipeline: of diffusers; the base model.

    Raises:
        ConfigError: the image does not fit the model, or a prompt is too long or names an unknown token or subject.
        LoraFileError: a LoRA belongs to another base model.
    """
    file = scene.file
    check_loras(scene, pipeline)
    background = scene.of(file.background)
    whole = encode(pipeline, file.prompt, file.negative_prompt, background)
    regions = []
    for index, entry in enumerate(file.regions):
        where = f"scene {scene.name}: regions[{index}]"
        found = encode(pipeline, entry.prompt, entry.negative_prompt, scene.of(entry.loras), entry.subject)
        if not found.tokens:
            raise ConfigError(
                f"{where}: prompt {entry.prompt!r} names no token of its LoRAs; add it, or give a subject"
            )
        loras = unet_changes(scene.of(entry.loras))
        regions.append(Region(_box(entry.box, file, where), found.text, found.tokens, loras))
    added = added_conditions(whole, file.height, file.width)
    return Scene(whole.text, regions, unet_changes(background), added, scene.conditions(pipeline.unet))


def prepare_joined(scene: LoadedScene, pipeline: Any, active: Collection[str]) -> Scene:
    """Encodes the joined prompt of a scene, with some of the regions' LoRAs at work in the whole image.

    Args:
        scene: the scene.
        pipeline: of diffusers; the base model.
        active: files of the regions' LoRAs that change weights; of the others, only the tokens are known.

    Raises:
        ConfigError: a prompt is too long or names an unknown token.
        LoraFileError: a LoRA belongs to another base model.
    """
    check_loras(scene, pipeline)
    file = scene.file
    prompt = file.joined_prompt or " and ".join(region.prompt for region in file.regions) or file.prompt
    negative = file.negative_prompt if file.joined_negative_prompt is None else file.joined_negative_prompt
    entries = {entry.file: entry for region in file.regions for entry in region.loras}
    for region in file.regions:
        for entry in region.loras:
            if entry.strength != entries[entry.file].strength:
                raise ConfigError(
                    f"scene {scene.name}: {entry.file} has the strengths {entry.strength} and "
                    f"{entries[entry.file].strength}; this method has one for the whole image"
                )
    loras = scene.of(file.background) + [
        (scene.loras[name], entry.strength if name in active else 0.0) for name, entry in entries.items()
    ]
    whole = encode(pipeline, prompt, negative, loras)
    added = added_conditions(whole, file.height, file.width)
    return Scene(whole.text, (), unet_changes(loras), added, scene.conditions(pipeline.unet))


def check_loras(scene: LoadedScene, pipeline: Any) -> None:
    """Refuses LoRAs of another base.

    Raises:
        LoraFileError: a LoRA belongs to another base model.
    """
    for name, lora in scene.loras.items():
        try:
            check_fits(lora, pipeline.unet, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None))
        except LoraFileError as error:
            raise LoraFileError(f"{scene.folder / name}: {error}") from None


def make_settings(options: Mapping[str, Any], where: str) -> Settings:
    """Makes settings of the method from the names and values of a file or command.

    Args:
        options: arguments of `Settings`; its constants are the name of a preset, or numbers, with `preset` for the one
            that they change.
        where: what they belong to, for messages.

    Raises:
        ConfigError: an option is unknown, of another kind or out of range.
    """
    changes = constants_of(options)
    preset = changes.pop("preset", "code")
    if not isinstance(preset, str) or preset not in CONSTANTS:
        raise ConfigError(f"{where}: preset of constants {preset!r}; it can be {' or '.join(CONSTANTS)}")
    numbers = {**asdict(CONSTANTS[preset]), **changes}
    return make_record(Settings, {**options, "constants": numbers}, f"{where}: settings", ConfigError)


def constants_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the constants among options of `make_settings` as a mapping, where they may be the name of a preset.

    Raises:
        ConfigError: they are neither.
    """
    constants = options.get("constants", {})
    if isinstance(constants, str):
        return {"preset": constants}
    if not isinstance(constants, Mapping):
        raise ConfigError(f"constants is {constants!r}; give the name of a preset, or a mapping of numbers")
    return dict(constants)


def unet_changes(loras: list[tuple[LoraWeights, float]]) -> list[Lora]:
    """Returns what LoRAs change in the UNet, with their strengths."""
    return [(lora.unet, strength) for lora, strength in loras]


def added_conditions(encoded: Encoded, height: int, width: int) -> dict[str, Tensor]:
    """Returns what SDXL's UNet takes besides the prompts: pooled text, and the size of an image that is not cropped."""
    if encoded.pooled is None:
        return {}
    sizes = torch.tensor([[height, width, 0, 0, height, width]] * 2, dtype=encoded.pooled.dtype)
    return {"text_embeds": encoded.pooled, "time_ids": sizes.to(encoded.pooled.device)}


def _box(entry: BoxEntry, scene: SceneFile, where: str) -> Box:
    edges = (entry.top, entry.left, entry.bottom, entry.right)
    if 1 < max(edges) < 2 and any(edge % 1 for edge in edges):
        raise ConfigError(f"{where}: box {list(edges)} leaves the image; give fractions of it up to 1, or whole pixels")
    try:
        return Box(*edges) if max(edges) <= 1 else Box.from_pixels(*edges, scene.height, scene.width)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
