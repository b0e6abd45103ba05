"""The data module of tiles: statistics, samples, and the order of its batches."""

import logging
from collections import Counter

import lightning as L
import numpy as np
import pytest
import torch

from vision_lowrank.data.bands import Bands
from vision_lowrank.data.tile_module import MixedBatches, TileDataModule
from vision_lowrank.data.tiles import TileSource
from vision_lowrank.errors import ConfigError, DataError
from vision_lowrank.instantiate import instantiate


class ListedTiles(TileSource):
    """Tiles out of an array (tiles, channels, size, size); `reads` counts what was asked for."""

    def __init__(self, values, held_out=2, gsd=10.0):
        super().__init__(values.shape[-1], 1, 0.1, 0.1, 0)
        self.values = values.astype(np.float32)
        self.held_out = held_out
        self.gsd = gsd
        self.bands = Bands(np.linspace(450, 900, values.shape[1], dtype=np.float32))
        self.reads = Counter()
        self.openings = 0

    def prepare(self):
        pass

    def setup(self):
        self.openings += 1
        count = len(self.values) - 2 * self.held_out
        order = np.arange(len(self.values))
        self.train, self.validation, self.test = np.split(order, [count, count + self.held_out])

    def read(self, index):
        self.reads[index] += 1
        return self.values[index]


def numbered(count, channels):
    """Tiles of 2 x 2 pixels with their number in the first pixel of each band, noise in the others."""
    values = np.random.default_rng(5).normal(100, 30, (count, channels, 2, 2))
    values[:, :, 0, 0] = np.arange(count)[:, None]
    return values


def make(sources, setup=True, **options):
    arguments = {"batch_size": 4, "evaluation_batch_size": 3, "seed": 0}
    module = TileDataModule(sources, **(arguments | options))
    if setup:
        module.setup()
    return module


def order(module, loader):
    """Number of channels and tile numbers of each batch."""
    names = {len(source.bands): name for name, source in module.sources.items()}
    found = []
    for batch in loader:
        name = names[batch["image"].shape[1]]
        mean, deviation = module.statistics(name)
        first = batch["image"][:, 0, 0, 0].numpy() * deviation[0] + mean[0]
        found.append((name, np.rint(first).astype(int).tolist()))
    return found


def test_samples_are_standardised_by_valid_training_pixels():
    values = numbered(9, 3)
    values[1, 0, 1, 1] = np.nan
    values[6, 2, 0, 1] = np.inf
    # what is held out must not count
    values[5:] += 500
    source = ListedTiles(values, gsd=30.0)
    module = make({"a": source}, evaluation_batch_size=2)
    pixels = values[:5].transpose(0, 2, 3, 1).reshape(-1, 3)
    pixels = pixels[np.isfinite(pixels).all(1)]
    assert len(pixels) == 19
    mean, deviation = module.statistics("a")
    assert np.allclose(mean, pixels.mean(0))
    assert np.allclose(deviation, pixels.std(0))
    assert module.bands("a") is source.bands
    batches = list(module.val_dataloader()) + list(module.test_dataloader())
    assert [len(batch["image"]) for batch in batches] == [2, 2]
    scaled = (values[5:] - pixels.mean(0)[:, None, None]) / pixels.std(0)[:, None, None]
    scaled[1, :, 0, 1] = 0
    assert np.allclose(torch.cat([batch["image"] for batch in batches]), scaled, atol=1e-4)
    valid = np.ones((4, 2, 2), bool)
    valid[1, 0, 1] = False
    assert torch.cat([batch["valid"] for batch in batches]).tolist() == valid.tolist()
    assert batches[0]["wavelengths"].tolist() == [[450, 675, 900]] * 2
    assert batches[0]["gsd"].tolist() == [30, 30]
    assert {name: value.dtype for name, value in batches[0].items()} == {
        "image": torch.float32,
        "valid": torch.bool,
        "wavelengths": torch.float32,
        "gsd": torch.float32,
    }


def test_statistics_keep_small_variation_of_large_values():
    values = 60000 + np.random.default_rng(0).normal(0, 1, (30, 2, 2, 2)).astype(np.float32)
    mean, deviation = make({"a": ListedTiles(values)}).statistics("a")
    exact = values[:26].astype(np.float64).transpose(0, 2, 3, 1).reshape(-1, 2)
    assert np.allclose(mean, exact.mean(0), rtol=1e-6)
    assert np.allclose(deviation, exact.std(0), rtol=1e-5)


def test_a_band_without_variation_gives_zero():
    values = numbered(9, 3)
    values[:5, 1], values[5:, 1] = 0.1, 7
    values[:, 0, 0, 1] = np.nan
    module = make({"a": ListedTiles(values)})
    assert module.statistics("a")[1][1] == 0
    for batch in module.val_dataloader():
        assert (batch["image"][:, 1] == 0).all()
        assert torch.isfinite(batch["image"]).all()
        assert (batch["image"][:, 0][batch["valid"]] != 0).all()


