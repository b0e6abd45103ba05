"""The one place that decides in which number format, and on which device, work is done."""

import torch

from vision_lowrank.errors import ConfigError

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")


def choose_precision(requested: str = "auto", accelerator: str = "auto") -> str:
    """Returns Lightning's precision string.

    Args:
        requested: one of `PRECISIONS`. "auto" means bf16 autocast where the hardware multiplies bf16 matrices itself
            (CPU with AVX512-BF16 or AMX, NVIDIA GPU since Ampere) and float32 elsewhere, where bf16 would be emulated.
        accelerator: Lightning's name of the device that will be used: "cpu", "gpu", "cuda", "mps" or "auto".

    Raises:
        ConfigError: `requested` is none of `PRECISIONS`.
    """
    if requested not in PRECISIONS:
        raise ConfigError(f"trainer.precision={requested!r}: use one of {', '.join(PRECISIONS)}")
    if requested != "auto":
        return requested
    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available()):
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    elif accelerator in ("cpu", "auto"):
        native = processor_has_bf16()
    else:
        native = False
    return "bf16-mixed" if native else "32-true"


def processor_has_bf16() -> bool:
    """Tells whether the processor has bf16 matrix instructions, and this torch uses them."""
    # the public torch.cpu.get_capabilities() is younger than our lower bound of torch
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose_device(requested: str) -> str:
    """Returns the device of that name, for "auto" a GPU where there is one.

    Raises:
        ConfigError: there is no such device.
    """
    if requested != "auto":
        try:
            torch.empty(0, device=requested)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"device={requested}: not to be had here ({reason}); give auto or cpu") from None
        return requested
    return "cuda" if torch.cuda.is_available() else "cpu"
