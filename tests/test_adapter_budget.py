"""Sizes of adapters for a number of parameters, against formulas written out here."""

import math

import pytest
import torch
from torch import nn

from vision_lowrank.adapter_budget import resize, size_for_budget
from vision_lowrank.adapters import LoRA, count_parameters, inject
from vision_lowrank.errors import AdapterError, ConfigError

OWN = "vision_lowrank.adapters."
PEFT = "vision_lowrank.tasks.adapter_training.PeftAdapter"
SHAPES = [(48, 16), (32, 48)]  # outputs and inputs
TARGETS = ["0", "2"]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 32))


def over_layers(formula):
    return lambda size: sum(formula(m, n, size) for m, n in SHAPES)


# settings, what the size is, the number of parameters at a size, sizes that are possible
CASES = {
    "lora": ({"_target_": OWN + "LoRA", "rank": 4, "alpha": 8}, "rank", over_layers(lambda m, n, r: r * (m + n))),
    "hydra": (
        {"_target_": OWN + "Hydra", "rank": 2, "scale": 0.5}, "rank",
        over_layers(lambda m, n, r: r * (3 * m + n + 2) + 2 * m),
    ),
    "nola": (
        {"_target_": OWN + "NOLA", "rank": 2, "alpha": 4, "terms": 8}, "terms", over_layers(lambda m, n, k: 2 * k),
    ),
    "lora_xs": ({"_target_": OWN + "LoRAXS", "rank": 4, "alpha": 4}, "rank", over_layers(lambda m, n, r: r * r)),
    "flylora": (
        {"_target_": OWN + "FlyLoRA", "rank": 8, "alpha": 16, "active": 2}, "rank", over_layers(lambda m, n, r: r * m)
    ),
    "dora": ({"_target_": PEFT, "name": "dora", "rank": 4, "alpha": 8}, "rank",
             over_layers(lambda m, n, r: r * (m + n) + m)),
    "randlora": ({"_target_": PEFT, "name": "randlora", "rank": 8}, "rank",
                 over_layers(lambda m, n, r: math.ceil(min(m, n) / r) * (r + min(m, n)))),
    "bat": ({"_target_": PEFT, "name": "bat", "rank": 8}, "rank", over_layers(lambda m, n, r: r * m)),
    "orthogonal": (
        {"_target_": PEFT, "name": "orthogonal", "rank": 4}, "rank", over_layers(lambda m, n, r: r * (m + n)),
    ),
}  # fmt: skip
POSSIBLE = {"bat": {1, 2, 4, 8, 16}, "orthogonal": set(range(2, 200, 2)), "randlora": set(range(1, 17))}


def no_batches():
    raise AssertionError("these methods see no data")


def find(settings, key, budget, tolerance=10.0):
    return size_for_budget(make_model(), settings, key, TARGETS, budget, tolerance, no_batches)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("budget", [500, 1000])
def test_no_other_size_is_nearer_to_the_budget(name, budget):
    settings, key, formula = CASES[name]
    found, count = find(settings, key, budget)
    assert count == formula(found[key])
    assert abs(count - budget) == min(abs(formula(size) - budget) for size in POSSIBLE.get(name, range(1, 300)))


def test_the_count_is_what_is_trained():
    settings, _, _ = CASES["lora"]
    found, count = find(settings, "rank", 700)
    model = make_model()
    inject(model, TARGETS, LoRA(found["rank"], found["alpha"]))
    assert count_parameters(model).trainable == count
    sliced = nn.ModuleDict({"qkv": nn.Linear(8, 24)})
    _, part = size_for_budget(sliced, settings, "rank", ["qkv[q,v]"], 64, 0.0, no_batches)
    assert part == 2 * 2 * (8 + 8)


def test_what_belongs_to_the_rank_grows_with_it():
    fly = {"_target_": "x", "rank": 8, "alpha": 16, "active": 2, "seed": 5}
    assert resize(fly, "rank", 12) == {**fly, "rank": 12, "alpha": 24, "active": 3}
    assert resize(fly, "rank", 1)["active"] == 1
    # of 1.25 and 1.75, the nearest
    assert [resize(fly, "rank", rank)["active"] for rank in (5, 7)] == [1, 2]
    stable = {"rank": 4, "alpha": 4, "rslora": True}
    # alpha / sqrt(rank) is doubled with a rank of four times: the scale of the update is what it was
    changed = resize(stable, "rank", 16)
    assert changed["alpha"] / math.sqrt(changed["rank"]) == stable["alpha"] / math.sqrt(stable["rank"])
    assert resize({"rank": 2, "terms": 8, "alpha": 4}, "terms", 20) == {"rank": 2, "terms": 20, "alpha": 4}


def test_budgets_out_of_reach_and_methods_that_do_not_fit():
    settings, key, _ = CASES["lora"]
    with pytest.raises(
        ConfigError, match=r"comparison.budget=50: the nearest of LoRA is 144 with rank 1, .* than 10 %"
    ):
        find(settings, key, 50, 0.1)
    lokr = {"_target_": PEFT, "name": "lokr", "rank": 4}
    with pytest.raises(ConfigError, match="the nearest of lokr is"):
        find(lokr, "rank", 100_000, 0.1)
    convolution = nn.Sequential(nn.Conv2d(4, 8, 3))
    with pytest.raises(AdapterError, match="pissa of peft is for Linear"):
        size_for_budget(
            convolution, {"_target_": PEFT, "name": "pissa", "rank": 4}, "rank", ["0"], 100, 0.1, no_batches
        )
