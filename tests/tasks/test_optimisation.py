import math
from itertools import pairwise

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from vision_lowrank.errors import ConfigError
from vision_lowrank.models import HyperMAE, LessViT, LolaSpecViT
from vision_lowrank.models.encoders import BandStatistics
from vision_lowrank.processes import SEEDS_APART
from vision_lowrank.tasks.masked_pretraining import HyperMAEPretraining
from vision_lowrank.tasks.optimisation import BATCHES_APART, adamw, warmup_cosine
from vision_lowrank.tasks.raster_tasks import RasterModel, RasterTask
from vision_lowrank.tasks.scene_classification import SceneClassification


def test_warmup_is_a_line_and_the_rest_half_a_cosine():
    factor = warmup_cosine(100, 0.2)
    assert [factor(step) for step in (0, 9, 19)] == pytest.approx([0.05, 0.5, 1.0])
    assert factor(60) == pytest.approx(0.5)
    assert factor(40) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert factor(100) == pytest.approx(0)
    assert factor(10_000) == factor(100)


def test_without_warmup_the_rate_starts_at_its_height():
    assert warmup_cosine(50, 0.0)(0) == 1.0
    with pytest.raises(ConfigError, match=r"warmup is 1\.0"):
        warmup_cosine(50, 1.0)


def test_only_matrices_and_kernels_decay_and_frozen_parameters_take_no_part():
    model = LolaSpecViT(4, 2, 7)
    model.norm.requires_grad_(False)
    optimizer = adamw(model, 0.1, 0.3, lambda step: 1.0)["optimizer"]
    decayed = {p for group in optimizer.param_groups if group["weight_decay"] == 0.3 for p in group["params"]}
    spared = {p for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim > 1 and not name.endswith(("pos_embed", "relative_bias"))
        assert (parameter in decayed) == matrix, name
        assert (parameter in spared) == (not matrix and not name.startswith("norm.")), name


def test_batches_of_one_step_draw_each_its_own_and_a_longer_run_the_same():
    drawn = {}

    class Drawing(HyperMAEPretraining):
        def training_step(self, batch, batch_index):
            place = (self.current_epoch, batch_index)
            draw = (self.global_step, torch.initial_seed())
            assert drawn.setdefault(place, draw) == draw
            return 0 * self.model.encoder.cls_token.sum()

        def on_train_epoch_end(self):
            pass

    def fit(epochs):
        torch.manual_seed(7)
        model = HyperMAE(LessViT(patch_size=2, embed_dim=8, depth=1, num_heads=1), 8, 1, 1)
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=epochs, accumulate_grad_batches=3, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Drawing(model, 0.1, 0.0, 0.0), DataLoader(torch.zeros(8, 1)))

    fit(1)
    first = dict(drawn)
    assert [step for step, _ in first.values()] == [0, 0, 0, 1, 1, 1, 2, 2]
    seeds = [seed for _, seed in first.values()]
    assert len(set(seeds)) == 8
    # the first of each step as without accumulation
    assert [seeds[index] for index in (0, 3, 6)] == [7 + SEEDS_APART + step for step in (0, 1, 2)]
    fit(2)
    assert len(drawn) == 16
    assert len({seed for _, seed in drawn.values()}) == 16


def test_seeds_of_accumulated_batches_do_not_meet():
    # a generator of the processor takes the remainder by 2^32
    starts = sorted(BATCHES_APART * batch % 2**32 for batch in range(1000))
    assert min(b - a for a, b in pairwise([*starts, starts[0] + 2**32])) > 1_000_000


@pytest.mark.parametrize("kind", ["tiles", "raster", "scene"])
def test_every_task_draws_anew_for_each_accumulated_batch(kind):
    torch.manual_seed(11)
    layer = nn.Linear(2, 2)
    if kind == "tiles":
        model = HyperMAE(LessViT(patch_size=2, embed_dim=8, depth=1, num_heads=1), 8, 1, 1)
        task, start = HyperMAEPretraining(model, 0.1, 0.0, 0.0), 11 + SEEDS_APART
    elif kind == "raster":
        encoder = BandStatistics(patch_size=2)
        encoder.prepare([500.0])
        task, start = RasterTask(RasterModel(encoder, "classification", 2), "accuracy", 0.1, 0.0, 0.0), 11
    else:
        task, start = SceneClassification(layer, [1, 1], 0.1, 0.0, 0.0, 0.0, 0.0, 0.0), 11
    task.trainer = L.Trainer(accelerator="cpu", accumulate_grad_batches=2, logger=False, enable_checkpointing=False)
    seeds = []
    for index in range(4):
        task.on_train_batch_start(None, index)
        seeds.append(torch.initial_seed())
    assert seeds[0] == start
    assert seeds[1] != start
    # no step of the optimiser was made
    assert seeds[2:] == seeds[:2]


def test_the_rate_follows_the_factor():
    layer = nn.Linear(2, 2)
    made = adamw(layer, 0.5, 0.0, lambda step: 1 / (step + 1))
    rates = []
    for _ in range(3):
        rates.append(made["optimizer"].param_groups[0]["lr"])
        layer(torch.ones(1, 2)).sum().backward()
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx([0.5, 0.25, 0.5 / 3])
    assert made["lr_scheduler"]["interval"] == "step"
