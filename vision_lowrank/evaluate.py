"""Runs a benchmark: python -m vision_lowrank.evaluate benchmark=NAME [key=value ...]; see configs/."""

from collections.abc import Callable
from pathlib import Path

import hydra
from omegaconf import DictConfig

from vision_lowrank.composition_benchmark import run_composition
from vision_lowrank.console import run_as_command, start
from vision_lowrank.errors import ConfigError
from vision_lowrank.few_labels import run_few_labels
from vision_lowrank.raster_benchmark import run_raster_benchmark
from vision_lowrank.runs import check_command
from vision_lowrank.shipped import CONFIGS

BENCHMARKS: dict[str, Callable[[DictConfig], Path]] = {
    "composition": run_composition,
    "few_labels": run_few_labels,
    "raster": run_raster_benchmark,
}


@hydra.main(config_path=str(CONFIGS), config_name="evaluate", version_base="1.3")
def main(config: DictConfig) -> None:
    """Runs the benchmark that `config` describes; exits with status 2 after an error that the user can mend."""
    run_as_command(lambda: run(config))


def run(config: DictConfig) -> Path:
    """Runs the benchmark of the configuration and returns the folder of its table.

    Raises:
        VisionLowRankError: there is none of this kind, or anything else that the user can mend.
    """
    check_command(config, weights=str | None)
    kind = config.benchmark.kind
    if kind not in BENCHMARKS:
        raise ConfigError(f"benchmark.kind={kind}: it can be {', '.join(BENCHMARKS)}")
    return BENCHMARKS[kind](config)


if __name__ == "__main__":
    start(main)
