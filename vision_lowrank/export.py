"""Makes a run a file that needs no code of ours: python -m vision_lowrank.export weights=RUN out=model.onnx|model.pt2.

    image (B, C, S, S), values as in the scene's files -> scaled -> logits (B, K), or of every pixel (B, K, S, S)

`B` batch, any; `C` channels that the run was trained on, `S` side of its patches or windows, `K` classes. Scaling,
wavelengths and pixel size of the run are part of the graph, adapters are merged where they can be. See docs/export.md.
"""

import importlib.util
import logging
import math
from pathlib import Path

import hydra
import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vision_lowrank.console import run_as_command, start
from vision_lowrank.errors import CheckpointError, ConfigError
from vision_lowrank.models import LolaSpecViT
from vision_lowrank.predictors import WindowPredictor
from vision_lowrank.runs import atomic_path, check_command, check_writable, write_json
from vision_lowrank.shipped import CONFIGS
from vision_lowrank.trained_run import TrainedRun, load_run

# of the extra `onnx`
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# batches that a written file is compared on, and the largest difference of a logit, relative to the largest logit
CHECKED = (1, 2, 5)
TOLERANCE = 1e-4

logger = logging.getLogger(__name__)


class ScaledModel(nn.Module):
    """A run's model behind its scaling; a pixel without a value in every channel counts as the mean spectrum.

    The card's nodata is no value; what a file of training may name itself, the run does not know.

    Args:
        run: its model becomes a part of this module.

    Attributes:
        side: pixels along a side of the image.
    """

    mean: Tensor
    gain: Tensor
    matrix: Tensor

    def __init__(self, run: TrainedRun) -> None:
        super().__init__()
        scaling = run.preprocessor
        self.model = run.model
        # all channels are scaled, and of LESS ViT perhaps a range of them used
        matrix = np.eye(len(scaling.mean), dtype=np.float32) if scaling.projection is None else scaling.projection
        shared = []
        if isinstance(run.model, LolaSpecViT):
            self.side = run.model.img_size
        else:
            windows = WindowPredictor(run, run.model, False, run.card.gsd, "32-true", "cpu")
            matrix, self.side, shared = matrix[windows.channels.numpy()], windows.size, windows.shared
        self.register_buffer("mean", torch.from_numpy(scaling.mean)[:, None, None])
        self.register_buffer("gain", torch.from_numpy(scaling.gain)[:, None, None])
        self.register_buffer("matrix", torch.from_numpy(np.ascontiguousarray(matrix)))
        self.brightness = scaling.brightness
        # as float32 holds it
        self.nodata = None if run.card.nodata is None else float(np.float32(run.card.nodata))
        self.count = len(shared)
        for number, value in enumerate(shared):
            self.register_buffer(f"shared_{number}", value)

    def forward(self, image: Tensor) -> Tensor:
        """Maps (B, C, S, S) to logits (B, K) or (B, K, S, S)."""
        known = image.isfinite()
        if self.nodata is not None:
            known = known & (image != self.nodata)
        known = known.all(dim=1, keepdim=True)
        if not self.brightness:
            # as `spectral_shape`
            image = image.clamp(min=1).log()
            image = image - image.mean(dim=1, keepdim=True)
        scaled = torch.where(known, (image - self.mean) * self.gain, 0.0)
        x = torch.einsum("kc,bchw->bkhw", self.matrix, scaled)
        # of the whole batch, not of each sample: comparing their shapes would tie the graph to sizes of batches
        logits: Tensor = self.model(x, *(self.get_buffer(f"shared_{number}") for number in range(self.count)))
        return logits


