"""One run of the classifier of sprites, and its folder read back."""

import hashlib
import logging
import time
from pathlib import Path

import lightning as L
import torch
from omegaconf import DictConfig

from vision_lowrank.checkpoints import checkpoints, read_checkpoint
from vision_lowrank.data.sprite_modules import BoxDataModule
from vision_lowrank.data.sprites import SHEET, SPRITES
from vision_lowrank.errors import CheckpointError
from vision_lowrank.evaluation.composition import NONE
from vision_lowrank.fitting import fit, make_trainer
from vision_lowrank.instantiate import instantiate
from vision_lowrank.models.saved import load_saved
from vision_lowrank.models.sprite_classifier import SpriteClassifier, crop
from vision_lowrank.plots.confusion import save_confusion
from vision_lowrank.precision import choose_precision
from vision_lowrank.runs import (
    atomic_folder,
    note_resumption,
    process_rank,
    resumed_run,
    start_run,
    write_csv,
    write_json,
)
from vision_lowrank.tasks.sprite_classification import SpriteClassification

logger = logging.getLogger(__name__)


def run_classifier(config: DictConfig) -> Path:
    """Trains the classifier and leaves a run folder.

    The folder holds `model/` (for `load_classifier`), `history.csv`, `confusion.png`, `checkpoints/` and, written last,
    `metrics.json` with the accuracy on boxes that neither training nor the choice of weights has seen.

    Raises:
        VisionLowRankError: anything that the user can mend; what can be checked before work starts is.
    """
    L.seed_everything(config.seed, workers=True, verbose=False)
    precision = choose_precision(config.trainer.precision, config.trainer.accelerator)
    if config.ckpt_path is not None:
        read_checkpoint(config.ckpt_path, "sprites")
    data: BoxDataModule = instantiate(config.data)
    task: SpriteClassification = instantiate(config.task, model=instantiate(config.model, names=SPRITES))
    if config.ckpt_path is None:
        folder = start_run(config, precision, {SHEET.name: hashlib.sha256(SHEET.read_bytes()).hexdigest()})
    else:
        folder = resumed_run(config)
    best, last = checkpoints(folder, "val/accuracy", "max")
    trainer = make_trainer(config, precision, [best, last], reload_dataloaders_every_n_epochs=1)
    started = time.perf_counter()
    fit(trainer, task, data, config.ckpt_path)
    if process_rank() > 0:
        return folder
    seconds = time.perf_counter() - started
    note_resumption(config, folder)
    task.load_state_dict(read_checkpoint(best.best_model_path, "sprites")["state_dict"])
    model = task.model.cpu().eval()
    with atomic_folder(folder / "model") as temporary:
        model.save_pretrained(temporary)
    write_csv(folder / "history.csv", task.history)
    counts = confusion(model, data)
    save_confusion(folder / "confusion.png", counts.numpy(), [*SPRITES, NONE])
    accuracy = float(counts.trace() / counts.sum())
    logger.info("accuracy on %d held-out boxes: %.4f", counts.sum(), accuracy)
    by_class = {
        name: float(row[index] / row.sum()) if row.sum() else None
        for index, (name, row) in enumerate(zip([*SPRITES, NONE], counts, strict=True))
    }
    facts = {"seed": config.seed, "seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())}
    write_json(folder / "metrics.json", {**facts, "accuracy": accuracy, "boxes": int(counts.sum()), "recall": by_class})
    return folder


@torch.inference_mode()
def confusion(model: SpriteClassifier, data: BoxDataModule) -> torch.Tensor:
    """Returns how often test boxes of a class (rows) were taken for each class (columns), none last, int64."""
    size = len(model.names) + 1
    counts = torch.zeros(size * size, dtype=torch.int64)
    for batch in data.test_dataloader():
        guesses = model(crop(batch["image"], batch["box"])).argmax(-1)
        counts += torch.bincount(batch["label"] * size + guesses, minlength=size * size)
    return counts.view(size, size)


def load_classifier(folder: str | Path) -> SpriteClassifier:
    """Reads a classifier in evaluation mode; nothing is downloaded.

    Raises:
        CheckpointError: there is none in the folder, or it is damaged.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; give the folder `model` of a run of sprites_classifier")
    try:
        model: SpriteClassifier = load_saved(SpriteClassifier, folder)
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be loaded as a classifier of sprites ({error})") from error
    return model.eval()
