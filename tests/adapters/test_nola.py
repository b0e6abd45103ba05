"""NOLA against sums written out, and its bases: private, different in each layer, regenerated and verified."""

import copy

import peft
import pytest
import torch
from adapter_zoo import IMAGES, adapted_layer, make_vit, perturb, train_steps
from safetensors.torch import load_file
from torch import nn

from vision_lowrank import adapters
from vision_lowrank.adapters import NOLA, export_lora, inject, load_adapter, save_adapter
from vision_lowrank.errors import AdapterError

KINDS = ["linear tokens, no bias", "conv2d", "conv2d groups", "conv3d"]


def summed(adapter):
    """A and B as in the paper's sums, one term after the other."""
    down, up = adapter.nola_start.clone(), torch.zeros_like(adapter.nola_up[0])
    for i in range(len(adapter.nola_alpha)):
        down += adapter.nola_alpha[i].item() * adapter.nola_down[i]
        up += adapter.nola_beta[i].item() * adapter.nola_up[i]
    return down, up


@pytest.mark.parametrize("kind", KINDS)
def test_output_is_that_of_a_dense_layer_with_the_sum(kind):
    model, x = adapted_layer(kind, NOLA(3, 6, terms=5))
    base = model[0].base
    assert torch.equal(model(x), base(x))
    perturb(model)
    adapters.set_strength(model, 0.7)
    down, up = summed(model[0].adapters["default"])
    assert down.shape == (3, *base.weight.shape[1:])
    layer = copy.deepcopy(base)
    layer.weight.data += 0.7 * 2 * torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).view(base.weight.shape)
    torch.testing.assert_close(model(x), layer(x), rtol=1e-10, atol=1e-10)
    adapters.merge(model)
    torch.testing.assert_close(model(x), layer(x), rtol=1e-10, atol=1e-10)
    adapters.unmerge(model)
    adapters.set_strength(model, 0.0)
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_gradients_of_coefficients_are_inner_products_with_the_bases(kind):
    model, x = adapted_layer(kind, NOLA(3, 6, terms=5))
    model(x).square().sum().backward()
    adapter = model[0].adapters["default"]
    # B starts at zero, so A learns from the second step on
    assert adapter.nola_alpha.grad.count_nonzero() == 0 < adapter.nola_beta.grad.abs().min()
    perturb(model)
    adapter.zero_grad()
    model(x).square().sum().backward()
    down, up = summed(adapter)
    dense = copy.deepcopy(model[0].base)
    dense.weight.data += 2 * torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).view(dense.weight.shape)
    dense.weight.requires_grad_(True)
    dense(x).square().sum().backward()
    weight_grad = dense.weight.grad.flatten(1)
    down_grad, up_grad = 2 * up.flatten(1).T @ weight_grad, 2 * weight_grad @ down.flatten(1).T
    for i in range(5):
        torch.testing.assert_close(adapter.nola_alpha.grad[i], (down_grad * adapter.nola_down[i].flatten(1)).sum())
        torch.testing.assert_close(adapter.nola_beta.grad[i], (up_grad * adapter.nola_up[i].flatten(1)).sum())


def test_bases_are_private_reproducible_and_differ(vit):
    state = torch.get_rng_state()
    twin = copy.deepcopy(vit)
    inject(vit, ["fc1", "fc2"], NOLA(2, 4, terms=3))
    inject(twin, "fc1", NOLA(2, 4, terms=3))
    inject(twin, "fc1", NOLA(2, 4, terms=3, seed=1), name="other")
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (block.mlp.fc1.adapters["default"] for block in vit.blocks)
    for key in ("nola_start", "nola_down", "nola_up"):
        bases = getattr(first, key)
        assert torch.equal(bases, getattr(twin.blocks[0].mlp.fc1.adapters["default"], key))
        assert not torch.isclose(bases, getattr(second, key)).any()
        assert not torch.isclose(bases, getattr(twin.blocks[0].mlp.fc1.adapters["other"], key)).any()
    assert not torch.isclose(first.nola_down[0], first.nola_down[1]).any()


def test_distribution_of_the_bases():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 40))
    inject(model, "0", NOLA(5, 4, terms=30))
    adapter = model[0].adapters["default"]
    for values, bound in ((adapter.nola_start, 0.1), (adapter.nola_down, 1.0), (adapter.nola_up, 1.0)):
        assert 0.98 * bound < values.abs().max() <= bound
        # four standard deviations of the mean of n uniform numbers, and their variance
        assert values.mean().abs() < 4 * bound / (3 * values.numel()) ** 0.5
        assert values.var().item() == pytest.approx(bound**2 / 3, rel=0.15)


