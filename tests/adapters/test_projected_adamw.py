"""GaLore and Fira against their equations in numpy, AdamW against torch's."""

import copy
import io

import numpy as np
import pytest
import torch
from adapter_zoo import VOLUME, make_toy
from torch import nn

from vision_lowrank.adapters import LoRA, inject
from vision_lowrank.adapters.projected_adamw import ProjectedAdamW, projected_groups
from vision_lowrank.errors import AdapterError

SHAPES = {"tall": (7, 4), "wide": (4, 7), "square": (5, 5), "conv": (3, 2, 2, 3), "conv, tall": (9, 2, 1, 2)}


def gradients(shape, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def apply(optimizer, param, grads):
    for gradient in grads:
        param.grad = gradient.to(param.dtype)
        optimizer.step()


def reference(weight, grads, rank, gap, lr, scale, decay, betas, eps, limiter, residual):
    """GaLore ('std' projection) and Fira, step by step."""
    weight, shape = weight.reshape(len(weight), -1).copy(), weight.shape
    previous = basis = None
    for step, gradient in enumerate(grads):
        gradient = gradient.reshape(len(weight), -1)
        rows, columns = gradient.shape
        if step % gap == 0:
            left, _, right = np.linalg.svd(gradient, full_matrices=False)
            new = right[:rank] if rows >= columns else left[:, :rank]
            # a vector and its negative span the same: the one nearer to the old vector
            cosines = (new * (new if step == 0 else basis)).sum(1 if rows >= columns else 0, keepdims=True)
            basis = new * np.where(cosines < 0, -1, 1)
        low = gradient @ basis.T if rows >= columns else basis.T @ gradient
        if step == 0:
            mean, square = np.zeros_like(low), np.zeros_like(low)
        mean = betas[0] * mean + (1 - betas[0]) * low
        square = betas[1] * square + (1 - betas[1]) * low**2
        normalised = mean / (1 - betas[0] ** (step + 1))
        normalised = normalised / (np.sqrt(square / (1 - betas[1] ** (step + 1))) + eps)
        update = normalised @ basis if rows >= columns else basis @ normalised
        if residual:
            axis = 1 if rows >= columns else 0
            lost = gradient - (low @ basis if rows >= columns else basis @ low)
            growth = np.linalg.norm(normalised, axis=axis) / (np.linalg.norm(low, axis=axis) + 1e-8)
            lost = lost * (growth[:, None] if rows >= columns else growth[None])
            length = np.linalg.norm(lost)
            if previous is not None:
                too_long = max(length / (previous + 1e-8), limiter) / limiter
                lost, length = lost / too_long, length / too_long
            previous = length
            update = update + lost
        weight = weight - lr * decay * weight - lr * scale * update
    return weight.reshape(shape)


@pytest.mark.parametrize("residual", [False, True], ids=["galore", "fira"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equations(shape, residual):
    torch.manual_seed(1)
    param = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    settings = {"lr": 0.1, "scale": 0.3, "betas": (0.8, 0.95), "eps": 1e-4, "limiter": 1.05}
    grads = gradients(shape, 8)
    # a jump that the limiter has to catch
    grads[5] *= 50
    expected = reference(
        param.detach().numpy(), [g.numpy() for g in grads], rank=2, gap=3, decay=0.2, residual=residual, **settings
    )
    group = {"params": [param], "rank": 2, "update_gap": 3}
    apply(ProjectedAdamW([group], weight_decay=0.2, residual=residual, **settings), param, grads)
    np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-9, atol=1e-9)


def test_without_rank_it_is_torchs_adamw():
    torch.manual_seed(1)
    ours = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    theirs = copy.deepcopy(ours)
    settings = {"lr": 0.05, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.3}
    apply(ProjectedAdamW([ours], **settings), ours, gradients((4, 3), 12))
    apply(torch.optim.AdamW([theirs], **settings), theirs, gradients((4, 3), 12))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_full_rank_of_a_linear_rule_is_gradient_descent(shape):
    torch.manual_seed(1)
    param = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    grads = gradients(shape, 5)
    expected = param.detach() - 0.5 * sum(grads)
    # with such an eps Adam's step is the gradient divided by it; the rank is above the smaller side
    optimizer = ProjectedAdamW(
        [{"params": param, "rank": 99}], lr=1e9, betas=(0.0, 0.0), eps=1e9, scale=0.5, update_gap=2
    )
    apply(optimizer, param, grads)
    torch.testing.assert_close(param.detach(), expected, rtol=1e-7, atol=1e-7)


def test_fira_at_full_rank_has_nothing_to_add():
    torch.manual_seed(1)
    galore = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    fira = copy.deepcopy(galore)
    for param, residual in ((galore, False), (fira, True)):
        optimizer = ProjectedAdamW([{"params": [param], "rank": 4}], lr=0.1, residual=residual, update_gap=2)
        apply(optimizer, param, gradients((6, 4), 5))
    torch.testing.assert_close(fira, galore, rtol=1e-10, atol=1e-10)


def test_limiter_bounds_the_growth_of_the_residual():
    param = nn.Parameter(torch.zeros(8, 6, dtype=torch.float64))
    optimizer = ProjectedAdamW([{"params": [param], "rank": 2}], lr=0.1, residual=True, limiter=1.1, eps=1.0)
    lengths = []
    for gradient, factor in zip(gradients((8, 6), 6), (1, 1, 40, 900, 1, 1), strict=True):
        apply(optimizer, param, [gradient * factor])
        lengths.append(optimizer.state[param]["residual_norm"].item())
    growth = np.array(lengths[1:]) / lengths[:-1]
    assert growth.max() <= 1.1 + 1e-6
    assert (growth > 1.1 - 1e-6).sum() >= 2
    assert growth.min() < 0.9


@pytest.mark.parametrize(("shape", "moments", "basis"), [((30, 8), (2, 30), (8, 2)), ((8, 30), (2, 30), (8, 2))])
def test_state_is_as_small_as_promised(shape, moments, basis):
    param = nn.Parameter(torch.zeros(shape))
    optimizer = ProjectedAdamW([{"params": [param], "rank": 2}], lr=0.1)
    apply(optimizer, param, gradients(shape, 1))
    state = optimizer.state[param]
    assert {key: tuple(value.shape) for key, value in state.items() if isinstance(value, torch.Tensor)} == {
        "exp_avg": moments,
        "exp_avg_sq": moments,
        "basis": basis,
    }
    # not a view that keeps all singular vectors alive
    assert state["basis"].untyped_storage().nbytes() == 4 * 8 * 2


def test_bases_that_change_leave_the_rank_free():
    change = {}
    for gap in (1, 100):
        param = nn.Parameter(torch.zeros(6, 8, dtype=torch.float64))
        apply(ProjectedAdamW([{"params": [param], "rank": 1}], lr=0.1, update_gap=gap), param, gradients((6, 8), 4))
        change[gap] = torch.linalg.matrix_rank(param.detach()).item()
    assert change == {1: 4, 100: 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True], ids=["galore", "fira"])
def test_resumed_training_is_the_same_to_the_bit(dtype, residual):
    def make():
        torch.manual_seed(1)
        params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((6, 5), (3, 4, 3), (6,))]
        groups = [{"params": params[:2], "rank": 2, "update_gap": 3}, {"params": params[2:]}]
        return params, ProjectedAdamW(groups, lr=0.1, weight_decay=0.1, residual=residual)

    grads = [gradients(shape, 8) for shape in ((6, 5), (3, 4, 3), (6,))]

    def run(params, optimizer, start, stop):
        for step in range(start, stop):
            for param, own in zip(params, grads, strict=True):
                param.grad = own[step].to(dtype)
            optimizer.step()

    through, optimizer = make()
    run(through, optimizer, 0, 8)
    first, optimizer = make()
    run(first, optimizer, 0, 4)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": first}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, optimizer = make()
    with torch.no_grad():
        for param, value in zip(second, saved["params"], strict=True):
            param.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    run(second, optimizer, 4, 8)
    assert all(torch.equal(one, other) for one, other in zip(through, second, strict=True))


