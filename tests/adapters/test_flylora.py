"""FlyLoRA against a slow loop over tokens: the choice of ranks, the balancing bias, gradients, and refusals."""

import copy
import math

import peft
import pytest
import torch
import torch.multiprocessing as mp
from adapter_zoo import IMAGES, adapted_layer, perturb, train_steps
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vision_lowrank import adapters
from vision_lowrank.adapters import FlyLoRA, export_lora, inject
from vision_lowrank.adapters.flylora import balance_ranks
from vision_lowrank.errors import AdapterError

KINDS = ["linear", "linear tokens, no bias", "conv1d", "conv2d", "conv2d dilated, reflected", "conv3d"]


def projections(layer, x):
    """A x as rows of tokens, (tokens, rank), from a layer like the base whose weight is A."""
    adapter = layer.adapters["default"]
    down = copy.deepcopy(layer.base)
    down.weight.data, down.bias = adapter.fly_A.clone(), None
    h = down(x)
    return (h if isinstance(layer.base, nn.Linear) else h.movedim(1, -1)).reshape(-1, adapter.fly_A.shape[0])


def chosen_by_loop(h, bias, active):
    """The ranks each token chooses, a list a token."""
    return [
        sorted(range(len(token)), key=lambda i, token=token: -abs(token[i] + bias[i]))[:active] for token in h.tolist()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_output_follows_the_choice_of_each_token(kind):
    model, x = adapted_layer(kind, FlyLoRA(5, 10, active=2))
    layer, adapter = model[0], model[0].adapters["default"]
    base = layer.base(x)
    assert torch.equal(model(x), base)
    perturb(model)
    adapter.fly_d.copy_(torch.tensor([0.3, -0.2, 0.0, 0.5, -0.4]))
    adapters.set_strength(model, 0.7)
    h = projections(layer, x)
    up = adapter.fly_B.weight.flatten(1)
    expected = torch.zeros(len(h), up.shape[0], dtype=torch.float64)
    for token, ranks in enumerate(chosen_by_loop(h, adapter.fly_d.tolist(), 2)):
        for i in ranks:
            expected[token] += 0.7 * 10 / 5 * h[token, i] * up[:, i]
    difference = model(x) - base
    difference = difference if isinstance(layer.base, nn.Linear) else difference.movedim(1, -1)
    torch.testing.assert_close(difference.reshape(expected.shape), expected, rtol=1e-9, atol=1e-9)
    adapters.set_strength(model, 0.0)
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3)], ids=["linear", "conv2d"])
def test_exactly_k_ranks_a_token(layer):
    model = nn.Sequential(layer).double()
    inject(model, "0", FlyLoRA(5, 5, active=3))
    with torch.no_grad():
        up = model[0].adapters["default"].fly_B.weight
        up.copy_(torch.eye(5).view_as(up))
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    x = x.movedim(1, -1) if isinstance(layer, nn.Linear) else x
    used = (model(x) - layer(x)).abs() > 1e-12
    assert (used.sum(-1 if isinstance(layer, nn.Linear) else 1) == 3).all()


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_gradient_reaches_the_input_and_b_but_not_a(kind):
    model, x = adapted_layer(kind, FlyLoRA(5, 10, active=2))
    perturb(model)
    torch.autograd.gradcheck(model, x.requires_grad_(True))
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "0.adapters.default.fly_B.weight"
    ]
    layer, adapter = model[0], model[0].adapters["default"]
    model(x).sum().backward()
    # only tokens that chose a rank reach its column of B
    h = projections(layer, x).detach()
    column = torch.zeros(5, dtype=torch.float64)
    for token, ranks in zip(h, chosen_by_loop(h, [0.0] * 5, 2), strict=True):
        column[ranks] += 2.0 * token[ranks]
    torch.testing.assert_close(adapter.fly_B.weight.grad.flatten(1), column.expand(8, 5))


@pytest.mark.parametrize("kind", ["linear tokens, no bias", "conv2d"])
def test_with_all_ranks_active_it_is_lora_with_a_frozen_projection(kind):
    model, x = adapted_layer(kind, FlyLoRA(4, 6, active=4))
    perturb(model).train()
    layer, adapter = model[0], model[0].adapters["default"]
    assert adapter.fly_A.count_nonzero() == adapter.fly_A.numel()
    dense = copy.deepcopy(layer.base)
    product = torch.einsum("or,ri->oi", adapter.fly_B.weight.flatten(1), adapter.fly_A.flatten(1))
    dense.weight.data += 1.5 * product.view(dense.weight.shape)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-10, atol=1e-10)
    assert adapter.fly_d.count_nonzero() == 0
    model.eval()
    weight = layer.base.weight.clone()
    adapters.merge(model)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-10, atol=1e-10)
    adapters.unmerge(model)
    assert torch.equal(layer.base.weight, weight)


