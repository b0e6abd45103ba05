"""Lightning data module for training without labels: tiles of several sources, standardised and batched by source."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vision_lowrank.argument_types import check_least
from vision_lowrank.data.bands import Bands
from vision_lowrank.data.tiles import TileSource
from vision_lowrank.errors import ConfigError, DataError
from vision_lowrank.processes import current_place, share_of

logger = logging.getLogger(__name__)

Loader = DataLoader[dict[str, Tensor]]
# a source by its number, a tile by its position in the source's subset
Place = tuple[int, int]


class TileSubset:
    """Tiles of one subset of a source as standardised samples.

    Args:
        name: of the source, for the log.
        source: where the tiles are.
        indices: of its tiles, int64 (tiles,).
        mean: of each band, float32 (channels,).
        deviation: likewise the standard deviation; 0 makes a band 0 everywhere.
    """

    def __init__(
        self, name: str, source: TileSource, indices: np.ndarray, mean: np.ndarray, deviation: np.ndarray
    ) -> None:
        self.name = name
        self.source = source
        self.indices = indices
        self.mean = mean[:, None, None]
        self.gain = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 0)[:, None, None]
        self.wavelengths = torch.from_numpy(source.bands.wavelengths)
        self.gsd = torch.tensor(source.gsd, dtype=torch.float32)
        self.empty: set[int] = set()

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, position: int) -> dict[str, Tensor]:
        """Returns a tile, or where no pixel of it is valid the next one that has some.

        Returns:
            `image` float32 (channels, size, size), 0 where not `valid`; `valid` bool (size, size), where every band has
            a value; `wavelengths` float32 (channels,) in nanometres; `gsd` float32 () in metres.

        Raises:
            DataError: no tile of the subset has a valid pixel, or too many files are damaged.
        """
        for offset in range(len(self)):
            index = int(self.indices[(position + offset) % len(self)])
            if index in self.empty:
                continue
            tile = self.source.read(index)
            valid = np.isfinite(tile).all(axis=0)
            if valid.any():
                image = np.where(valid, (tile - self.mean) * self.gain, np.float32(0))
                return {
                    "image": torch.from_numpy(image),
                    "valid": torch.from_numpy(valid),
                    "wavelengths": self.wavelengths,
                    "gsd": self.gsd,
                }
            self.empty.add(index)
            logger.info("%s: tile %d has no valid pixel, %d so far; the next", self.name, index, len(self.empty))
        raise DataError(f"source {self.name}: none of {len(self)} tiles has a valid pixel; check `nodata` and files")


class TileDataset(Dataset[dict[str, Tensor]]):
    """Samples of several sources, asked for by the number of the source and the position in its subset."""

    def __init__(self, subsets: Sequence[TileSubset]) -> None:
        self.subsets = subsets

    def __len__(self) -> int:
        return sum(len(subset) for subset in self.subsets)

    def __getitem__(self, place: Place) -> dict[str, Tensor]:
        number, position = place
        return self.subsets[number].sample(position)


class MixedBatches(Sampler[list[Place]]):
    """Batches of one source each, sources in turn as often as their sizes ask, in an order of seed and epoch alone.

    A source gives full batches only, unless it is smaller than one; what remains waits for another epoch. All processes
    draw the same batches and each takes its share of every one, so that a step sees one source on all of them.

    Args:
        lengths: tiles of each source.
        batch_size: tiles in a batch, over all processes together.
        seed: of all orders.
        rank: number of this process.
        processes: how many there are.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, rank: int, processes: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.processes = processes
        self.epoch = 0
        # Lightning looks for `set_epoch` at a batch sampler's own sampler only
        self.sampler = self
        if min(batch_size, *lengths) < processes:
            raise ConfigError(
                f"batches of {batch_size} from sources of {', '.join(map(str, lengths))} training tiles are too small "
                f"for {processes} processes; lower trainer.devices, or raise data.batch_size"
            )

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch; Lightning calls it. Without it, each pass counts as one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self._batches(length) for length in self.lengths)

    def __iter__(self) -> Iterator[list[Place]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        self.epoch += 1
        orders = [generator.permutation(length) for length in self.lengths]
        owners = np.repeat(np.arange(len(orders)), [self._batches(length) for length in self.lengths])
        starts = np.concatenate([self.batch_size * np.arange(self._batches(length)) for length in self.lengths])
        for batch in generator.permutation(len(owners)).tolist():
            number, start = int(owners[batch]), int(starts[batch])
            whole = orders[number][start : start + self.batch_size].tolist()
            yield [(number, position) for position in share_of(whole, (self.rank, self.processes))]

    def _batches(self, length: int) -> int:
        return max(1, length // self.batch_size)


class TileDataModule(L.LightningDataModule):
    """Tiles of several sources, standardised for each band of each source by its training tiles.

    Give the Trainer `use_distributed_sampler=False`: batches of training and validation are shared among processes
    already.

    Args:
        sources: tile sources by name.
        batch_size: of a training step, over all processes together.
        evaluation_batch_size: of validation and test.
        seed: of the order of training tiles and of the choice for statistics.
        num_workers: loader processes.
        statistics_tiles: training tiles of each source that mean and deviation are taken from, at most.
    """

    def __init__(
        self,
        sources: Mapping[str, TileSource],
        batch_size: int,
        evaluation_batch_size: int,
        seed: int,
        num_workers: int = 0,
        statistics_tiles: int = 256,
    ) -> None:
        super().__init__()
        if not sources:
            raise ConfigError("sources is empty; give at least one source of tiles")
        check_least(1, batch_size=batch_size, evaluation_batch_size=evaluation_batch_size)
        check_least(1, statistics_tiles=statistics_tiles)
        check_least(0, num_workers=num_workers, seed=seed)
        self.sources = dict(sources)
        self.batch_size = batch_size
        self.evaluation_batch_size = evaluation_batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.statistics_tiles = statistics_tiles
        self._statistics: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def prepare_data(self) -> None:
        """Fetches missing files; Lightning calls it on one process only."""
        for source in self.sources.values():
            source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Opens the sources and takes the statistics; once."""
        if self._statistics:
            return
        for source in self.sources.values():
            source.setup()
        self._statistics = {
            name: fit_statistics(name, source, self.statistics_tiles, self.seed)
            for name, source in self.sources.items()
        }

    def statistics(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns mean and standard deviation of each band of a source, float32 (channels,); constant bands have 0."""
        return self._statistics[name]

    def bands(self, name: str) -> Bands:
        """Returns the bands of the samples of a source."""
        return self.sources[name].bands

    def train_dataloader(self) -> Loader:
        """Returns the training tiles in an order that seed and epoch tell; each process gets its share."""
        dataset = self._dataset("train")
        lengths = [len(subset) for subset in dataset.subsets]
        return self._loader(dataset, MixedBatches(lengths, self.batch_size, self.seed, *current_place()))

    def val_dataloader(self) -> Loader:
        """Returns the validation tiles, one source after the other; each process gets its share of every batch.

        Raises:
            ConfigError: the first batch has fewer tiles than there are processes.
        """
        place = current_place()
        dataset = self._dataset("validation")
        batches = self._ordered(dataset)
        if batches and len(batches[0]) < place[1]:
            raise ConfigError(
                f"a batch of {len(batches[0])} validation tiles is too small for {place[1]} processes; lower "
                "trainer.devices, or raise data.evaluation_batch_size"
            )
        return self._loader(dataset, [share for batch in batches if (share := share_of(batch, place))])

    def test_dataloader(self) -> Loader:
        """Returns the test tiles, one source after the other; every process gets all."""
        dataset = self._dataset("test")
        return self._loader(dataset, self._ordered(dataset))

    def held_out_dataloader(self) -> Loader:
        """Returns the test tiles, or where there are none the validation tiles, as `test_dataloader`."""
        if any(source.test.size for source in self.sources.values()):
            return self.test_dataloader()
        dataset = self._dataset("validation")
        return self._loader(dataset, self._ordered(dataset))

    def _dataset(self, subset: str) -> TileDataset:
        return TileDataset(
            [
                TileSubset(name, source, getattr(source, subset), *self._statistics[name])
                for name, source in self.sources.items()
            ]
        )

    def _ordered(self, dataset: TileDataset) -> list[list[Place]]:
        return [
            [(number, position) for position in range(start, min(start + self.evaluation_batch_size, len(subset)))]
            for number, subset in enumerate(dataset.subsets)
            for start in range(0, len(subset), self.evaluation_batch_size)
        ]

    def _loader(self, dataset: TileDataset, batches: Any) -> Loader:
        # workers that stay remember which files are damaged and which tiles are empty
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=stack_samples,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


def fit_statistics(name: str, source: TileSource, tiles: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Takes mean and standard deviation of each band over the valid pixels of some training tiles.

    Args:
        name: of the source, for errors.
        source: set up.
        tiles: how many to read at most.
        seed: of their choice.

    Returns:
        float32 (channels,) each; a band without variation has deviation 0.

    Raises:
        DataError: no pixel of these tiles has a value in every band.
    """
    chosen = np.sort(np.random.default_rng(seed).permutation(source.train)[:tiles])
    count = 0
    mean = np.zeros(len(source.bands))
    squares = np.zeros(len(source.bands))
    for index in chosen.tolist():
        tile = source.read(index)
        pixels = tile[:, np.isfinite(tile).all(axis=0)].astype(np.float64)
        if not pixels.size:
            continue
        # sums of squares of large numbers would cancel: Chan's update joins deviations instead
        added = pixels.shape[1]
        step = pixels.mean(axis=1) - mean
        squares += pixels.var(axis=1) * added + step**2 * (count * added / (count + added))
        count += added
        mean += step * (added / count)
    if not count:
        raise DataError(
            f"source {name}: no pixel of {len(chosen)} training tiles has a value in every band; check `nodata`"
        )
    # float64 sums of equal float32 values are exact, so a constant band has a deviation of 0 and no less
    return mean.astype(np.float32), np.sqrt(squares / count).astype(np.float32)


def stack_samples(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns samples of one source as a batch, with a leading batch axis on each entry."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
