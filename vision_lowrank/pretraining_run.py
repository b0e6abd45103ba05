"""One run of Hyper-MAE on tiles: training, errors on held-out tiles beside fillings that learn nothing, pictures."""

import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from omegaconf import DictConfig
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vision_lowrank.checkpoints import checkpoints, read_checkpoint
from vision_lowrank.data.bands import Bands
from vision_lowrank.data.tile_module import TileDataModule
from vision_lowrank.errors import CheckpointError
from vision_lowrank.evaluation.reconstruction import (
    KINDS,
    fill_over_space,
    fill_over_wavelength,
    fill_with_mean,
    squared_errors,
)
from vision_lowrank.evaluation.tables import summarise
from vision_lowrank.fitting import fit, make_trainer
from vision_lowrank.instantiate import instantiate
from vision_lowrank.models.hyper_mae import Reconstruction
from vision_lowrank.models.less_vit import assemble
from vision_lowrank.plots.curves import save_curves
from vision_lowrank.plots.reconstructions import save_reconstructions, save_spectra
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
from vision_lowrank.tasks.masked_pretraining import HyperMAEPretraining

logger = logging.getLogger(__name__)

PICTURED_TILES = 4
TITLES = {
    "positions": "hidden positions, shown channels",
    "channels": "shown positions, hidden channels",
    "both": "both hidden",
}
# sums of squared errors and numbers of values, by kind of hiding and filling
Errors = dict[str, dict[str, list[float]]]


def run_pretraining(config: DictConfig) -> tuple[Path, dict[str, dict[str, float]]]:
    """Pretrains on the tiles of the configuration and leaves a run folder.

    The folder holds `encoder/` (for `LessViT.from_pretrained`), `history.csv`, pictures, `checkpoints/`, and, written
    last, `metrics.json`. The encoder is that of the epoch with the least loss on validation tiles, or, where no source
    has any, of the last epoch.

    Returns:
        The folder, and the mean squared error by kind of hiding and filling; empty on ranks other than 0.

    Raises:
        VisionLowRankError: anything that the user can mend; what can be checked before work starts is.
    """
    L.seed_everything(config.seed, workers=True, verbose=False)
    precision = choose_precision(config.trainer.precision, config.trainer.accelerator)
    if config.ckpt_path is not None:
        read_checkpoint(config.ckpt_path, "modal_mode")
    data: TileDataModule = instantiate(config.data)
    data.prepare_data()
    data.setup()
    task: HyperMAEPretraining = instantiate(config.task, model=instantiate(config.model))
    for name, source in data.sources.items():
        task.check_channels(name, len(source.bands))
    if config.ckpt_path is None:
        hashes = [pair for source in data.sources.values() for pair in source.hashes().items()]
        folder = start_run(config, precision, dict(hashes))
    else:
        folder = resumed_run(config)
    for name, source in data.sources.items():
        logger.info(
            "%s: %d training, %d validation, %d test tiles of %d x %d pixels, %d channels",
            *(name, source.train.size, source.validation.size, source.test.size, source.size, source.size),
            len(source.bands),
        )
    best, last = checkpoints(folder, "val/loss", "min")
    validated = any(source.validation.size for source in data.sources.values())
    trainer = make_trainer(config, precision, [best, last] if validated else [last], use_distributed_sampler=False)
    started = time.perf_counter()
    fit(trainer, task, data, config.ckpt_path)
    if process_rank() > 0:
        return folder, {}
    seconds = time.perf_counter() - started
    note_resumption(config, folder)
    chosen = best.best_model_path if validated else last.path
    if not (task.history and chosen):
        raise CheckpointError("no epoch was finished, so there are no weights to keep; raise trainer.max_epochs")
    content = read_checkpoint(chosen)
    kept: HyperMAEPretraining = instantiate(config.task, model=instantiate(config.model))
    # another one than was trained, of whose weights this process may hold a part only
    kept.load_state_dict(content["state_dict"])
    with atomic_folder(folder / "encoder") as temporary:
        kept.model.encoder.save_pretrained(temporary)
        # weights that leave the run still tell what they have seen
        shutil.copy(folder / "provenance.json", temporary)
    write_csv(folder / "history.csv", task.history)
    _save_curves(folder / "curves.png", task.history, content["epoch"] + 1)
    errors = evaluate_reconstruction(kept.eval(), data, precision, folder)
    facts = {
        "seconds": seconds,
        "epochs": task.history[-1]["epoch"],
        "parameters": sum(parameter.numel() for parameter in kept.parameters()),
        "encoder_parameters": sum(parameter.numel() for parameter in kept.model.encoder.parameters()),
        "normalised_targets": task.model.normalise_targets,
    }
    write_json(folder / "metrics.json", {"seed": config.seed, "mean_squared_error": errors, "facts": facts})
    return folder, errors


