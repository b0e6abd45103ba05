"""Predicts as the command does, in smaller windows where the file is smaller, and prints the memory in megabytes.

python tests/large_prediction.py BYTES_OF_THE_CUBE weights=RUN scene=FILE out=MAP.tif
First the rise of the peak by the prediction, then the peak of the whole process.
"""

import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from vision_lowrank.console import run_as_command
from vision_lowrank.data import streams
from vision_lowrank.memory import PeakMemory
from vision_lowrank.predict import predict

# bytes in float32 of the scene for which the windows have their usual size
LARGE = 14.4e9
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "predict"


def main(size: str, *overrides: str) -> None:
    share = min(1.0, int(size) / LARGE)
    streams.WINDOW_BYTES = max(8 << 20, int(share * streams.WINDOW_BYTES))
    streams.BLOCK_CACHE = max(8, int(share * streams.BLOCK_CACHE))
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("predict", list(overrides))
    with PeakMemory(torch.device("cpu")) as memory:
        run_as_command(lambda: predict(config))
    lines = Path("/proc/self/status").read_text().splitlines()
    print(memory.megabytes, next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6)


if __name__ == "__main__":
    main(*sys.argv[1:])
