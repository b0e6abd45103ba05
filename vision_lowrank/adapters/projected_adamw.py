"""GaLore and Fira: AdamW whose moments live in a low-rank projection of the gradient."""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from vision_lowrank.adapters.targets import Targets, base_of, find_targets
from vision_lowrank.errors import AdapterError

# keeps quotients of norms finite, as in Fira's code
_TINY = 1e-8


class ProjectedAdamW(Optimizer):
    r"""AdamW that keeps its moments in r dimensions of each gradient matrix, for groups that have a `rank`.

    A gradient G is seen as (out, rest). Every `update_gap` steps its first r singular vectors of the smaller side
    become the basis P. AdamW turns the projected gradient R, of r times the larger side, into a step N:

    - GaLore (Zhao et al. 2024, arXiv 2403.03507): :math:`W \leftarrow W - \eta c\, P N`, with `scale` c. All weights
      are trained, and the sum of steps in changing bases has any rank.
    - Fira (Chen et al. 2024, arXiv 2410.01623), with `residual`: :math:`W \leftarrow W - \eta c\,(P N + S)`, where
      :math:`S = \phi (G - P R)` is what the projection lost, scaled along the larger side by
      :math:`\phi = \|N\| / \|R\|`. A limiter lets :math:`\|S\|` grow by at most the factor `limiter` a step. The
      paper's code leaves c out of S and puts it into :math:`G - c P R`; at c = 1 the two are one.

    Moments are kept when the basis changes, as in both papers. A singular vector has no sign of its own, so the one
    nearer to the vector that it replaces is taken: kept moments then point the same way on every machine. State and
    arithmetic have the parameter's precision, the decomposition at least float32. Groups without `rank` (or None) get
    plain AdamW, equal to torch's.

    Args:
        params: parameters or groups; see `projected_groups`. All that follows can be set for a group.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, as in AdamW.
        update_gap: steps between new bases.
        scale: c, on the step of projected parameters.
        residual: Fira instead of GaLore.
        limiter: largest growth of Fira's residual from step to step, at least 1.

    Raises:
        AdapterError: a value is out of range, or a group with a rank holds a parameter with fewer than two axes.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        update_gap: int = 200,
        scale: float = 0.25,
        residual: bool = False,
        limiter: float = 1.01,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": None,
            "update_gap": update_gap,
            "scale": scale,
            "residual": residual,
            "limiter": limiter,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters with settings of their own.

        Raises:
            AdapterError: as the class.
        """
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except AdapterError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step; a closure that computes gradients is called first and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.mul_(1.0 - group["lr"] * group["weight_decay"])
                    if group["rank"] is None:
                        param.add_(_adam(param.grad, self.state[param], group), alpha=-group["lr"])
                    else:
                        update = _projected(param.grad.flatten(1), self.state[param], group)
                        param.add_(update.view(param.shape), alpha=-group["lr"] * group["scale"])
        return loss


def projected_groups(model: nn.Module, targets: Targets, rank: int) -> list[dict[str, Any]]:
    """Returns two groups for `ProjectedAdamW`: the targeted weights with a rank, and whatever else is trained.

    Args:
        model: any module.
        targets: linear and convolution layers, see `targets.find_targets`.
        rank: dimensions kept; a matrix whose smaller side is below keeps them all.

    Raises:
        AdapterError: a target matches nothing, or none of the targeted weights is trained.
    """
    weights = {base_of(model.get_submodule(path)).weight for path in find_targets(model, targets)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    projected = [parameter for parameter in trained if parameter in weights]
    others = [parameter for parameter in trained if parameter not in weights]
    if not projected:
        raise AdapterError("all targeted weights are frozen: projection is for weights that are trained themselves")
    return [{"params": projected, "rank": rank}, *([{"params": others}] if others else [])]


def _adam(grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Updates the moments of one gradient and returns the step for a learning rate of 1."""
    if not state.get("step"):
        state.update(step=0, exp_avg=torch.zeros_like(grad), exp_avg_sq=torch.zeros_like(grad))
    state["step"] += 1
    first, second = group["betas"]
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(grad, 1.0 - first)
    square.mul_(second).addcmul_(grad, grad, value=1.0 - second)
    root = square.sqrt().div_((1.0 - second ** state["step"]) ** 0.5).add_(group["eps"])
    return mean / root / (1.0 - first ** state["step"])


def _projected(grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Returns the step for a gradient (out, rest) by GaLore or Fira, for a learning rate and a scale of 1."""
    # the smaller side becomes the first; the larger one keeps its length
    wide = grad if grad.shape[0] < grad.shape[1] else grad.T
    if state.get("step", 0) % group["update_gap"] == 0:
        state["basis"] = _basis(wide, group["rank"], state.get("basis"))
    basis = state["basis"]
    low = basis.T @ wide
    normalised = _adam(low, state, group)
    update = basis @ normalised
    if group["residual"]:
        growth = normalised.norm(dim=0) / (low.norm(dim=0) + _TINY)
        update += _limited((wide - basis @ low) * growth, state, group["limiter"])
    return update if wide is grad else update.T.contiguous()


def _limited(residual: Tensor, state: dict[str, Any], limiter: float) -> Tensor:
    """Shortens a residual that is longer than the last one by more than the factor, and notes its length."""
    length = residual.norm()
    if "residual_norm" in state:
        excess = (length / (state["residual_norm"] + _TINY)).clamp(min=limiter) / limiter
        residual, length = residual / excess, length / excess
    state["residual_norm"] = length
    return residual


def _basis(wide: Tensor, rank: int, before: Tensor | None) -> Tensor:
    """Returns the first left singular vectors (rows, rank) of a matrix (rows, columns), signs as in the last basis."""
    left, _, _ = torch.linalg.svd(wide.to(torch.promote_types(wide.dtype, torch.float32)), full_matrices=False)
    basis = left[:, :rank].to(wide.dtype, copy=True, memory_format=torch.contiguous_format)
    if before is not None:
        basis *= torch.where((basis * before).sum(0) < 0, -1.0, 1.0).to(basis)
    return basis


def _check_group(group: dict[str, Any]) -> None:
    rank, betas = group["rank"], group["betas"]
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise AdapterError(f"ProjectedAdamW rank={rank!r}: give a whole number of at least 1, or None for plain AdamW")
    if group["update_gap"] < 1:
        raise AdapterError(f"ProjectedAdamW update_gap={group['update_gap']}: give at least 1 step")
    for name, least in (("lr", 0.0), ("eps", 0.0), ("weight_decay", 0.0), ("scale", 0.0), ("limiter", 1.0)):
        if not group[name] >= least:
            raise AdapterError(f"ProjectedAdamW {name}={group[name]}: give at least {least:g}")
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise AdapterError(f"ProjectedAdamW betas={betas}: give two numbers from 0 up to, but not, 1")
    if rank is not None and (flat := [tuple(param.shape) for param in group["params"] if param.ndim < 2]):
        raise AdapterError(
            f"a parameter of shape {flat[0]} has no matrix to project: put it into a group without rank, as "
            "projected_groups does"
        )
