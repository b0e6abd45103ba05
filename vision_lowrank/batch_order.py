"""Which samples a loader's batches are made of, epoch by epoch, told by its sampler alone."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader


def choose_epoch(loader: DataLoader[Any], epoch: int) -> None:
    """Tells the samplers of a loader the epoch, as far as they ask for it; iterators made after that follow it."""
    samplers: Any = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    for sampler in samplers:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)


def samples_of_batch(loader: DataLoader[Any], epoch: int, batch: int) -> Sequence[Any]:
    """Returns what the data set was asked for to make a batch of an epoch, both counted from 0."""
    choose_epoch(loader, epoch)
    batches: Any = loader.batch_sampler
    return list(next(islice(iter(batches), batch, None)))
