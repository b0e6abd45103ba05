"""A whole scene by `vision_lowrank.predict`, from the raw file to the written map, beside the model patch by patch.

python -m benchmarks.whole_scene [--height 550] [--width 400] [--bands 270] [--sizes small base] prints a table.
The scene is synthetic, uint16, by default of the size of WHU-Hi-LongKou; weights are random. Patch by patch, some rows
are predicted, in batches, and the time is multiplied; reading, scaling and writing are left out there. Both run with
as many threads as torch chooses. Memory is the peak of the process, libraries included.
"""

import argparse
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
import timm
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rasterio.windows import Window
from safetensors.numpy import save_file

import vision_lowrank.models  # noqa: F401  registers the models
from vision_lowrank.data.patches import gather_windows
from vision_lowrank.data.preprocessing import ScenePreprocessor
from vision_lowrank.inference import AUTOCAST
from vision_lowrank.precision import choose_precision
from vision_lowrank.predict import predict

CLASSES, COMPONENTS, PATCH = 9, 30, 13
BATCH = 128
CONFIGS = Path(__file__).resolve().parents[1] / "configs/predict"


def write_scene(path: Path, height: int, width: int, bands: int) -> np.ndarray:
    """Writes a scene of noisy stripes, never more than a few rows in memory, and returns some of its spectra."""
    generator = np.random.default_rng(0)
    spectra = generator.uniform(500, 4000, (CLASSES, bands))
    classes = np.arange(width) * CLASSES // width
    profile = {"driver": "GTiff", "height": height, "width": width, "count": bands, "dtype": "uint16"}
    with rasterio.open(
        path, "w", **profile, interleave="pixel", crs="EPSG:32633", transform=[0.5, 0, 0, 0, -0.5, 0]
    ) as file:
        for row in range(height):
            line = (spectra[classes] + generator.normal(0, 100, (width, bands))).clip(0).astype(np.uint16)
            file.write(line.T[:, None], window=Window(0, row, width, 1))
    return line.astype(np.float32)


def write_run(folder: Path, size: str, spectra: np.ndarray, shape: tuple[int, int, int]) -> torch.nn.Module:
    """Leaves what a run of `train.py` leaves, with random weights, and returns the model."""
    torch.manual_seed(0)
    model = timm.create_model(f"lola_specvit_{size}", in_chans=COMPONENTS, num_classes=CLASSES, img_size=PATCH).eval()
    model.save_pretrained(folder / "model")
    save_file(ScenePreprocessor(COMPONENTS, False).fit(spectra).state(), folder / "preprocessing.safetensors")
    bands, height, width = shape
    card = {
        "name": "synthetic",
        "title": "Synthetic",
        "sensor": "a random generator",
        "files": {"image": ["scene.tif"]},
        "shape": {"height": height, "width": width, "channels": bands},
        "bands": {"start": 400, "stop": 1000, "count": bands},
        "gsd": 0.5,
        "classes": [{"name": f"class {i}", "colour": f"#0000{i:02d}"} for i in range(CLASSES)],
        "licence": "CC0",
        "citation": "nobody",
    }
    (folder / "card.yaml").write_text(yaml.safe_dump(card))
    data = {"card": str(folder / "card.yaml"), "root": str(folder)}
    OmegaConf.save({"data": data, "regime": "full", "task": {}}, folder / "config.yaml")
    return model


def seconds_by_patch(model: torch.nn.Module, pixels: int, precision: str) -> float:
    """Returns the seconds for so many patches, cut out of a cube in batches and classified."""
    side = int(np.ceil(np.sqrt(pixels)))
    cube = torch.randn(COMPONENTS, side + PATCH - 1, side + PATCH - 1)
    corners = np.stack(np.divmod(np.arange(pixels), side), axis=1)
    dtype = AUTOCAST.get(precision)
    with torch.inference_mode(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        model(cube[None, :, :PATCH, :PATCH])
        begun = time.perf_counter()
        for start in range(0, pixels, BATCH):
            model(gather_windows(cube, corners[start : start + BATCH], PATCH)).float().softmax(1).argmax(1)
        return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--height", type=int, default=550)
    parser.add_argument("--width", type=int, default=400)
    parser.add_argument("--bands", type=int, default=270)
    parser.add_argument("--sizes", nargs="+", default=["small", "base"], choices=["tiny", "small", "base"])
    parser.add_argument("--precision", default="auto", help="auto, 32-true or bf16-mixed")
    parser.add_argument("--pixels", type=int, default=2048, help="patches that are predicted one by one")
    options = parser.parse_args()
    precision = choose_precision(options.precision, "cpu")
    total = options.height * options.width
    rows = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            spectra = write_scene(folder / "scene.tif", options.height, options.width, options.bands)
            model = write_run(folder, size, spectra, (options.bands, options.height, options.width))
            with initialize_config_dir(str(CONFIGS), version_base="1.3"):
                files = [f"scene={folder / 'scene.tif'}", f"out={folder / 'map.tif'}"]
                config = compose("predict", [f"weights={folder}", *files, f"precision={precision}", "device=cpu"])
            begun = time.perf_counter()
            predict(config)
            dense = time.perf_counter() - begun
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
        apart = seconds_by_patch(model, options.pixels, precision) * total / options.pixels
        rows.append(
            f"| {size} | {dense:.1f} | {1000 * dense / total:.3f} | {peak:.2f} | {apart:.1f} | {apart / dense:.1f} |"
        )
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{options.height} x {options.width} pixels, {options.bands} bands, {precision}\n")
    print("| model | file to map (s) | 1,000 pixels (s) | peak memory (GB) | by patch, reckoned (s) | times faster |")
    print("| :--- | ---: | ---: | ---: | ---: | ---: |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