def test_statistics_are_of_a_choice_that_the_seed_tells():
    def read(seed):
        source = ListedTiles(numbered(40, 2))
        make({"a": source}, statistics_tiles=6, seed=seed)
        return source.reads

    assert read(1) == read(1) != read(2)
    assert sum(read(1).values()) == len(read(1)) == 6
    assert max(read(1)) < 36


def test_setup_opens_the_sources_once():
    source = ListedTiles(numbered(9, 2))
    module = make({"a": source})
    reads = sum(source.reads.values())
    module.setup("fit")
    assert (source.openings, sum(source.reads.values())) == (1, reads)


def test_every_batch_is_full_and_of_one_source():
    module = make({"a": ListedTiles(numbered(30, 2)), "b": ListedTiles(numbered(15, 3))})
    loader = module.train_dataloader()
    batches = order(module, loader)
    # 26 and 11 training tiles
    assert Counter(name for name, _ in batches) == {"a": 6, "b": 2}
    assert len(loader) == 8
    assert {len(numbers) for _, numbers in batches} == {4}
    for name, length in (("a", 26), ("b", 11)):
        numbers = [number for owner, numbers in batches if owner == name for number in numbers]
        assert len(set(numbers)) == len(numbers)
        assert set(numbers) <= set(range(length))


def test_sources_take_turns():
    module = make({"a": ListedTiles(numbered(84, 2)), "b": ListedTiles(numbered(84, 3))})
    names = "".join(name for name, _ in order(module, module.train_dataloader()))
    assert names.count("a") == names.count("b") == 20
    assert names.count("ab") + names.count("ba") > 10


def test_what_does_not_fill_a_batch_waits_for_another_epoch():
    module = make({"a": ListedTiles(numbered(15, 2))})
    loader = module.train_dataloader()
    seen = [number for _ in range(12) for _, numbers in order(module, loader) for number in numbers]
    assert set(seen) == set(range(11))
    assert len(seen) == 12 * 8


def test_a_source_smaller_than_a_batch_gives_one():
    module = make({"a": ListedTiles(numbered(7, 2)), "b": ListedTiles(numbered(12, 3))})
    batches = order(module, module.train_dataloader())
    assert sorted((name, len(numbers)) for name, numbers in batches) == [("a", 3), ("b", 4), ("b", 4)]


def test_order_depends_on_seed_and_epoch_alone():
    def epochs(seed, first):
        module = make({"a": ListedTiles(numbered(30, 2)), "b": ListedTiles(numbered(30, 3))}, seed=seed)
        loader = module.train_dataloader()
        loader.batch_sampler.set_epoch(first)
        torch.rand(3)
        return [order(module, loader), order(module, loader)]

    start = epochs(0, 0)
    assert start[0] != start[1]
    assert epochs(0, 0) == start
    assert epochs(0, 1)[0] == start[1]
    assert epochs(1, 0)[0] != start[0]


def test_evaluation_goes_through_the_sources_in_order():
    module = make({"a": ListedTiles(numbered(20, 2), held_out=5), "b": ListedTiles(numbered(14, 3), held_out=4)})
    expected = [("a", [10, 11, 12]), ("a", [13, 14]), ("b", [6, 7, 8]), ("b", [9])]
    assert order(module, module.val_dataloader()) == expected
    assert order(module, module.val_dataloader()) == expected
    assert order(module, module.test_dataloader())[0] == ("a", [15, 16, 17])


def test_processes_share_the_batches_equally():
    options = {"lengths": [26, 11], "batch_size": 3, "seed": 4}
    alone = list(MixedBatches(**options, rank=0, processes=1))
    assert len(alone) == 8 + 3
    shares = [MixedBatches(**options, rank=rank, processes=2) for rank in range(2)]
    batches = [list(share) for share in shares]
    assert [len(share) for share in shares] == [len(share) for share in batches] == [11, 11]
    for rank in range(2):
        assert batches[rank] == [whole[rank::2] for whole in alone]
    with pytest.raises(ConfigError, match=r"batches of 2 from sources of 26, 11 training tiles are too small for 3 p"):
        MixedBatches([26, 11], 2, 0, 0, 3)


def test_a_step_is_shared_among_processes(monkeypatch):
    module = make({"a": ListedTiles(numbered(30, 2))})
    alone = [numbers for _, numbers in order(module, module.train_dataloader())]
    held_out = [numbers for _, numbers in order(module, module.val_dataloader())]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert [numbers for _, numbers in order(module, module.train_dataloader())] == [part[1::2] for part in alone]
    shares = [part[1::2] for part in held_out if len(part) > 1]
    assert [numbers for _, numbers in order(module, module.val_dataloader())] == shares


