"""Applies a run to a scene: python -m vision_lowrank.predict weights=RUN scene=CARD_OR_FILE out=map.tif.

The scene is read, and the map written, by windows, so that neither has to fit into memory; see docs/whole_scenes.md.
"""

import dataclasses
import logging
import time
from pathlib import Path

import hydra
import numpy as np
from omegaconf import DictConfig
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from vision_lowrank.console import run_as_command, start
from vision_lowrank.data.streams import GEOTIFF, SceneStream, open_stream, plan_windows, read_scaled
from vision_lowrank.errors import ConfigError
from vision_lowrank.plots.rasters import NODATA
from vision_lowrank.precision import choose_device, choose_precision
from vision_lowrank.prediction_files import Grid, Parts, write_geotiff
from vision_lowrank.predictors import Predictor, make_predictor
from vision_lowrank.runs import check_command, check_writable
from vision_lowrank.shipped import CONFIGS
from vision_lowrank.trained_run import TrainedRun, load_run

# least height of a window in pixels; what is read twice for the margins of windows shrinks with it
SIDE = 256
# tiles of a GeoTIFF are a multiple of it
TIFF_STEP = 16
# pixels along the side of a sample of a scene
SAMPLE = 16
# scenes of one sensor do not differ so much in how their values vary; reflectances and percentages do
OTHER_UNIT = 50

logger = logging.getLogger(__name__)


