"""What a run on a scene left for others to use: its model, its scaling, and the bands and classes it knows."""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.numpy import load_file
from yaml import YAMLError

from vision_lowrank.adapters import load_adapter, merge_and_remove
from vision_lowrank.adapters.peft_methods import load_peft
from vision_lowrank.data.bands import Bands
from vision_lowrank.data.cards import DatasetCard, load_card
from vision_lowrank.data.preprocessing import ScenePreprocessor
from vision_lowrank.data.scene import open_scene
from vision_lowrank.errors import AdapterError, CheckpointError, DataError
from vision_lowrank.models import LolaSpecViT
from vision_lowrank.models.heads import LessSegmentation
from vision_lowrank.models.saved import load_saved
from vision_lowrank.tasks.adapter_training import PeftAdapter

WEIGHTS = ("preprocessing.safetensors", "model/config.json", "model/model.safetensors")
ADAPTER = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
# what a configuration calls a method of peft
PEFT_ADAPTER = f"{PeftAdapter.__module__}.{PeftAdapter.__name__}"


@dataclass(frozen=True)
class TrainedRun:
    """A finished run of `train.py` on a scene.

    Attributes:
        model: in evaluation mode; adapters are merged where they can be.
        preprocessor: fitted.
        card: of the scene.
        bands: of the channels that `preprocessor` takes.
        kept: indices of these channels among those of the scene's files.
        data: the configuration of its data.
        inputs: entries of a batch that the model takes.
        digest: sha256 of weights and scaling.
    """

    model: LolaSpecViT | LessSegmentation
    preprocessor: ScenePreprocessor
    card: DatasetCard
    bands: Bands
    kept: np.ndarray
    data: dict[str, Any]
    inputs: tuple[str, ...]
    digest: str


def load_run(folder: str | Path) -> TrainedRun:
    """Reads a run folder; nothing named in it is executed.

    The card of the run has to be where it was in training, and its files too if training found bands of no use.

    Raises:
        CheckpointError: a file is missing or damaged, or the run is of another kind.
        AdapterError: its adapters do not belong to its model.
        DataError: its card is missing or no longer that of training.
    """
    folder = Path(folder)
    _require(folder, ("config.yaml", *WEIGHTS))
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True)
        data, regime, inputs = config["data"], config["regime"], config["task"].get("inputs", ["image"])
        card, root = data["card"], data["root"]
        method = config.get("adapter", {}).get("method", {}).get("_target_")
    except (YAMLError, OmegaConfBaseException, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"weights {folder}: config.yaml is not that of a run on a scene ({error!r}); give a folder of train.py"
        ) from error
    if regime == "adapt":
        _require(folder, ADAPTER)
    model = _load_model(folder, regime == "adapt", method == PEFT_ADAPTER)
    try:
        preprocessor = ScenePreprocessor.from_state(load_file(folder / "preprocessing.safetensors"))
    except (SafetensorError, DataError) as error:
        raise CheckpointError(
            f"weights {folder}: preprocessing.safetensors is damaged ({error}); train anew"
        ) from error
    opened = load_card(card)
    _check_classes(opened, folder)
    bands, kept = _bands(opened, root, len(preprocessor.mean), folder)
    files = [folder / name for name in (*WEIGHTS, *(ADAPTER if regime == "adapt" else ()))]
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()
    return TrainedRun(model, preprocessor, opened, bands, kept, data, tuple(inputs), digest)


def _require(folder: Path, names: tuple[str, ...]) -> None:
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"weights {folder}: no {missing[0]} there; give the folder of a finished run of train.py on a scene, such "
            "as runs/indian_pines/20260101-120000-seed0"
        )


def _load_model(folder: Path, adapted: bool, by_peft: bool) -> LolaSpecViT | LessSegmentation:
    place = folder / "model"
    try:
        settings = json.loads((place / "config.json").read_text(encoding="utf-8"))
        kind = LessSegmentation if "encoder" in settings else LolaSpecViT
        # without `strict`, the hub's mixin leaves random what the file lacks
        model: Any = load_saved(kind, place)
    except Exception as error:
        raise CheckpointError(
            f"weights {place}: cannot be loaded as LoLA-SpecViT or LESS ViT segmentation ({error}); give a run of one"
        ) from error
    if adapted and by_peft:
        model = load_peft(model, folder / "adapter")
    elif adapted:
        load_adapter(model, folder / "adapter")
        # a gate depends on the input, so there is no weight to fold it into
        with contextlib.suppress(AdapterError):
            merge_and_remove(model)
    model.eval()
    loaded: LolaSpecViT | LessSegmentation = model
    return loaded


def _check_classes(card: DatasetCard, folder: Path) -> None:
    """Refuses a card that now calls the classes of training otherwise: the model knows them by their number alone."""
    if not (folder / "metrics.json").is_file():
        # of a run that ended before its scores were written nobody tells
        return
    try:
        content = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        trained = [entry["name"] for entry in content["scores"]["train"]["classes"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"weights {folder}: metrics.json is not that of a run on a scene ({error!r}); give a folder of train.py"
        ) from error
    named = [entry.name for entry in card.classes]
    if named != trained:
        raise CheckpointError(
            f"weights {folder}: its card {card.name} has the classes {', '.join(named)} now, in training it had "
            f"{', '.join(trained)}; put back the card of training"
        )


def _bands(card: DatasetCard, root: str, channels: int, folder: Path) -> tuple[Bands, np.ndarray]:
    """Returns bands and file indices of the channels that training used."""
    stated = card.bands.on_card(f"card {card.name}")
    if stated is not None and not card.bands.from_file and len(stated) == channels:
        return stated, np.arange(channels)
    scene = open_scene(card, root)
    if len(scene.bands) != channels:
        raise CheckpointError(
            f"weights {folder}: fitted on {channels} channels, its card {card.name} has {len(scene.bands)} of use now; "
            "put back the card and the files of training"
        )
    return scene.bands, np.setdiff1d(np.arange(card.shape.channels), scene.dropped_bands)
