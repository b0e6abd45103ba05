"""How much memory a block of code takes."""

from pathlib import Path
from types import TracebackType

import torch

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
