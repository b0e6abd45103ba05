"""How much memory a block of code takes, and how much a step of training does."""

import copy
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from vision_lowrank.inference import autocast

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Context manager that measures by how much the memory in use rises at its highest.

    On a GPU what PyTorch allocates there, on the CPU of a Linux machine the pages of the process.

    Args:
        device: where the work is done.

    Attributes:
        megabytes: the rise after the block; None where it cannot be told.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.megabytes: float | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before: float | None = torch.cuda.memory_allocated(self.device) / 1e6
        else:
            self._before = self._pages("VmRSS") if self._reset() else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is None:
            return
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) / 1e6 if on_gpu else self._pages("VmHWM")
        self.megabytes = max(0.0, peak - self._before)

    @staticmethod
    def _reset() -> bool:
        """Makes the kernel forget the peak so far; returns whether it can."""
        try:
            _RESET.write_text("5")
        except OSError:
            return False
        return True

    @staticmethod
    def _pages(name: str) -> float:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


def step_bytes(task: nn.Module, batch: Mapping[str, Tensor], precision: str) -> int:
    """Counts what a training step holds: weights, what the backward pass needs of the forward pass, AdamW's tensors.

    A sum of sizes, the same on every machine, of what is alive when the backward pass begins, with gradients and two
    moments for each trained parameter; temporary results within a layer are not in it.

    Args:
        task: maps a batch to logits; left as it is.
        batch: of the loader.
        precision: Lightning's precision string; "…-mixed" means autocast.
    """
    task = copy.deepcopy(task).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*task.parameters(), *task.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    kind = next(task.parameters()).device.type
    with (
        torch.random.fork_rng(),
        autocast(kind, precision),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        # the graph holds the tensors, so that no two of them are counted at one address
        logits = task({name: value.to(kind) for name, value in batch.items()})
    assert logits.requires_grad
    held = sum(tensor.numel() * tensor.element_size() for tensor in [*task.parameters(), *task.buffers()])
    trained = sum(p.numel() * p.element_size() for p in task.parameters() if p.requires_grad)
    return held + sum(kept.values()) + 3 * trained
