"""Layer sampling in the style of OwLore: a few blocks are trained at a time, those with many outliers more often."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vision_lowrank.adapters.targets import Targets, find_modules
from vision_lowrank.errors import AdapterError


class LayerSampler:
    r"""Freezes all blocks but a few, which it draws anew every `period` steps (OwLore, arXiv 2405.18380).

    Blocks are drawn without replacement with :math:`p_l \propto \mathrm{score}_l`. The draw depends on seed and step
    alone: a resumed run trains the same blocks, and all processes train the same (DistributedDataParallel has to be
    told to find unused parameters). What lies outside the blocks stays as it is. Build the optimiser before the first
    step, over everything that is to be trained; it passes over frozen blocks, since their gradients are taken away, and
    keeps their moments. With `ProjectedAdamW` this is OwLore, save for the score, see `outlier_scores`.

    Args:
        model: the model to be trained.
        scores: score of each block by path, at least `count` of them above 0.
        count: blocks trained at a time.
        period: steps between draws.
        seed: of the draws.

    Attributes:
        step_count: calls of `step` so far.

    Raises:
        AdapterError: a value is out of range, or a block has nothing to train.
    """

    def __init__(self, model: nn.Module, scores: Mapping[str, float], count: int, period: int, seed: int = 0) -> None:
        positive = sum(score > 0 for score in scores.values())
        if not np.isfinite(list(scores.values())).all() or min(scores.values(), default=0.0) < 0:
            raise AdapterError(f"scores {dict(scores)}: give finite numbers of at least 0")
        if not 1 <= count <= positive:
            raise AdapterError(
                f"count={count} blocks to draw, but {positive} have a score above 0: give from 1 to that, or lower the "
                "multiple of the mean from which outlier_scores counts"
            )
        if period < 1:
            raise AdapterError(f"period={period}: give at least 1 step")
        self.scores = dict(scores)
        self.count = count
        self.period = period
        self.seed = seed
        self.step_count = 0
        # what a user froze before stays frozen
        self._trained = {
            path: [parameter for parameter in model.get_submodule(path).parameters() if parameter.requires_grad]
            for path in scores
        }
        if idle := [path for path, parameters in self._trained.items() if not parameters]:
            raise AdapterError(f"block {idle[0]!r} has no parameter with a gradient: leave it out of the scores")

    def __call__(self, step: int) -> list[str]:
        """Returns the blocks that are trained at a step counted from 0, in the order of the scores."""
        paths = list(self.scores)
        weights = np.array(list(self.scores.values()), dtype=np.float64)
        generator = np.random.default_rng([self.seed, step // self.period])
        chosen = generator.choice(len(paths), self.count, replace=False, p=weights / weights.sum())
        return [paths[place] for place in sorted(chosen)]

    def step(self) -> list[str]:
        """Freezes and unfreezes for the step that is about to be taken, before its forward pass, and counts it.

        Returns:
            The blocks that are trained.
        """
        chosen = self(self.step_count)
        for path, parameters in self._trained.items():
            for parameter in parameters:
                parameter.requires_grad_(path in chosen)
                if path not in chosen:
                    # an optimiser would go on along a gradient that is left over
                    parameter.grad = None
        self.step_count += 1
        return chosen

    def state_dict(self) -> dict[str, Any]:
        """Returns settings and the number of steps taken, plain numbers."""
        return {
            "scores": self.scores,
            "count": self.count,
            "period": self.period,
            "seed": self.seed,
            "step_count": self.step_count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken.

        Raises:
            AdapterError: the state belongs to a sampler with other settings.
        """
        mine = self.state_dict()
        if differing := [key for key in mine if key != "step_count" and mine[key] != state.get(key)]:
            key = differing[0]
            raise AdapterError(
                f"state of a different LayerSampler: {key}={state.get(key)!r} (here {mine[key]!r}); resume with the "
                "settings of that run"
            )
        self.step_count = state["step_count"]


@torch.no_grad()
def outlier_scores(
    model: nn.Module, blocks: Targets, batches: Iterable[Tensor], multiple: float = 13.0
) -> dict[str, float]:
    r"""Returns for each block the share of its weights that stand out, the layer outlier distribution of OWL.

    With :math:`A_{ij} = |W_{ij}| \sqrt{\mathrm{mean}\, x_j^2}` over all linear layers of a block, it is the share of A
    above `multiple` times its mean (Yin et al. 2024, arXiv 2310.05175). OwLore's repository holds a table of its
    scores, named for the multiple 13, but not the program that made it; that they are these is our reading.

    Args:
        model: a model in evaluation mode.
        blocks: modules with linear layers, such as `"blocks.*"`, named as in `targets.find_modules`.
        batches: inputs of the model, from training data; a few are enough.
        multiple: of the mean from which an entry counts.

    Raises:
        AdapterError: the model is in training mode, there are no batches, or a block calls no linear layer.
    """
    if model.training:
        raise AdapterError("outlier scores of a model in training mode depend on chance: call model.eval() first")
    layers = {
        path: [module for module in model.get_submodule(path).modules() if isinstance(module, nn.Linear)]
        for path in find_modules(model, blocks)
    }
    squares: dict[nn.Module, Tensor] = {}
    rows: dict[nn.Module, int] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()
        squares[module] = squares.get(module, x.new_zeros(())) + x.square().sum(0)
        rows[module] = rows.get(module, 0) + len(x)

    with ExitStack() as hooks:
        for layer in {layer for inside in layers.values() for layer in inside}:
            hooks.callback(layer.register_forward_pre_hook(note).remove)
        for batch in batches:
            model(batch)
    scores = {}
    for path, inside in layers.items():
        entries = [
            (layer.weight.float().abs() * (squares[layer] / rows[layer]).sqrt()).flatten()
            for layer in inside
            if layer in squares
        ]
        if not entries:
            raise AdapterError(f"block {path!r} called no linear layer on these batches: its outliers are not defined")
        together = torch.cat(entries)
        scores[path] = (together > multiple * together.mean()).float().mean().item()
    return scores
