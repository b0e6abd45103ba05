"""Strength, merging and switching off."""

import copy

import pytest
import torch
from adapter_zoo import LAYERS, VOLUME, make_toy, perturb
from torch import nn

from vision_lowrank import adapters
from vision_lowrank.adapters import GatedLoRA, LoRA, inject
from vision_lowrank.errors import AdapterError


@pytest.fixture
def toy():
    return make_toy()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("kind", LAYERS)
def test_merged_equals_unmerged_and_unmerge_restores_the_bits(kind, dtype, tolerance):
    make, shape = LAYERS[kind]
    torch.manual_seed(5)
    model = nn.Sequential(make()).to(dtype).eval()
    x = torch.randn(shape, dtype=dtype)
    weight = model[0].weight.detach().clone()
    inject(model, "0", LoRA(3, 3))
    inject(model, "0", LoRA(1, 1), name="other")
    perturb(model)
    adapters.set_strength(model, 0.5, "other")
    expected = model(x)
    for _ in range(10):
        adapters.merge(model)
        torch.testing.assert_close(model(x), expected, atol=tolerance, rtol=tolerance)
        assert not torch.equal(model[0].base.weight, weight)
        adapters.unmerge(model)
    assert torch.equal(model[0].base.weight, weight)
    assert torch.equal(model(x), expected)


def test_merged_weight_is_rounded_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).bfloat16()
    inject(model, "0", LoRA(2, 3))
    torch.nn.init.normal_(model[0].adapters["default"].lora_B.weight)
    a, b = (model[0].adapters["default"].state_dict()[f"lora_{f}.weight"].double() for f in "AB")
    exact = model[0].base.weight.double() + 1.5 * b @ a
    adapters.merge(model)
    # half a unit in the last place of bfloat16 is at most 2 ** -8 of the value
    assert ((model[0].base.weight.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001).all()


def test_training_while_merged_is_refused(toy):
    inject(toy, "mlp.0", LoRA(2, 4))
    adapters.merge(toy)
    toy(VOLUME)
    toy.train()
    with pytest.raises(AdapterError, match="unmerge"):
        toy(VOLUME)
    adapters.unmerge(toy)
    toy(VOLUME)


def test_merging_a_gate_is_refused_before_anything_changes(toy):
    inject(toy, "mlp.0", LoRA(2, 4))
    inject(toy, "mlp.2", GatedLoRA(2, 4, gate_rank=1))
    for merge in (adapters.merge, adapters.merge_and_remove):
        with pytest.raises(AdapterError, match=r"'mlp.2' is a GatedLoRA.*cannot be merged"):
            merge(toy)
        assert not toy.mlp[0].merged
        toy.train()(VOLUME)


def test_merge_uses_the_present_strength_and_export_full_strength(toy):
    inject(toy, ["mlp.0", "stem"], LoRA(2, 4), train="head")
    perturb(toy)
    full = toy(VOLUME)
    adapters.set_strength(toy, 0.1)
    tenth = toy(VOLUME)
    adapters.merge(toy)
    adapters.set_strength(toy, 0.1)
    torch.testing.assert_close(toy(VOLUME), tenth)
    with pytest.raises(AdapterError, match=r"merged at strength 0\.1"):
        adapters.set_strength(toy, 0.5)
    with pytest.raises(AdapterError, match=r"merged at strength 0\.1"), adapters.full_strength(toy):
        pass
    adapters.merge_and_remove(toy)
    torch.testing.assert_close(toy(VOLUME), full)
    assert not torch.allclose(full, tenth)
    assert type(toy.mlp[0]) is nn.Linear
    assert adapters.count_parameters(toy).adapter == 0


def test_files_of_a_merged_model_are_refused(toy, tmp_path):
    inject(toy, "mlp.0", LoRA(2, 4))
    state = toy.state_dict()
    adapters.merge(toy)
    for attempt in (toy.state_dict, lambda: toy.load_state_dict(state), lambda: adapters.save_adapter(toy, tmp_path)):
        with pytest.raises(AdapterError, match="unmerge"):
            attempt()
    assert list(tmp_path.iterdir()) == []


def test_merged_model_can_be_copied_and_converted(toy):
    inject(toy, "mlp.0", LoRA(2, 4))
    perturb(toy)
    expected = toy(VOLUME)
    adapters.merge(toy)
    twin = copy.deepcopy(toy).double()
    adapters.unmerge(twin)
    adapters.unmerge(toy)
    torch.testing.assert_close(twin(VOLUME.double()).float(), expected)
    assert torch.equal(twin.mlp[0].base.weight, toy.mlp[0].base.weight.double())


def test_strength_is_linear_and_zero_is_the_base(toy):
    base = toy(VOLUME)
    inject(toy, "head", LoRA(2, 4))
    perturb(toy)
    full = toy(VOLUME)
    adapters.set_strength(toy, 0.0)
    assert torch.equal(toy(VOLUME), base)
    adapters.set_strength(toy, 0.4)
    torch.testing.assert_close(toy(VOLUME), base + 0.4 * (full - base))


def test_full_strength_restores_each_adapter_even_after_an_error(toy):
    inject(toy, "mlp.0", LoRA(2, 4), name="a")
    inject(toy, "mlp.0", LoRA(2, 4), name="b")
    perturb(toy)
    full = toy(VOLUME)
    adapters.set_strength(toy, 0.1, "a")
    adapters.set_strength(toy, 0.7, "b")
    before = toy(VOLUME)
    try:
        with adapters.full_strength(toy):
            assert torch.equal(toy(VOLUME), full)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert torch.equal(toy(VOLUME), before)


def test_disabled(toy):
    base = toy(VOLUME)
    inject(toy, ["mlp.0", "stem"], LoRA(2, 4))
    perturb(toy)
    full = toy(VOLUME)
    with adapters.disabled(toy):
        with adapters.disabled(toy):
            pass
        assert torch.equal(toy(VOLUME), base)
    assert torch.equal(toy(VOLUME), full)
    adapters.merge(toy)
    with pytest.raises(AdapterError, match="cannot be disabled"), adapters.disabled(toy):
        pass


def test_strength_is_in_the_state_dict(toy):
    inject(toy, "mlp.0", LoRA(2, 4))
    adapters.set_strength(toy, 0.3)
    assert toy.state_dict()["mlp.0.adapters.default.strength"] == torch.tensor(0.3)
