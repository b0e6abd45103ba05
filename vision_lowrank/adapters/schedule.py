"""The cyclical schedule of adaptation strength of LoLA-SpecViT, as its paper describes and its code never ran."""

import math
from bisect import bisect_right
from operator import itemgetter
from typing import Any

from torch import nn

from vision_lowrank.adapters.control import set_strength
from vision_lowrank.errors import AdapterError


class CyclicalStrength:
    r"""A factor f(t) that follows half a cosine between `minimum` and 1 in each cycle and starts anew at the next.

    With the position :math:`u \in [0, 1]` in a cycle, 0 at its first step and 1 at its last,

    .. math:: f = f_{min} + (1 - f_{min}) (1 \mp \cos \pi u) / 2 .

    Rising (minus), a cycle starts at `minimum` and ends at 1, so the last step of training has the strength at which
    the model is evaluated: this is for `set_strength`. Falling (plus) is the usual cosine with warm restarts: this is
    for the learning rate, as `LambdaLR(optimizer, schedule)` with steps counted from 0.

    The n-th cycle lasts `first_cycle * growth ** n` steps. The last one ends exactly at the last step: what remains
    after the last whole cycle is a cycle of its own if it has at least half of its length, and else prolongs the one
    before.

    Args:
        total_steps: length of training, in the unit in which `step` is called (optimiser steps or epochs).
        first_cycle: length of the first cycle in steps.
        growth: ratio of the lengths of neighbouring cycles.
        minimum: smallest factor, between 0 and 1.
        warmup: steps before the first cycle, in which the factor goes from `minimum` to 1 in a straight line.
        rising: direction within a cycle.

    Attributes:
        cycles: first step and length of every cycle; together with the warm-up they fill `total_steps`.
        step_count: calls of `step` so far.

    Raises:
        AdapterError: a value is out of range.
    """

    def __init__(
        self,
        total_steps: int,
        first_cycle: int,
        growth: int = 2,
        minimum: float = 0.1,
        warmup: int = 0,
        rising: bool = True,
    ) -> None:
        for name, value, least in (
            ("total_steps", total_steps, 1),
            ("first_cycle", first_cycle, 2),
            ("growth", growth, 1),
        ):
            if value < least:
                raise AdapterError(f"CyclicalStrength {name}={value}: give at least {least}")
        if not 0.0 <= minimum <= 1.0:
            raise AdapterError(f"CyclicalStrength minimum={minimum}: give a factor from 0 to 1")
        if not 0 <= warmup < total_steps:
            raise AdapterError(f"CyclicalStrength warmup={warmup}: give from 0 to below total_steps={total_steps}")
        self.total_steps = total_steps
        self.first_cycle = first_cycle
        self.growth = growth
        self.minimum = minimum
        self.warmup = warmup
        self.rising = rising
        self.step_count = 0
        self.cycles = self._cycles()

    def __call__(self, step: int) -> float:
        """Returns the factor at a step counted from 0; after the last step it stays."""
        step = min(step, self.total_steps - 1)
        if step < self.warmup:
            return self._between(step / self.warmup)
        start, length = self.cycles[bisect_right(self.cycles, step, key=itemgetter(0)) - 1]
        position = (step - start) / (length - 1) if length > 1 else 1.0
        cosine = math.cos(math.pi * position)
        return self._between((1.0 - cosine if self.rising else 1.0 + cosine) / 2.0)

    def step(self, model: nn.Module, name: str | None = None) -> float:
        """Sets the adapters' strength for the step that is about to be taken and counts it.

        Args:
            model: a model with adapters.
            name: the adapters to move; None moves all.

        Returns:
            The strength.

        Raises:
            AdapterError: there are no such adapters.
        """
        value = self(self.step_count)
        set_strength(model, value, name)
        self.step_count += 1
        return value

    def state_dict(self) -> dict[str, Any]:
        """Returns the settings and the number of steps taken, plain numbers."""
        return {key: value for key, value in vars(self).items() if key != "cycles"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken.

        Raises:
            AdapterError: the state belongs to a schedule with other settings.
        """
        mine = self.state_dict()
        differing = [
            key for key in mine.keys() | state.keys() if key != "step_count" and mine.get(key) != state.get(key)
        ]
        if differing:
            found = ", ".join(f"{key}={state.get(key)!r} (here {mine.get(key)!r})" for key in sorted(differing))
            raise AdapterError(f"state of a different CyclicalStrength: {found}; resume with the settings of that run")
        self.step_count = state["step_count"]

    def _between(self, share: float) -> float:
        # exact at both ends, which minimum + (1 - minimum) * share is not
        return self.minimum * (1.0 - share) + share

    def _cycles(self) -> list[tuple[int, int]]:
        cycles: list[tuple[int, int]] = []
        start, length = self.warmup, self.first_cycle
        while start < self.total_steps:
            rest = self.total_steps - start
            if rest < length and 2 * rest < length and cycles:
                first, before = cycles[-1]
                cycles[-1] = (first, before + rest)
                break
            cycles.append((start, min(length, rest)))
            start, length = start + length, length * self.growth
        return cycles