def evaluate_reconstruction(
    task: HyperMAEPretraining, data: TileDataModule, precision: str, folder: Path
) -> dict[str, dict[str, float]]:
    """Hides parts of held-out tiles, fills them by the model and by simple means, and draws the first tiles.

    Errors are in the units of the model's targets: of standardised bands, or of standardised patches.

    Args:
        task: with the weights to judge, in evaluation mode.
        data: after `setup`; its test tiles are used, or its validation tiles where there are none.
        precision: Lightning's precision string.
        folder: where pictures go.

    Returns:
        Mean squared error by kind of hiding and filling.
    """
    totals: Errors = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
    for number, batch in enumerate(data.held_out_dataloader()):
        result, scale, valid = _reconstruct(task, batch, number, precision)
        tiles = [_tile(task, batch, result, scale, valid, index) for index in range(len(batch["image"]))]
        for tile in tiles:
            found = squared_errors(
                tile["target"], tile["fillings"], tile["hidden_channels"], tile["hidden_pixels"], tile["valid"]
            )
            for kind, by_filling in found.items():
                for name, (total, count) in by_filling.items():
                    totals[kind][name][0] += total
                    totals[kind][name][1] += count
        if number == 0:
            _save_pictures(folder, tiles[:PICTURED_TILES], batch["wavelengths"][0].numpy())
    return {
        kind: {name: total / count for name, (total, count) in by_filling.items() if count}
        for kind, by_filling in totals.items()
    }


def report_pretraining(errors: Sequence[Mapping[str, Mapping[str, float]]], title: str) -> str:
    """Prints mean squared errors over runs and returns them as a Markdown table."""
    names = list(dict.fromkeys(name for run in errors for kind in KINDS for name in run.get(kind, ())))
    table = Table(title=title, box=SIMPLE)
    table.add_column("mean squared error")
    lines = ["| mean squared error | " + " | ".join(names) + " |", "| :--- |" + " ---: |" * len(names)]
    for name in names:
        table.add_column(name, justify="right")
    for kind in KINDS:
        cells = []
        for name in names:
            values = [run[kind][name] for run in errors if name in run.get(kind, ())]
            summary = summarise(values) if values else None
            spread = "" if summary is None or summary.std is None else f" ± {summary.std:.3f}"
            cells.append("-" if summary is None else f"{summary.mean:.3f}{spread}")
        table.add_row(TITLES[kind], *cells)
        lines.append(f"| {TITLES[kind]} | " + " | ".join(cells) + " |")
    Console(width=max(Console().width, 110)).print(table)
    return "\n".join(lines) + "\n"


def _reconstruct(
    task: HyperMAEPretraining, batch: Mapping[str, Tensor], number: int, precision: str
) -> tuple[Reconstruction, tuple[Tensor, Tensor], Tensor]:
    """Returns the reconstruction of a batch under masks that its number decides, the targets' scale, valid pixels."""
    generator = torch.Generator().manual_seed(number)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled="bf16" in precision):
        patches, valid = task.patches(batch)
        noise = task.model.draw_noise(patches, "multi", generator)
        result = task.model.reconstruct(patches, "multi", noise, valid)
        return result, task.model.target_scale(patches.pixels.float(), valid), valid