def predict(config: DictConfig) -> list[Path]:
    """Writes the map, or the embeddings, of a scene.

    Args:
        config: as composed from `configs/predict/predict.yaml`.

    Returns:
        The files written.

    Raises:
        VisionLowRankError: run, scene or an option is wrong; all that can be checked before work starts is.
        OSError: a file cannot be written.
    """
    begun = time.perf_counter()
    check_command(config, weights=str, scene=str, out=str, probabilities=str | None, root=str)
    out, probabilities = _outputs(config)
    run = load_run(config.weights)
    stream = open_stream(config.scene, config.root)
    for path in (out, probabilities):
        if path is not None and path.resolve() in {file.resolve() for file in stream.files}:
            raise ConfigError(f"{path} is the scene itself; give another name to the map")
    channels = stream.channels_like(run.bands, run.kept, run.card.shape.channels)
    if stream.nodata is None and run.card.nodata is not None:
        logger.info("%s tells no value of missing pixels: taken to be %g, as in training", stream.name, run.card.nodata)
        stream = dataclasses.replace(stream, nodata=run.card.nodata)
    if stream.bands is None:
        logger.info("%s tells no wavelengths: taken to be those of %s", stream.name, run.card.name)
    _compare_units(stream, channels, run)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, "gpu" if device.startswith("cuda") else device)
    gsd = run.card.gsd if stream.gsd is None else stream.gsd
    predictor = make_predictor(run, config.what, gsd, precision, device)
    stream.check_margin(predictor.margin)
    step = TIFF_STEP * predictor.scale
    side = step * -(-SIDE // step)
    windows = plan_windows(stream.height, stream.width, len(channels), side, predictor.margin)
    grid = Grid(windows, stream.height, stream.width, predictor.scale, side, stream.georeference)
    identity = {
        "weights": run.digest,
        "scene": [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in stream.files],
        "meaning": [
            repr(stream.nodata),
            stream.gsd,
            None if stream.bands is None else stream.bands.wavelengths.tolist(),
        ],
        "run": run.data,
        "outputs": [config.what] if probabilities is None else [config.what, "probabilities"],
        "precision": precision,
        "windows": [len(windows), side],
    }
    if probabilities is not None:
        check_writable(probabilities)
    parts = Parts(out, identity)
    _fill(parts, run, stream, channels, predictor, grid, config.what, probabilities is not None)
    written = _write(parts, run, predictor, grid, config.what, out, probabilities)
    parts.remove()
    seconds = time.perf_counter() - begun
    logger.info("%d x %d pixels in %.1f s: %s", stream.height, stream.width, seconds, ", ".join(map(str, written)))
    return written


def _outputs(config: DictConfig) -> tuple[Path, Path | None]:
    """Returns the files to write after checking the options about them."""
    if config.what not in ("classes", "embeddings"):
        raise ConfigError(f"what={config.what}: it can be classes or embeddings")
    if config.probabilities is not None and config.what != "classes":
        raise ConfigError("probabilities go with what=classes; leave them out")
    out = Path(config.out)
    probabilities = None if config.probabilities is None else Path(config.probabilities)
    for name, path in (("out", out), ("probabilities", probabilities)):
        if path is not None and (path.suffix.lower() not in GEOTIFF or path.is_dir()):
            raise ConfigError(f"{name}={path}: give the name of a GeoTIFF file, ending in .tif")
    if probabilities is not None and probabilities.resolve() == out.resolve():
        raise ConfigError(f"probabilities={probabilities} is also out; give two names")
    return out, probabilities


def _compare_units(stream: SceneStream, channels: np.ndarray, run: TrainedRun) -> None:
    """Warns of a scene whose values, as samples of it show, can hardly be in the units of training."""
    samples = []
    for top in np.linspace(0, max(0, stream.height - SAMPLE), 4, dtype=int).tolist():
        for left in np.linspace(0, max(0, stream.width - SAMPLE), 4, dtype=int).tolist():
            rows = slice(top, min(top + SAMPLE, stream.height))
            values, valid = stream.read(channels, rows, slice(left, min(left + SAMPLE, stream.width)))
            samples.append(values[:, valid])
    spectra = np.concatenate(samples, axis=1).T
    spread = run.preprocessor.spread(spectra) if len(spectra) else 1.0
    if not 1 / OTHER_UNIT < spread < OTHER_UNIT:
        logger.warning(
            "%s: values vary %.2g times as much as those of %s did; if they are in another unit, give a scene in that "
            "of training",
            stream.name, spread, run.card.name,
        )  # fmt: skip


def _fill(
    parts: Parts,
    run: TrainedRun,
    stream: SceneStream,
    channels: np.ndarray,
    predictor: Predictor,
    grid: Grid,
    what: str,
    probabilities: bool,
) -> None:
    """Predicts the windows that are not finished."""
    missing = parts.missing(len(grid.windows))
    if len(missing) < len(grid.windows):
        logger.info("%d of %d windows are finished already", len(grid.windows) - len(missing), len(grid.windows))
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        pixels = sum(grid.windows[index].height * grid.windows[index].width for index in missing)
        bar = progress.add_task(f"predicting {what}", total=pixels)
        for index in missing:
            window = grid.windows[index]
            image, valid = read_scaled(stream, channels, run.preprocessor, window, predictor.margin)
            values = predictor(image, window.top, window.left, lambda count: progress.advance(bar, count))
            parts.save(index, _arrays(values, valid, predictor.scale, what, probabilities))


def _arrays(values: np.ndarray, valid: np.ndarray, scale: int, what: str, probabilities: bool) -> dict[str, np.ndarray]:
    """Returns what is kept of a window, without values where no pixel of a cell has values."""
    present = np.add.reduceat(np.add.reduceat(valid, range(0, valid.shape[0], scale), axis=0, dtype=int),
                              range(0, valid.shape[1], scale), axis=1) > 0  # fmt: skip
    known = np.where(present, values, np.float32(np.nan))
    if what == "embeddings":
        return {what: known}
    arrays = {what: np.where(present, values.argmax(axis=0), NODATA).astype(np.uint8)[None]}
    return {**arrays, "probabilities": known} if probabilities else arrays


def _write(
    parts: Parts, run: TrainedRun, predictor: Predictor, grid: Grid, what: str, out: Path, probabilities: Path | None
) -> list[Path]:
    """Makes GeoTIFFs of the finished windows; the map is the last."""
    classes = {entry.name: entry.colour for entry in run.card.classes}
    if what == "embeddings":
        write_geotiff(out, parts, what, grid, [f"embedding {index}" for index in range(predictor.outputs)])
        return [out]
    if probabilities is not None:
        write_geotiff(probabilities, parts, "probabilities", grid, list(classes))
    write_geotiff(out, parts, what, grid, ["class"], classes)
    return [out] if probabilities is None else [out, probabilities]


@hydra.main(config_path=str(CONFIGS / "predict"), config_name="predict", version_base="1.3")
def main(config: DictConfig) -> None:
    """Predicts what `config` describes; exits with status 2 after an error that the user can mend."""
    run_as_command(lambda: predict(config))


if __name__ == "__main__":
    start(main)
