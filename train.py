"""Trains, adapts and pretrains: python train.py experiment=NAME [key=value ...]; see configs/."""

import hydra
from omegaconf import DictConfig

from vision_lowrank.console import run_as_command, start
from vision_lowrank.training import train


@hydra.main(config_path="configs", config_name="train", version_base="1.3")
def main(config: DictConfig) -> None:
    """Runs the experiment that `config` describes; exits with status 2 after an error that the user can mend."""
    run_as_command(lambda: train(config))


if __name__ == "__main__":
    start(main)