def test_groups_of_a_model_and_training():
    toy = make_toy().train()
    toy.proj.requires_grad_(False)
    groups = projected_groups(toy, ["mlp.0", "mlp.2", "stem", "mix.0", "proj"], rank=2)
    names = {parameter: name for name, parameter in toy.named_parameters()}
    projected, others = ({names[p] for p in group["params"]} for group in groups)
    assert projected == {"mlp.0.weight", "mlp.2.weight", "stem.weight", "mix.0.weight"}
    assert projected | others == {name for name in names.values() if not name.startswith("proj")}
    optimizer = ProjectedAdamW(groups, lr=0.03, update_gap=5, scale=1.0)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(toy(VOLUME), torch.tensor([0, 2]))
        loss.backward()
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]


def test_targets_without_anything_to_train():
    toy = make_toy()
    toy.mlp.requires_grad_(False)
    with pytest.raises(AdapterError, match="are frozen"):
        projected_groups(toy, ["mlp.0", "mlp.2"], rank=2)
    # those below adapters are frozen too
    adapted = make_toy()
    inject(adapted, "mlp.0", LoRA(2, 4))
    with pytest.raises(AdapterError, match="are frozen"):
        projected_groups(adapted, "mlp.0", rank=2)
    assert len(projected_groups(nn.Sequential(nn.Linear(2, 2, bias=False)), "0", rank=1)) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 1.5}, "rank=1.5"),
        ({"rank": True}, "rank=True"),
        ({"update_gap": 0}, "update_gap=0"),
        ({"lr": -1.0}, "lr=-1"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"limiter": 0.5}, "limiter=0.5"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_settings_out_of_range(settings, message):
    group = {"params": [nn.Parameter(torch.zeros(2, 2))], "lr": 0.1, **settings}
    with pytest.raises(AdapterError, match=message):
        ProjectedAdamW([group], lr=0.1)


def test_a_vector_has_nothing_to_project():
    optimizer = ProjectedAdamW([nn.Parameter(torch.zeros(2, 2))], lr=0.1)
    with pytest.raises(AdapterError, match=r"\(3,\) has no matrix"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "rank": 1})
    assert len(optimizer.param_groups) == 1