def test_only_with_all_ranks_active_it_is_exported_as_lora(vit, tmp_path):
    plain = copy.deepcopy(vit)
    inject(vit, ["fc1", "patch_embed.proj"], FlyLoRA(4, 6, active=4))
    perturb(vit)
    export_lora(vit, tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(theirs(IMAGES), vit(IMAGES), rtol=1e-5, atol=1e-5)
    inject(vit, "fc2", FlyLoRA(4, 6, active=3))
    with pytest.raises(AdapterError, match="which is no LoRA"):
        export_lora(vit, tmp_path)


def test_with_fewer_it_is_not_additive_and_not_merged(vit):
    inject(vit, "fc1", FlyLoRA(6, 12, active=2))
    perturb(vit)
    layer = vit.blocks[0].mlp.fc1

    def contribution(x):
        return layer(x) - layer.base(x)

    x, z = torch.randn(2, 20, 16)
    assert (contribution(x) + contribution(z) - contribution(x + z)).abs().max() > 0.01
    assert adapters.folded_weight(layer) is None
    with pytest.raises(AdapterError, match=r"FlyLoRA.* cannot be merged"):
        adapters.merge(vit)
    with pytest.raises(AdapterError, match="active=2 of 6 ranks has no equivalent weight"):
        layer.merge()
    assert not layer.merged


def test_projection_is_sparse_by_rows_with_the_variance_of_the_paper():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 3), nn.Conv1d(5, 3, 3))
    inject(model, ["0", "1"], FlyLoRA(32, 64, active=8))
    projection = model[0].adapters["default"].fly_A
    assert projection.shape == (32, 400)
    assert (projection.count_nonzero(dim=1) == 100).all()
    places = projection.count_nonzero(dim=0)
    # columns are hit 32 / 4 times on average, and not all alike
    assert places.float().mean() == 8
    assert places.float().std().item() == pytest.approx(math.sqrt(32 * 0.25 * 0.75), rel=0.2)
    values = projection[projection != 0]
    assert values.std().item() == pytest.approx(1 / 32, rel=0.05)
    assert values.mean().abs() < 4 / 32 / 3200**0.5
    assert (model[1].adapters["default"].fly_A.flatten(1).count_nonzero(dim=1) == round(15 / 4)).all()


@pytest.mark.parametrize("kind", ["linear tokens, no bias", "conv2d"])
def test_bias_moves_by_the_sign_of_the_missing_tokens_in_training_only(kind):
    model, x = adapted_layer(kind, FlyLoRA(5, 10, active=2, balance_rate=0.25))
    adapter = model[0].adapters["default"]
    model(x)
    assert adapter.fly_d.count_nonzero() == 0
    model.train()
    bias = [0.0] * 5
    for _ in range(4):
        choices = [i for ranks in chosen_by_loop(projections(model[0], x), bias, 2) for i in ranks]
        counts = [choices.count(i) for i in range(5)]
        mean = sum(counts) / 5
        bias = [value + 0.25 * ((mean > count) - (mean < count)) for value, count in zip(bias, counts, strict=True)]
        model(x)
        balance_ranks(model)
        assert adapter.fly_d.tolist() == bias
    assert any(bias)
    model.eval()
    model(x)
    balance_ranks(model)
    assert adapter.fly_d.tolist() == bias


def test_tokens_of_all_forwards_of_a_step_count_together():
    model, _ = adapted_layer("linear", FlyLoRA(2, 4, active=1, balance_rate=0.25))
    adapter = model[0].adapters["default"]
    adapter.fly_A.zero_()
    adapter.fly_A[0, 0] = adapter.fly_A[1, 1] = 1.0
    model.train()
    first, second = torch.eye(6, dtype=torch.float64)[:2]
    model(first.expand(3, 6))
    model(second.expand(5, 6))
    balance_ranks(model)
    assert adapter.fly_d.tolist() == [0.25, -0.25]


