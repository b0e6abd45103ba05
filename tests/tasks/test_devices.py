"""Two processes train what one trains: the same batches, losses, weights; each sample validated once."""

import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from stripes import write_stripes

from vision_lowrank import runs
from vision_lowrank.checkpoints import read_checkpoint
from vision_lowrank.errors import ConfigError
from vision_lowrank.instantiate import instantiate
from vision_lowrank.models.layers.shared_norm import SharedBatchNorm3d
from vision_lowrank.processes import SharedBatches
from vision_lowrank.sharding import ShardedStrategy
from vision_lowrank.training import train

HERE = Path(__file__).parent
SIDE = 24
TWO = ["trainer=ddp", "trainer.accelerator=cpu"]
SHARDS = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2"]
QUICK = ["patches-1", "patches-2"]
PAIRS = [
    pytest.param(*QUICK),
    pytest.param("windows-1", "windows-2", marks=pytest.mark.slow),
    pytest.param("tiles-1", "tiles-2", marks=pytest.mark.slow),
    pytest.param("tiles-1", "shards-2", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """Card of a scene whose classes, and the values of whose tiles, are not equally many."""
    folder = tmp_path_factory.mktemp("scene")
    card = write_stripes(folder, SIDE, SIDE)
    generator = np.random.default_rng(3)
    image, labels = np.load(folder / "image.npy"), np.load(folder / "labels.npy")
    image[generator.random((SIDE, SIDE)) < 0.1] = np.nan
    labels[(labels == 2) & (generator.random((SIDE, SIDE)) < 0.7)] = 0
    np.save(folder / "image.npy", image)
    np.save(folder / "labels.npy", labels)
    return card


def jobs_of(card, root):
    """Overrides of short trainings without dropout, by name: of each kind by one process and by two."""
    scene = [
        f"data.card={card}", f"data.root={card.parent}", "baselines=null", "data.split.train=0.2",
        "data.split.validation=0.08", "trainer.max_epochs=3", "trainer.precision=32-true", "task.mixup=0",
    ]  # fmt: skip
    patches = [
        "experiment=own_scene", *scene, "data.patch_size=5", "data.components=4", "data.batch_size=17",
        "data.evaluation_batch_size=8", "+model.dim=16", "+model.num_heads=[2]", "+model.depths=[1]",
        "+model.stem_channels=[2,4]", "+model.stem_depths=[3,3]", "+model.drop_rate=0", "+model.drop_path_rate=0",
    ]  # fmt: skip
    windows = [
        "experiment=less_vit_indian_pines", *scene, "name=windows", "data/split=random", "data.size=4",
        "data.stride=3", "data.batch_size=8", "data.evaluation_batch_size=8",
        "model.encoder.embed_dim=32", "model.encoder.depth=1", "model.encoder.num_heads=2", "model.pool_heads=2",
        "task.channel_sampling=[0.5,1]",
    ]  # fmt: skip
    source = "data.sources.indian_pines"
    tiles = [
        "experiment=hyper_mae_indian_pines", f"{source}.card={card}", f"{source}.root={card.parent}",
        f"{source}.size=4", f"{source}.stride=4", f"{source}.cell=4", "data.batch_size=5",
        "data.evaluation_batch_size=5", "model.encoder.patch_size=2", "model.encoder.embed_dim=24",
        "model.encoder.num_heads=3", "model.encoder.depth=1", "model.decoder_dim=16", "model.decoder_depth=1",
        "model.decoder_heads=2", "model.channel_mask_ratio=0.5", "task.channel_sampling=[0.5,1]",
        "trainer.max_epochs=3", "trainer.precision=32-true",
        # at the full rate Adam's first step takes a gradient that is rounding alone for a step of full length
        "task.warmup=0.5",
    ]  # fmt: skip
    kinds = {"patches": patches, "windows": windows, "tiles": tiles}
    jobs = {f"{name}-1": (plain, 1) for name, plain in kinds.items()}
    jobs |= {f"{name}-2": ([*plain, *TWO], 2) for name, plain in kinds.items()}
    jobs["shards-2"] = ([*tiles, *SHARDS], 2)
    jobs["adapt-2"] = ([*patches, *TWO, "regime=adapt", "pretraining.epochs=1", "adapter.cycles.first_cycle=1"], 2)
    return {name: ([*plain, f"runs_root={root / name}"], processes) for name, (plain, processes) in jobs.items()}


@pytest.fixture(scope="module")
def trained(card, tmp_path_factory):
    """Function that returns the last checkpoint of a job, and what its processes validated on."""
    root = tmp_path_factory.mktemp("runs")
    jobs = jobs_of(card, root)

    @functools.cache
    def run(quick):
        content = [
            {"name": name, "overrides": overrides, "processes": processes}
            for name, (overrides, processes) in jobs.items()
            if (name in QUICK) == quick
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / "two_processes.py"), str(root)]
        return subprocess.run(
            command, input=json.dumps(content), capture_output=True, text=True, env=environment, check=False
        )

    def find(name):
        done = run(name in QUICK)
        told = [json.loads((root / f"{name}-{rank}.json").read_text()) for rank in range(jobs[name][1])]
        assert [part["error"] for part in told] == [None] * len(told), done.stderr[-3000:]
        (path,) = (root / name).glob("*/*/checkpoints/last.ckpt")
        return read_checkpoint(path), [part["seen"] for part in told]

    return find


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_two_processes_train_what_one_trains(trained, one, two):
    (alone, _), (together, _) = trained(one), trained(two)
    assert together["global_step"] == alone["global_step"] >= 9
    assert together["state_dict"].keys() == alone["state_dict"].keys()
    for name, value in alone["state_dict"].items():
        pair = [without_key(name, part) for part in (together["state_dict"][name], value)]
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5, msg=name)
    for found, expected in zip(*(moments(part["optimizer_states"][0]) for part in (together, alone)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def moments(optimizer):
    """The first moments of AdamW in the order of its groups."""
    return [optimizer["state"][key]["exp_avg"] for group in optimizer["param_groups"] for key in group["params"]]


def without_key(name, value):
    """A weight without the bias of keys: softmax does not see it, so that its gradient is rounding alone.

    AdamW makes steps of full length of it, in directions that change with the order of a sum.
    """
    parts = {"qkv.bias": 3, "qk.bias": 2}.get(".".join(name.split(".")[-2:]))
    if parts is None:
        return value
    query, _, *rest = value.chunk(parts)
    return torch.cat([query, *rest])


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_each_sample_is_validated_once(trained, one, two):
    (alone, (whole,)), (together, parts) = trained(one), trained(two)
    # of two processes one has more
    assert len(whole) // 3 % 2 == 1
    assert abs(len(parts[0]) - len(parts[1])) <= 3
    assert sorted(parts[0] + parts[1]) == sorted(whole)
    for row, expected in zip(together["history"], alone["history"], strict=True):
        assert row.keys() == expected.keys()
        for name in row:
            # tiles weigh alike in it, whatever share of their pixels has values
            tolerance = 0.05 if one == "tiles-1" and name.startswith("val/") else 1e-4
            assert row[name] == pytest.approx(expected[name], rel=tolerance), name


@pytest.mark.slow
def test_two_processes_adapt_a_base_that_they_pretrained(trained):
    checkpoint, _ = trained("adapt-2")
    assert len(checkpoint["history"]) == 3


class Places:
    """Stands for the processes of a training, one after the other."""

    def __init__(self, patch, processes):
        self.rank, self.processes = 0, processes
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: processes)
        patch.setattr(torch.distributed, "get_rank", lambda: self.rank)

    def __iter__(self):
        for rank in range(self.processes):
            self.rank = rank
            yield rank


@pytest.mark.parametrize(("length", "size"), [(17, 5), (20, 4), (16, 5), (3, 9)])
def test_shares_make_up_the_batches_of_one_process(monkeypatch, length, size):
    whole = list(SharedBatches(range(length), size))
    assert whole == [list(range(start, min(start + size, length))) for start in range(0, length, size)]
    places = Places(monkeypatch, 3)
    shares = [list(SharedBatches(range(length), size)) for _ in places]
    # in training a last batch that some process has no share of waits
    kept = [batch for batch in whole if len(batch) >= 3]
    assert [sorted(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == kept
    assert all(len(SharedBatches(range(length), size)) == len(kept) for _ in places)
    shares = [list(SharedBatches(range(length), size, evaluation=True)) for _ in places]
    assert sorted(sample for share in shares for batch in share for sample in batch) == list(range(length))
    for rank in places:
        assert len(SharedBatches(range(length), size, evaluation=True)) == len(shares[rank])
    full = [list(SharedBatches(range(length), size, drop_last=True)) for _ in places]
    assert sum(len(batch) for share in full for batch in share) == length // size * size


def test_too_many_processes_are_told(monkeypatch):
    Places(monkeypatch, 4)
    with pytest.raises(ConfigError, match=r"9 samples in batches of 3 are too few for 4 processes; lower trainer\.dev"):
        len(SharedBatches(range(9), 3))


def test_the_norm_of_one_process_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = SharedBatchNorm3d(3), torch.nn.BatchNorm3d(3)
    x = torch.randn(4, 3, 2, 5, 5)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)


def composed(repository, *overrides):
    with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
        return compose("train", list(overrides))


def test_the_trainer_of_eight_gpus_shards(repository):
    config = composed(repository, "experiment=hyper_mae_ssl4eo", "trainer=fsdp", "trainer.num_nodes=2")
    assert (config.trainer.accelerator, config.trainer.devices, config.trainer.num_nodes) == ("gpu", 8, 2)
    assert isinstance(instantiate(config.trainer.strategy), ShardedStrategy)


def test_shards_are_for_pretraining(repository):
    config = composed(repository, "experiment=indian_pines", "trainer=fsdp", "trainer.accelerator=cpu")
    with pytest.raises(ConfigError, match="trainer=fsdp shares out the weights of Hyper-MAE only; use trainer=ddp"):
        train(config)


def test_processes_of_a_slurm_step_write_into_one_folder(monkeypatch, tmp_path):
    config = OmegaConf.create({"runs_root": str(tmp_path), "name": "job", "seed": 3})
    for name in ("RANK", "LOCAL_RANK", runs.RUN_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(ConfigError, match="process 1 of several was not told the folder of the run; start one train"):
        runs.start_run(config, "32-true", {})
    for name, value in {"SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    other = runs.start_run(config, "32-true", {})
    assert not other.exists()
    # start_run sets it, and no other test may see it
    monkeypatch.setenv(runs.RUN_VARIABLE, "")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert runs.start_run(config, "32-true", {}) == other == tmp_path / "job" / "slurm71.0.0-seed3"
    assert (other / "config.yaml").is_file()