def test_tiles_without_a_valid_pixel_give_way_to_the_next(caplog):
    values = numbered(30, 2)
    values[[3, 4, 27], 1] = np.nan
    source = ListedTiles(values, held_out=4)
    module = make({"a": source}, evaluation_batch_size=4, batch_size=22)
    source.reads.clear()
    with caplog.at_level(logging.INFO):
        loader = module.train_dataloader()
        numbers = [order(module, loader)[0][1] for _ in range(2)]
        # one at 5 stands for 3, 4 and itself
        assert [Counter(epoch)[5] for epoch in numbers] == [3, 3]
        assert [set(epoch) for epoch in numbers] == [set(range(22)) - {3, 4}] * 2
        # what is known to be empty is not read again
        assert source.reads[3] == source.reads[4] == 1
        assert order(module, module.test_dataloader()) == [("a", [26, 28, 28, 29])]
    assert "a: tile 27 has no valid pixel, 1 so far; the next" in caplog.text
    assert "2 so far" in caplog.text


def test_after_the_last_tile_comes_the_first():
    values = numbered(20, 2)
    values[[18, 19], 0] = np.nan
    module = make({"a": ListedTiles(values, held_out=4)})
    assert order(module, module.test_dataloader()) == [("a", [16, 17, 16]), ("a", [16])]


def test_what_is_held_out_is_the_test_tiles_where_any_source_has_some():
    tested, validated = ListedTiles(numbered(20, 2)), ListedTiles(numbered(14, 3))
    module = make({"a": tested, "b": validated})
    validated.test = validated.test[:0]
    assert order(module, module.held_out_dataloader()) == [("a", [18, 19])]
    tested.test = tested.test[:0]
    assert order(module, module.held_out_dataloader()) == [("a", [16, 17]), ("b", [10, 11])]


def test_sources_without_a_valid_pixel_are_refused():
    values = numbered(9, 2)
    values[:5, 0] = np.nan
    with pytest.raises(DataError, match="source a: no pixel of 5 training tiles has a value in every band"):
        make({"a": ListedTiles(values)})
    values = numbered(9, 2)
    values[5:7, 0] = np.nan
    loader = make({"a": ListedTiles(values)}).val_dataloader()
    with pytest.raises(DataError, match="source a: none of 2 tiles has a valid pixel"):
        next(iter(loader))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": {}}, "sources is empty"),
        ({"batch_size": 0}, "batch_size is 0; give at least 1"),
        ({"evaluation_batch_size": 0}, "evaluation_batch_size is 0"),
        ({"statistics_tiles": 0}, "statistics_tiles is 0"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**({"sources": {"a": ListedTiles(numbered(9, 2))}} | options), setup=False)


def test_workers_give_the_same_batches():
    sources = {"a": ListedTiles(numbered(20, 2)), "b": ListedTiles(numbered(12, 3))}
    module = make(sources)
    expected = order(module, module.train_dataloader())
    assert order(module, make(sources, num_workers=2).train_dataloader()) == expected


class Recorder(L.LightningModule):
    """Learns nothing and keeps the first value of each batch it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append((self.current_epoch, batch["image"][:, 0, 0, 0].tolist()))
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_lightning_sets_the_epoch(tmp_path):
    module = make({"a": ListedTiles(numbered(30, 2))})
    loader = module.train_dataloader()
    expected = [[batch["image"][:, 0, 0, 0].tolist() for batch in loader] for _ in range(2)]
    recorder = Recorder()
    trainer = L.Trainer(
        max_epochs=2,
        # a new loader knows nothing of the epochs before
        reload_dataloaders_every_n_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(recorder, datamodule=module)
    assert recorder.seen == [(epoch, values) for epoch in range(2) for values in expected[epoch]]


def test_a_configuration_builds_it(tiny, tmp_path):
    source = {
        "_target_": "vision_lowrank.data.tiles.SceneTiles",
        "card": str(tiny.write()),
        "root": str(tmp_path),
        "size": 4,
        "stride": 2,
        "cell": 8,
    }
    module = instantiate(
        {
            "_target_": "vision_lowrank.data.tile_module.TileDataModule",
            "sources": {"tiny": source},
            "batch_size": 2,
            "evaluation_batch_size": 2,
            "seed": 0,
        }
    )
    module.prepare_data()
    module.setup()
    batch = next(iter(module.train_dataloader()))
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "image": (2, 6, 4, 4),
        "valid": (2, 4, 4),
        "wavelengths": (2, 6),
        "gsd": (2,),
    }
