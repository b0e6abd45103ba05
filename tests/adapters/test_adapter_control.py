"""Strength, merging and switching off."""

import copy
import re

import pytest
import torch
from adapter_zoo import LAYERS, VOLUME, make_toy, perturb
from torch import nn

from vision_lowrank import adapters
from vision_lowrank.adapters import GatedLoRA, Hydra, LoRA, inject
from vision_lowrank.errors import AdapterError
from vision_lowrank.models.layers.window_attention import WindowAttention


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


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -1e39, 1e300])
def test_a_strength_that_is_no_number_of_the_model_changes_nothing(toy, strength):
    inject(toy, ["mlp.0", "mlp.2"], LoRA(2, 4))
    with pytest.raises(AdapterError, match=re.escape(f"strength={strength}: give a finite number")):
        adapters.set_strength(toy, strength)
    # nor does one that a merged layer refuses, in layers that come before it
    adapters.set_strength(toy, 0.5)
    toy.mlp[2].merge()
    with pytest.raises(AdapterError, match=r"'mlp\.2' is merged at strength 0\.5"):
        adapters.set_strength(toy, 0.25)
    assert [layer.adapters["default"].strength.item() for layer in (toy.mlp[0], toy.mlp[2])] == [0.5, 0.5]


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
        with pytest.raises(AdapterError, match=r"leave the block of disabled"):
            adapters.merge(toy)
    assert torch.equal(toy(VOLUME), full)
    adapters.merge(toy)
    with pytest.raises(AdapterError, match="cannot be disabled"), adapters.disabled(toy):
        pass


@pytest.fixture
def mixed(toy):
    """The toy with two adapters that share a layer and one on layers of its own."""
    inject(toy, ["mlp.0", "stem"], LoRA(2, 4), name="a")
    inject(toy, ["mlp.0", "proj"], LoRA(1, 2), name="b")
    inject(toy, "mlp.2", GatedLoRA(1, 1, gate_rank=1), name="c")
    return perturb(toy).double()


def alone(model, x, strengths):
    for name, value in strengths.items():
        adapters.set_strength(model, value, name)
    output = model(x[None])[0]
    adapters.set_strength(model, 1.0)
    return output


def test_rows_of_a_model_are_its_samples_alone(mixed):
    x = torch.randn(4, 1, 4, 6, 6, dtype=torch.float64)
    weights = torch.tensor([[0, 0, 0], [1, 0, 0.5], [0.3, -2, 1], [0, 1, 0]], dtype=torch.float64)
    with adapters.rows(mixed, weights):
        output = mixed(x)
    for sample, row in enumerate(weights.tolist()):
        torch.testing.assert_close(output[sample], alone(mixed, x[sample], dict(zip("abc", row, strict=True))))
    with adapters.disabled(mixed):
        torch.testing.assert_close(output[0], mixed(x)[0])


def test_rows_by_name_multiply_the_strength_and_leave_the_others(mixed):
    x = torch.randn(2, 1, 4, 6, 6, dtype=torch.float64)
    adapters.set_strength(mixed, 0.5, "b")
    with adapters.rows(mixed, {"b": torch.tensor([1.0, 0.4])}):
        output = mixed(x)
        with adapters.rows(mixed, {"b": torch.zeros(2)}):
            inner = mixed(x)
        assert torch.equal(mixed(x), output)
    adapters.set_strength(mixed, 1.0)
    for sample, b in enumerate((0.5, 0.2)):
        torch.testing.assert_close(output[sample], alone(mixed, x[sample], {"b": b}), atol=1e-6, rtol=0)
        torch.testing.assert_close(inner[sample], alone(mixed, x[sample], {"b": 0.0}))


def test_gradients_reach_the_weights_of_rows(mixed):
    x = torch.randn(3, 1, 4, 6, 6, dtype=torch.float64)
    weights = torch.rand(3, 3, dtype=torch.float64, requires_grad=True)

    def output(weights):
        with adapters.rows(mixed, weights):
            return mixed(x)

    assert torch.autograd.gradcheck(output, weights)
    mixed.train()
    output(weights).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapters.adapter_parameters(mixed))


