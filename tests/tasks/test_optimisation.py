import math

import pytest
import torch
from torch import nn

from vision_lowrank.errors import ConfigError
from vision_lowrank.models import LolaSpecViT
from vision_lowrank.tasks.optimisation import adamw, warmup_cosine


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
