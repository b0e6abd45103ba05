"""Several processes that train as one: which of them this is, what it works on, and sums over all of them.

What one process does with a batch, several do with their shares of it: random choices about samples are drawn for the
whole batch by each of them, and means are over the whole batch. The rank is that within torch.distributed; before that
is set up, and outside of a training, a process is alone.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from vision_lowrank.errors import ConfigError

# more than any training has steps, so that the seeds of two processes never meet
SEEDS_APART = 1_000_000_007

# the number of this process, and how many there are
Place = tuple[int, int]
ALONE: Place = (0, 1)

Samples = TypeVar("Samples", bound=Sequence[Any] | Tensor)


def current_place() -> Place:
    """Returns rank and number of the processes that train together, (0, 1) where there is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return dist.get_rank(), dist.get_world_size()


def share_of(samples: Samples, place: Place) -> Samples:
    """Returns those of the samples, or rows, of a whole batch that the process in this place works on."""
    rank, processes = place
    return samples[rank::processes]  # type: ignore[return-value]


def draw_apart() -> None:
    """Lets the processes draw different numbers from here on, where they have drawn the same; process 0 goes on."""
    rank, _ = current_place()
    if rank:
        torch.manual_seed(torch.initial_seed() + SEEDS_APART * rank)


def sum_over_processes(value: Tensor) -> Tensor:
    """Returns the sum over all processes; gradients flow back to each of them."""
    if current_place()[1] == 1:
        return value
    total: Tensor = _Sum.apply(value)
    return total


def mean_over_processes(value: Tensor) -> Tensor:
    """Returns the mean over all processes, of which each weighs the same."""
    return sum_over_processes(value) / current_place()[1]


def total_over_processes(count: int, device: torch.device) -> int:
    """Returns the sum of numbers of samples.

    Args:
        count: of this process.
        device: where it works.
    """
    return int(sum_over_processes(torch.tensor(count, device=device)))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradients[0])


class SharedBatches(Sampler[list[int]]):
    """Batches of samples, of which each process gets its share.

    Args:
        sampler: order of all samples; Lightning tells the epoch to what is called so.
        batch_size: over all processes together.
        evaluation: every sample counts once, and a process may have a step less than another. In training all have
            equally many, so that a last batch with fewer samples than processes waits for the next epoch.
        drop_last: leave out a last batch that is not full.
    """

    def __init__(
        self, sampler: Sampler[int] | Sequence[int], batch_size: int, evaluation: bool = False, drop_last: bool = False
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.evaluation = evaluation
        self.drop_last = drop_last

    def __len__(self) -> int:
        return len(self._starts(current_place()))

    def __iter__(self) -> Iterator[list[int]]:
        """Yields the positions of this process's samples.

        Raises:
            ConfigError: some process would have none.
        """
        return self.of(current_place())

    def of(self, place: Place) -> Iterator[list[int]]:
        """Yields the positions of the samples of the process in this place; of whole batches for `ALONE`.

        Raises:
            ConfigError: as iteration.
        """
        order = list(self.sampler)
        for start in self._starts(place):
            yield list(share_of(order[start : start + self.batch_size], place))

    def _starts(self, place: Place) -> range:
        """Returns where the batches begin of which the process in this place has a share."""
        rank, processes = place
        total = len(self.sampler)  # type: ignore[arg-type]
        if processes > 1 and min(total, self.batch_size) < processes:
            raise ConfigError(
                f"{total} samples in batches of {self.batch_size} are too few for {processes} processes; lower "
                "trainer.devices, or raise data.batch_size and data.evaluation_batch_size"
            )
        least = self.batch_size if self.drop_last else rank + 1 if self.evaluation else processes
        return range(0, max(0, total - least + 1), self.batch_size)