def test_bases_are_those_of_every_process_and_machine():
    model = nn.Sequential(nn.Linear(6, 4))
    model[0].weight.data = torch.arange(24.0).view(4, 6) / 16
    inject(model, "0", NOLA(2, 4, terms=3, seed=11))
    adapter = model[0].adapters["default"]
    # written down once: with other numbers, files of before could not be read
    assert (int(adapter.nola_seed), int(adapter.nola_checksum)) == (2259243815, 2905164416)
    generator = torch.Generator().manual_seed(int(adapter.nola_seed))
    drawn = [torch.randint(2**24, (n,), generator=generator, dtype=torch.int32).double() for n in (12, 36, 24)]
    start, down, up = (values / 2**23 - 1 for values in drawn)
    torch.testing.assert_close(adapter.nola_start.flatten().double(), start / 6**0.5)
    assert torch.equal(adapter.nola_down.flatten().double(), down)
    assert torch.equal(adapter.nola_up.flatten().double(), up)
    for dtype in (torch.bfloat16, torch.float64):
        other = nn.Sequential(nn.Linear(6, 4, dtype=dtype))
        other[0].weight.data = model[0].base.weight.to(dtype)
        inject(other, "0", NOLA(2, 4, terms=3, seed=11))
        assert torch.equal(other[0].adapters["default"].nola_up.double(), adapter.nola_up.to(dtype).double())


def test_count_and_file_hold_coefficients_seed_and_checksum_only(vit, tmp_path):
    inject(vit, ["fc1", "patch_embed.proj"], NOLA(4, 4, terms=7))
    count = adapters.count_parameters(vit)
    assert count.adapter == count.trainable == 3 * 2 * 7
    save_adapter(vit, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2]: tensor.numel() for key, tensor in tensors.items()} == {
        "nola_alpha": 7,
        "nola_beta": 7,
        "nola_seed": 1,
        "nola_checksum": 1,
    }
    assert len(tensors) == 3 * 4


def test_file_is_read_on_a_base_of_other_precision(vit, tmp_path):
    other = copy.deepcopy(vit).half().double()
    inject(vit, ["fc1", "patch_embed.proj"], NOLA(4, 4, terms=7))
    perturb(vit)
    save_adapter(vit, tmp_path)
    load_adapter(other, tmp_path)
    for path in ("blocks.1.mlp.fc1", "patch_embed.proj"):
        mine, theirs = (model.get_submodule(path).adapters["default"] for model in (vit, other))
        torch.testing.assert_close(theirs.delta_weight(), mine.delta_weight().double(), rtol=1e-5, atol=1e-5)
        # the rounded weight alone would have given other bases
        assert NOLA(4, 4, terms=7).build(other.get_submodule(path).base).nola_seed != mine.nola_seed


def test_state_brings_its_bases_to_any_base_and_seed(vit):
    inject(vit, ["fc1", "patch_embed.proj"], NOLA(4, 4, terms=7))
    perturb(vit)
    other = make_vit(seed=1)
    inject(other, ["fc1", "patch_embed.proj"], NOLA(4, 4, terms=7, seed=5))
    other.load_state_dict(vit.state_dict())
    assert torch.equal(other(IMAGES), vit(IMAGES))
    assert torch.equal(copy.deepcopy(other)(IMAGES), vit(IMAGES))


@pytest.mark.parametrize("method", [NOLA(4, 4, terms=7), NOLA(3, 4, terms=7)])
def test_state_whose_bases_cannot_be_drawn_is_refused(vit, method):
    twin = copy.deepcopy(vit)
    inject(vit, "fc1", NOLA(4, 4, terms=7))
    inject(twin, "fc1", method)
    state = vit.state_dict()
    if method.rank == 4:
        state["blocks.1.mlp.fc1.adapters.default.nola_seed"] += 1
    before = twin.blocks[1].mlp.fc1.adapters["default"].nola_down.clone()
    with pytest.raises(
        AdapterError, match=r"bases drawn from seed \d+ have checksum \d+, those of the state \d+: load it"
    ):
        twin.load_state_dict(state)
    assert torch.equal(twin.blocks[1].mlp.fc1.adapters["default"].nola_down, before)


def test_exported_as_lora(vit, tmp_path):
    plain = copy.deepcopy(vit)
    inject(vit, ["attn.qkv[q,v]", "patch_embed.proj"], NOLA(4, 6, terms=7))
    first, second = vit.blocks[0].attn.qkv.adapters["default"].parts.values()
    assert not torch.isclose(first.nola_down, second.nola_down).any()
    perturb(vit)
    expected = vit(IMAGES)
    export_lora(vit, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    torch.testing.assert_close(theirs(IMAGES), expected, rtol=1e-5, atol=1e-5)


def test_training_in_the_subspace_reduces_the_loss(vit):
    inject(vit, ["fc1", "fc2"], NOLA(2, 2, terms=16), train="head")
    vit.train()
    losses = train_steps(vit, IMAGES, [0, 2, 1], 0.01, 30)
    assert losses[-1] < 0.5 * losses[0]
    assert vit.blocks[0].mlp.fc1.adapters["default"].nola_alpha.count_nonzero() == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"alpha": float("inf")}, "alpha=inf"),
        ({"terms": 1.5}, "terms=1.5"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": True}, "seed=True"),
    ],
)
def test_settings(settings, message):
    assert NOLA(4, 6, 3).scaling == 1.5
    with pytest.raises(AdapterError, match=message):
        NOLA(**{"rank": 4, "alpha": 6, "terms": 3} | settings)