def _train(part, wrap):
    """Takes steps, of two batches each, on this process's part of them; returns the biases and the trained factor."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).double().train()
    inject(model, "0", FlyLoRA(8, 16, active=2, balance_rate=0.01))
    wrapped = wrap(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        optimizer.zero_grad()
        for _ in range(2):
            x, y = (torch.randn(8, size, dtype=torch.float64, generator=generator)[part] for size in (16, 3))
            nn.functional.mse_loss(wrapped(x), y).backward()
        optimizer.step()
        balance_ranks(model)
    adapter = model[0].adapters["default"]
    return adapter.fly_d.clone(), adapter.fly_B.weight.detach().clone()


def _worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(_train(slice(4 * rank, 4 * rank + 4), DistributedDataParallel), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_tokens_of_all_processes_count_together(tmp_path):
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    bias, up = _train(slice(None), lambda model: model)
    assert len(bias.unique()) > 3
    for rank in (0, 1):
        found, factor = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(found, bias)
        torch.testing.assert_close(factor, up, atol=1e-12, rtol=1e-10)


def test_checkpointed_activations_change_nothing(vit):
    inject(vit, ["qkv", "fc1"], FlyLoRA(6, 12, active=2, balance_rate=0.1), train="head")
    perturb(vit).train()
    twin = copy.deepcopy(vit)
    twin.set_grad_checkpointing()
    for _ in range(3):
        for model in (vit, twin):
            model.zero_grad()
            model(IMAGES).square().sum().backward()
            balance_ranks(model)
        for (name, ours), theirs in zip(vit.named_parameters(), twin.parameters(), strict=True):
            if ours.requires_grad:
                torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
    bias = vit.blocks[0].mlp.fc1.adapters["default"].fly_d
    assert bias.any()
    assert torch.equal(bias, twin.blocks[0].mlp.fc1.adapters["default"].fly_d)


def test_bias_brings_a_starved_rank_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    inject(model, "0", FlyLoRA(8, 16, active=2, balance_rate=0.005))
    adapter = model[0].adapters["default"]
    adapter.fly_A[0] *= 1e-3
    x = torch.randn(500, 16)

    def share():
        h = x @ adapter.fly_A.T
        return sum(0 in ranks for ranks in chosen_by_loop(h, adapter.fly_d.tolist(), 2)) / len(x)

    assert share() == 0.0
    model.train()
    for _ in range(200):
        model(x)
        balance_ranks(model)
    assert share() > 0.05


def test_seed_gives_the_same_projection_again_and_each_layer_its_own(vit):
    state = torch.get_rng_state()
    twin = copy.deepcopy(vit)
    inject(vit, "fc1", FlyLoRA(6, 12, active=2))
    inject(twin, "fc1", FlyLoRA(6, 12, active=2))
    inject(twin, "fc1", FlyLoRA(6, 12, active=2, seed=1), name="other")
    assert torch.equal(torch.get_rng_state(), state)
    projection = vit.blocks[0].mlp.fc1.adapters["default"].fly_A
    assert torch.equal(projection, twin.blocks[0].mlp.fc1.adapters["default"].fly_A)
    assert not torch.equal(projection, twin.blocks[0].mlp.fc1.adapters["other"].fly_A)
    assert not torch.equal(projection, vit.blocks[1].mlp.fc1.adapters["default"].fly_A)


def test_count_training_and_state(vit):
    plain = copy.deepcopy(vit)
    method = FlyLoRA(6, 12, active=2)
    inject(vit, ["fc1", "patch_embed.proj"], method, train="head")
    count = adapters.count_parameters(vit)
    assert count.adapter == 6 * (2 * 64 + 16)
    assert count.trainable == count.adapter + count.head
    vit.train()
    losses = train_steps(vit, IMAGES, [0, 2, 1], 0.05, 15)
    assert losses[-1] < 0.5 * losses[0]
    inject(plain, ["fc1", "patch_embed.proj"], method, train="head")
    plain.load_state_dict(vit.state_dict())
    assert torch.equal(plain.eval()(IMAGES), vit.eval()(IMAGES))


def test_bf16_autocast(vit):
    inject(vit, "fc1", FlyLoRA(6, 12, active=2))
    perturb(vit).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vit(IMAGES).float().sum().backward()
    balance_ranks(vit)
    adapter = vit.blocks[0].mlp.fc1.adapters["default"]
    assert adapter.fly_d.dtype == adapter.fly_B.weight.grad.dtype == torch.float32
    assert adapter.fly_d.count_nonzero() > 0


def test_convolution_with_groups_is_refused():
    model = nn.Sequential(nn.Conv2d(6, 8, 3, groups=2))
    with pytest.raises(AdapterError, match="with groups a position has one h for each group"):
        inject(model, "0", FlyLoRA(4, 8, active=2))
    assert isinstance(model[0], nn.Conv2d)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"active": 0}, "active=0"),
        ({"active": 5}, "active=5: give at most the rank, 4"),
        ({"balance_rate": -1.0}, "balance_rate=-1.0"),
        ({"balance_rate": float("inf")}, "balance_rate=inf"),
        ({"seed": 1.5}, "seed=1.5"),
    ],
)
def test_settings(settings, message):
    assert FlyLoRA(4, 6, 2).scaling == 1.5
    with pytest.raises(AdapterError, match=message):
        FlyLoRA(**{"rank": 4, "alpha": 6, "active": 2} | settings)