def export(config: DictConfig) -> list[Path]:
    """Writes a run as a graph and what is known of it as JSON; the graph is compared with the model before it is kept.

    Args:
        config: as composed from `configs/export/export.yaml`.

    Returns:
        The files written: graph, JSON.

    Raises:
        VisionLowRankError: run or option is wrong, a package is missing, or the graph computes something else.
        OSError: a file cannot be written.
    """
    check_command(config, weights=str, out=str)
    out = Path(config.out)
    if out.suffix not in (".onnx", ".pt2") or out.is_dir():
        raise ConfigError(f"out={out}: give the name of a file ending in .onnx or .pt2")
    if out.suffix == ".onnx" and (missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]):
        raise ConfigError(
            f"out={out}: {', '.join(missing)} not installed; pip install {' '.join(missing)}, or give a .pt2"
        )
    run = load_run(config.weights)
    check_writable(out)
    # with gradients wanted, tracing and ONNX take different kernels for attention, whose results lie otherwise
    model = ScaledModel(run).eval().requires_grad_(False)
    program = trace(model, len(run.bands))
    with atomic_path(out) as temporary:
        if out.suffix == ".pt2":
            # given a name, it tells of a full disk in an error of its own
            with temporary.open("wb") as file:
                torch.export.save(program, file)
        else:
            save_onnx(program, temporary)
        check(temporary, model, samples(run, model.side))
    about = out.with_suffix(".json")
    write_json(about, describe(run, model.side))
    logger.info("written to %s and %s", out, about)
    return [out, about]


def trace(model: ScaledModel, channels: int) -> ExportedProgram:
    """Returns the graph of a model in evaluation mode, for batches of any size."""
    example = torch.zeros(2, channels, model.side, model.side)
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes={"image": {0: Dim("batch", min=1)}})


def save_onnx(program: ExportedProgram, path: Path) -> None:
    """Writes a graph with its weights into one file; input `image`, output `logits`, the first axis of both free."""
    torch.onnx.export(
        program,
        (),
        path,
        input_names=["image"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )


def run_file(path: Path, image: Tensor) -> Tensor:
    """Returns the logits that a written file computes."""
    if path.suffix == ".pt2":
        loaded: Tensor = torch.export.load(path).module()(image)
        return loaded
    # an extra that nothing else needs
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])


def samples(run: TrainedRun, side: int) -> Tensor:
    """Returns images (B, C, S, S) with the mean and the spread of the training spectra, one pixel without value."""
    scaling = run.preprocessor
    spread = np.divide(1, scaling.gain, out=np.zeros_like(scaling.gain), where=scaling.gain > 0)
    noise = torch.randn(max(CHECKED), len(run.bands), side, side, generator=torch.Generator().manual_seed(0))
    parts = (torch.from_numpy(part)[:, None, None] for part in (scaling.mean, spread))
    mean, deviation = parts
    image = mean + deviation * noise
    if not scaling.brightness:
        # spectra of which that is the shape, at an arbitrary level above 1
        image = 1000 * image.exp()
    image[0, 0, 0, 0] = torch.nan
    return image


def check(path: Path, model: ScaledModel, image: Tensor) -> None:
    """Compares a written file with the model.

    Raises:
        CheckpointError: they differ.
    """
    for size in CHECKED:
        with torch.no_grad():
            expected = model(image[:size])
            found = run_file(path, image[:size])
        error = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
        if not error <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise CheckpointError(
                f"{path.suffix} of a batch of {size}: logits differ from the model's by {error:.1e}; it is not kept: "
                "try the other format"
            )


def describe(run: TrainedRun, side: int) -> dict[str, object]:
    """Returns what a user of the graph has to know, as JSON holds it."""
    pixelwise = not isinstance(run.model, LolaSpecViT)
    classes = len(run.card.classes)
    return {
        "model": type(run.model).__name__,
        "scene": run.card.name,
        "input": {"name": "image", "dtype": "float32", "shape": ["batch", len(run.bands), side, side]},
        "output": {"name": "logits", "shape": ["batch", classes, *([side, side] if pixelwise else [])]},
        "labels": "of every pixel" if pixelwise else "of the pixel in the centre",
        "classes": [{"name": entry.name, "colour": entry.colour} for entry in run.card.classes],
        "wavelengths": run.bands.wavelengths.tolist(),
        "channels_of_files": run.kept.tolist(),
        "gsd": run.card.gsd,
        # what is not finite is no value anyway
        "nodata": None if run.card.nodata is None or not math.isfinite(run.card.nodata) else run.card.nodata,
        "weights": run.digest,
    }


@hydra.main(config_path=str(CONFIGS / "export"), config_name="export", version_base="1.3")
def main(config: DictConfig) -> None:
    """Exports what `config` describes; exits with status 2 after an error that the user can mend."""
    run_as_command(lambda: export(config))


if __name__ == "__main__":
    start(main)