def test_rows_of_windows():
    attention = WindowAttention(8, 2, window_size=2, map_size=4).double().eval()
    inject(attention, ["qkv", "proj"], LoRA(2, 4))
    perturb(attention)
    x = torch.randn(3, 4, 4, 8, dtype=torch.float64)
    weights = torch.tensor([[0.0], [1.0], [0.5]])
    with adapters.rows(attention, weights), pytest.raises(AdapterError, match="pass windows=True"):
        attention(x)
    with adapters.rows(attention, weights, windows=True):
        output = attention(x)
        with pytest.raises(AdapterError, match=r"rows of 3 samples do not divide a first axis of (4|16)"):
            attention(x[:1].expand(4, -1, -1, -1))
    for sample, weight in enumerate(weights):
        adapters.set_strength(attention, weight.item())
        torch.testing.assert_close(output[sample], attention(x[sample : sample + 1])[0])


def test_rows_refused(mixed):
    x = VOLUME.double()
    for weights, message in (
        (torch.ones(2, 2), r"shape \(2, 2\), but the model has the adapters .*: give \(batch, 3\)"),
        ({"a": torch.ones(2, 1)}, r"weights of 'a' have the shape \(2, 1\)"),
        ({"a": torch.ones(2), "b": torch.ones(3)}, r"batches of \[2, 3\] samples"),
        ({"d": torch.ones(2)}, "no adapter 'd'"),
        ({}, "give one for each sample"),
    ):
        with pytest.raises(AdapterError, match=message), adapters.rows(mixed, weights):
            pass
    expected = mixed(x)
    with pytest.raises(AdapterError, match="first axis must be the batch"), adapters.rows(mixed, torch.ones(5, 3)):
        mixed(x)
    assert torch.equal(mixed(x), expected)
    adapters.remove(mixed, "c")
    with adapters.rows(mixed, torch.ones(2, 2)):
        for merge in (adapters.merge, adapters.merge_and_remove):
            with pytest.raises(AdapterError, match="strengths for each row"):
                merge(mixed)
    adapters.merge(mixed)
    with pytest.raises(AdapterError, match="one weight for all rows"), adapters.rows(mixed, torch.ones(2, 2)):
        pass


def test_rows_of_a_convolution_without_batch_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 2, 1))
    inject(model, "0", LoRA(1, 1))
    with adapters.rows(model, torch.ones(2, 1)), pytest.raises(AdapterError, match="first axis must be the batch"):
        model(torch.ones(3, 4, 4))


def test_folded_weights_are_those_of_the_call():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3)).double(), torch.randn(5, 4).double()
    inject(model, "0", Hydra(2, 0.5))
    inject(model, "0", LoRA(2, 4, dropout=0.5), name="dropping")
    perturb(model)

    def folded():
        weight, bias = adapters.folded_weight(model[0])
        return x @ weight.T + bias

    assert adapters.folded_weight(model.train()[0]) is None
    expected = model.eval()(x)
    torch.testing.assert_close(folded(), expected)
    adapters.merge(model)
    torch.testing.assert_close(folded(), expected)
    adapters.unmerge(model)
    with adapters.disabled(model):
        torch.testing.assert_close(folded(), model[0].base(x))


def test_folding_a_weight_is_off_for_rows(toy):
    inject(toy, "mlp.0", LoRA(1, 1))
    assert adapters.folded_weight(toy.mlp[0]) is not None
    with adapters.rows(toy, torch.ones(2, 1)):
        assert adapters.folded_weight(toy.mlp[0]) is None


def test_strength_is_in_the_state_dict(toy):
    inject(toy, "mlp.0", LoRA(2, 4))
    adapters.set_strength(toy, 0.3)
    assert toy.state_dict()["mlp.0.adapters.default.strength"] == torch.tensor(0.3)
