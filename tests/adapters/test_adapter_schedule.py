"""The cyclical schedule against its closed form and against the cosine with warm restarts of torch."""

import json
import math

import pytest
import torch
from adapter_zoo import VOLUME, make_toy, perturb
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vision_lowrank import adapters
from vision_lowrank.adapters import CyclicalStrength, LoRA, inject
from vision_lowrank.errors import AdapterError


@pytest.fixture
def toy():
    return make_toy()


def test_closed_form_of_rising_cycles():
    schedule = CyclicalStrength(total_steps=15, first_cycle=5, growth=2, minimum=0.2)
    assert schedule.cycles == [(0, 5), (5, 10)]
    half = 0.2 + 0.8 * 0.5
    assert schedule(0) == 0.2
    assert schedule(2) == pytest.approx(half)
    assert schedule(4) == 1.0
    assert schedule(5) == 0.2
    assert schedule(5 + 3) == pytest.approx(0.2 + 0.8 * (1 - math.cos(math.pi / 3)) / 2)
    assert schedule(14) == schedule(99) == 1.0


def test_falling_equals_cosine_annealing_of_torch_within_a_cycle():
    schedule = CyclicalStrength(total_steps=11, first_cycle=11, minimum=0.1, rising=False)
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.1)
    for step in range(11):
        assert schedule(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()


def test_as_learning_rate_multiplier_of_one_group():
    schedule = CyclicalStrength(total_steps=8, first_cycle=4, growth=1, minimum=0.25, rising=False)
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.5},
        {"params": [nn.Parameter(torch.zeros(1))], "lr": 2.0},
    ]
    optimizer = torch.optim.SGD(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, schedule])
    rates = []
    for _ in range(8):
        rates.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        scheduler.step()
    assert [low for low, _ in rates] == [0.5] * 8
    assert [high for _, high in rates] == pytest.approx([2.0, 1.625, 0.875, 0.5] * 2)


@given(
    st.integers(1, 400),
    st.integers(2, 60),
    st.integers(1, 3),
    st.integers(0, 50),
    st.sampled_from([0.0, 0.1, 0.3, 1.0]),
    st.booleans(),
)
def test_cycles_fill_training_and_end_at_the_last_step(total, first, growth, warmup, minimum, rising):
    if warmup >= total:
        return
    schedule = CyclicalStrength(total, first, growth, minimum, warmup, rising)
    cycles = schedule.cycles
    starts = [start for start, _ in cycles]
    assert starts == [warmup, *(start + length for start, length in cycles)][: len(starts)]
    assert sum(cycles[-1]) == total
    for index, (_, length) in enumerate(cycles[:-1]):
        assert length == first * growth**index
    nominal = first * growth ** (len(cycles) - 1)
    assert len(cycles) == 1 or nominal / 2 <= cycles[-1][1] < nominal * (1 + growth / 2)
    assert schedule(total - 1) == (1.0 if rising else minimum)
    assert all(minimum - 1e-12 <= schedule(step) <= 1.0 + 1e-12 for step in range(total))


def test_warmup_is_a_straight_line_to_one():
    schedule = CyclicalStrength(total_steps=20, first_cycle=8, minimum=0.2, warmup=4, rising=False)
    assert [schedule(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_moves_the_model_and_resumes(toy):
    inject(toy, "mlp.0", LoRA(2, 4))
    perturb(toy)
    schedule = CyclicalStrength(total_steps=6, first_cycle=3, growth=1, minimum=0.1)
    outputs = []
    for step in range(6):
        assert schedule.step(toy) == schedule(step)
        assert toy.mlp[0].adapters["default"].strength.item() == pytest.approx(schedule(step))
        outputs.append(toy(VOLUME))
    assert not torch.allclose(outputs[0], outputs[2])
    assert torch.equal(outputs[0], outputs[3])

    first = CyclicalStrength(total_steps=6, first_cycle=3, growth=1, minimum=0.1)
    first.step(toy)
    resumed = CyclicalStrength(total_steps=6, first_cycle=3, growth=1, minimum=0.1)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [resumed.step(toy) for _ in range(5)] == [schedule(step) for step in range(1, 6)]
    with pytest.raises(AdapterError, match=r"first_cycle=3 \(here 4\)"):
        CyclicalStrength(total_steps=6, first_cycle=4, growth=1, minimum=0.1).load_state_dict(first.state_dict())


def test_moves_one_name_only(toy):
    inject(toy, "mlp.0", LoRA(2, 4), name="a")
    inject(toy, "mlp.0", LoRA(2, 4), name="b")
    CyclicalStrength(total_steps=6, first_cycle=3, minimum=0.1).step(toy, "a")
    strengths = {name: adapter.strength.item() for name, adapter in toy.mlp[0].adapters.items()}
    assert strengths == {"a": pytest.approx(0.1), "b": 1.0}
    with adapters.full_strength(toy):
        assert toy.mlp[0].adapters["a"].strength == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"total_steps": 0, "first_cycle": 2},
        {"total_steps": 5, "first_cycle": 1},
        {"total_steps": 5, "first_cycle": 2, "growth": 0},
        {"total_steps": 5, "first_cycle": 2, "minimum": 1.5},
        {"total_steps": 5, "first_cycle": 2, "warmup": 5},
    ],
)
def test_settings_refused(settings):
    with pytest.raises(AdapterError, match=r"CyclicalStrength .*: give"):
        CyclicalStrength(**settings)
