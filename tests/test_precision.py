from pathlib import Path
from typing import get_args

import pytest
import torch
from lightning.fabric.connector import _PRECISION_INPUT_STR

from vision_lowrank.errors import ConfigError
from vision_lowrank.precision import PRECISIONS, choose_precision, processor_has_bf16


def set_hardware(monkeypatch, cpu, gpu, gpu_bf16):
    monkeypatch.setattr("vision_lowrank.precision.processor_has_bf16", lambda: cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu_bf16)


@pytest.mark.parametrize(
    ("cpu", "gpu", "gpu_bf16", "accelerator", "expected"),
    [
        (True, False, False, "auto", "bf16-mixed"),
        (True, False, False, "cpu", "bf16-mixed"),
        (False, False, False, "auto", "32-true"),
        (False, True, True, "auto", "bf16-mixed"),
        (False, True, True, "cpu", "32-true"),
        (True, True, False, "gpu", "32-true"),
        (False, True, True, "cuda", "bf16-mixed"),
        (True, False, True, "gpu", "32-true"),
        (True, False, False, "mps", "32-true"),
    ],
)
def test_auto_follows_the_device_that_is_used(monkeypatch, cpu, gpu, gpu_bf16, accelerator, expected):
    set_hardware(monkeypatch, cpu, gpu, gpu_bf16)
    assert choose_precision("auto", accelerator) == expected


def test_a_choice_is_kept(monkeypatch):
    set_hardware(monkeypatch, True, True, True)
    assert choose_precision("32-true") == "32-true"
    assert set(PRECISIONS) - {"auto"} <= set(get_args(_PRECISION_INPUT_STR))


def test_misspelt_precision_is_refused():
    with pytest.raises(ConfigError, match=r"'bf17'.*bf16-mixed"):
        choose_precision("bf17")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux lists processor flags there")
def test_processor_flag_agrees_with_the_kernel():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert processor_has_bf16() == bool(flags & {"avx512_bf16", "amx_tile"})
