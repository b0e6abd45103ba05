"""Command line: python -m vision_lowrank.composer.convert SOURCE TARGET.safetensors [--force]."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vision_lowrank.composer.lora_files import LoraFileError, LoraWeights, LowRank, read_lora, write_lora
from vision_lowrank.composer.lora_layouts import COMPONENTS
from vision_lowrank.console import run_as_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Converts a LoRA of any layout that is read to safetensors in the layout of diffusers, and says what it holds.

    Raises:
        LoraFileError: the source cannot be read, or the target exists and --force is not given.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vision_lowrank.composer.convert",
        description="Converts a LoRA file (Mix-of-Show, peft, diffusers, kohya) to safetensors for diffusers.",
    )
    parser.add_argument("source", type=Path, help="a LoRA file, or the folder that peft or diffusers wrote")
    parser.add_argument("target", type=Path, help="the file to write, NAME.safetensors")
    parser.add_argument("--force", action="store_true", help="replace the target if it exists")
    options = parser.parse_args(arguments)
    if options.target.exists() and not options.force:
        raise LoraFileError(f"{options.target} exists: choose another name, or replace it with --force")
    lora = read_lora(options.source)
    write_lora(lora, options.target)
    for line in summary(lora):
        print(line)
    print(f"written: {options.target}")


def summary(lora: LoraWeights) -> Iterator[str]:
    """Gives lines on the layers, ranks, scales and tokens of a LoRA."""
    for component in COMPONENTS:
        changes: Mapping[str, LowRank] = getattr(lora, component)
        if changes:
            ranks = ", ".join(str(rank) for rank in sorted({change.rank for change in changes.values()}))
            scales = ", ".join(f"{scale:g}" for scale in sorted({change.scale for change in changes.values()}))
            yield f"{component}: {len(changes)} layers, rank {ranks}, scale {scales}"
    for name, tokens in (("text_encoder", lora.tokens), ("text_encoder_2", lora.tokens_2)):
        for token, embedding in tokens.items():
            rows, width = embedding.shape
            yield f"token {token} of {name}: {rows} x {width}"


if __name__ == "__main__":
    run_as_command(main)