def _tile(
    task: HyperMAEPretraining,
    batch: Mapping[str, Tensor],
    result: Reconstruction,
    scale: tuple[Tensor, Tensor],
    valid: Tensor,
    index: int,
) -> dict[str, Any]:
    """Returns the arrays of one tile that errors and pictures need, in the units of the targets."""
    encoder = task.model.encoder
    image = batch["image"][index].numpy()
    height, width = image.shape[-2:]
    rows = -(-height // encoder.patch_size)

    def whole(patches: Tensor) -> np.ndarray:
        array: np.ndarray = assemble(patches[index : index + 1].float(), rows)[0, :, :height, :width].numpy()
        return array

    size = encoder.patch_size**2
    places = result.hidden_positions[:, None, :, None].expand(-1, -1, -1, size)
    hidden_pixels = whole(places)[0] > 0
    hidden_channels = result.hidden_channels[index].numpy()
    wavelengths = batch["wavelengths"][index].numpy()
    shift, gain = (whole(part.expand(-1, -1, -1, size)) for part in scale)
    valid_pixels = whole(valid.unsqueeze(1).float())[0] > 0
    # what stands where there is no value is nothing to fill from
    unknown = hidden_pixels | ~valid_pixels
    fillings = {
        "mean": fill_with_mean(image, hidden_channels, unknown),
        "over space": fill_over_space(image, hidden_channels, unknown),
        "over wavelength": fill_over_wavelength(image, hidden_channels, unknown, wavelengths),
    }
    return {
        "target": whole(result.target),
        "fillings": {"Hyper-MAE": whole(result.prediction)}
        | {name: (filled - shift) * gain for name, filled in fillings.items()},
        "hidden_channels": hidden_channels,
        "hidden_pixels": hidden_pixels,
        "valid": valid_pixels,
    }


def _save_pictures(folder: Path, tiles: Sequence[Mapping[str, Any]], wavelengths: np.ndarray) -> None:
    """Draws reconstructions in colour, and the spectra of two pixels that were shown and up to two that were not."""
    interpolated = "over wavelength"
    save_reconstructions(
        folder / "reconstructions.png",
        np.stack([tile["target"] for tile in tiles]),
        np.stack([tile["hidden_pixels"] for tile in tiles]),
        {
            "reconstruction": np.stack([tile["fillings"]["Hyper-MAE"] for tile in tiles]),
            "interpolation": np.stack([tile["fillings"][interpolated] for tile in tiles]),
        },
        Bands(wavelengths).rgb(),
    )
    spectra, hidden, titles = [], [], []
    for number, tile in enumerate(tiles[:2]):
        for shown in (True, False):
            places = np.argwhere(tile["hidden_pixels"] != shown)
            if not len(places):
                # a model may hide channels alone
                continue
            row, column = places[len(places) // 2]
            spectra.append(
                {"target": tile["target"][:, row, column]}
                | {"reconstruction": tile["fillings"]["Hyper-MAE"][:, row, column]}
                | {"interpolation": tile["fillings"][interpolated][:, row, column]}
            )
            hidden.append(tile["hidden_channels"] | (not shown))
            titles.append(f"tile {number}, row {row}, column {column}: position {'shown' if shown else 'hidden'}")
    save_spectra(folder / "spectra.png", wavelengths, np.stack(hidden), spectra, titles)


def _save_curves(path: Path, history: Sequence[Mapping[str, float]], kept: float) -> None:
    epochs = [row["epoch"] for row in history]
    panels = {
        part: {
            name: (epochs, [row.get(f"{key}/{part}", float("nan")) for row in history])
            for name, key in (("training", "train"), ("validation", "val"))
        }
        for part in ("loss", "position loss", "channel loss")
    }
    panels["learning rate"] = {"AdamW": (epochs, [row["learning rate"] for row in history])}
    save_curves(path, panels, kept)
