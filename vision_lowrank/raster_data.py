"""Tasks as a benchmark measures them: fetched and read through, cut and enlarged as published, seen by some bands."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vision_lowrank.data.cards import load_card
from vision_lowrank.data.download import fetch
from vision_lowrank.data.image_tasks import TaskData, open_task, read_through
from vision_lowrank.data.task_cards import load_task_card
from vision_lowrank.data.task_views import crop_middle, enlarge, select_bands
from vision_lowrank.errors import ConfigError, DataError
from vision_lowrank.instantiate import instantiate

logger = logging.getLogger(__name__)


def present_tasks(tasks: Any) -> Any:
    """Returns the tasks of a configuration without those cut from scenes that may be absent, and are; this is logged.

    Args:
        tasks: as for `Tasks`; a description may have the key `when_present`, which is left out of the result.

    Raises:
        DataError: the card of a scene is wrong, or no task is left.
    """
    if not isinstance(tasks, Mapping):
        return tasks
    found = {}
    for name, spec in tasks.items():
        if spec.get("when_present"):
            card = load_card(spec["card"])
            if missing := card.missing(spec["root"]):
                logger.warning("task %s is left out: %s", name, card.how_to_get(missing, spec["root"]))
                continue
        found[name] = {key: value for key, value in spec.items() if key != "when_present"}
    if not found:
        raise DataError(f"none of the tasks {', '.join(tasks)} has its files; put them there, or give other tasks")
    return found


@dataclass(frozen=True)
class Opened:
    """A task with the sets to test on, by what is added to the name of the split, and the head of its authors."""

    data: TaskData
    tests: Mapping[str, Any]
    head: str


@dataclass(frozen=True)
class Tasks:
    """The tasks of a benchmark.

    Args:
        tasks: names or paths of cards; or by name what `instantiate` makes a `TaskData` of, given a seed.
        options: `root`, `split`, `fractions`, `sensors`, `bands` and `num_workers` as in
            `configs/benchmark/gfm_bench.yaml`.
    """

    tasks: Any
    options: Mapping[str, Any]

    @property
    def fractions(self) -> list[float | None]:
        """Shares of the training samples to measure with, None for the published one."""
        return self.options["fractions"] or [None]

    def share(self, name: str, fraction: float | None) -> float:
        """Returns the share of the training samples of a task."""
        if fraction is not None or isinstance(self.tasks, Mapping):
            return 1.0 if fraction is None else fraction
        return load_task_card(name).protocol.train_fraction

    def open(self, name: str, fraction: float | None, seed: int) -> Opened:
        """Opens a task by its card, or as the configuration describes it.

        Raises:
            VisionLowRankError: an option does not suit the task, or its files are missing or contradict the card.
        """
        if isinstance(self.tasks, Mapping):
            for option, others, lacking in (
                ("fractions", fraction is not None, "none"),
                ("split", self.options["split"] == "grouped", "its own"),
                ("sensors", self.options["sensors"] != ["optical"], "optical images only"),
            ):
                if others:
                    wanted = self.options[option]
                    raise ConfigError(f"benchmark.{option}={wanted}: task {name} has {lacking}; use cards of tasks")
            data: TaskData = instantiate(self.tasks[name], seed=seed)
            head = "linear"
        else:
            card = load_task_card(name)
            share, sensors = self.share(name, fraction), self.options["sensors"]
            data = open_task(card, self.options["root"], self.options["split"], share, seed, sensors)
            published = card.protocol
            head = published.head
            if card.side is None or published.crop < card.side:
                data = crop_middle(data, published.crop)
            if published.scale > 1:
                data = enlarge(data, published.scale)
        bands = self.options["bands"]
        if bands is None:
            with_radar = ", radar only" if data.radar == len(data.wavelengths) else ", with radar"
            return Opened(data, {with_radar if data.radar else "": data.test}, head)
        if data.radar:
            raise ConfigError(
                f"benchmark.bands={bands} is of wavelengths, which radar has none of; use sensors=[optical]"
            )
        seen = select_bands(data, bands["train"])
        trained = "{:g}-{:g} nm".format(*bands["train"])
        tests = {f", {trained} only": seen.test}
        for limits in bands["test"]:
            tests[", {} to {:g}-{:g} nm".format(trained, *limits)] = select_bands(data, limits).test
        return Opened(seen, tests, head)

    def prepare(self, name: str, seed: int, neighbours: int) -> Opened:
        """Fetches what is missing of a task and opens it with every share of the labels; returns the first.

        Args:
            name: of the task.
            seed: see `open`.
            neighbours: training images that an image is compared with at most.

        Raises:
            VisionLowRankError: see `open`; or files cannot be fetched, or there are too few samples.
        """
        if not isinstance(self.tasks, Mapping):
            fetch(load_task_card(name), self.options["root"])
        opened = [self.open(name, fraction, seed) for fraction in self.fractions]
        for fraction, one in zip(self.fractions, opened, strict=True):
            count = len(one.data.train)
            if one.data.kind != "segmentation" and count < neighbours:
                raise ConfigError(
                    f"benchmark.protocols.knn.neighbours has {neighbours}: {name} has {count} training images at a "
                    f"share of {self.share(name, fraction):g}; take fewer neighbours or a larger share"
                )
        if len(np.unique(opened[0].data.test.groups)) < 2:
            raise DataError(f"{name}: all test samples are of one group, so no interval can be drawn; add test images")
        return opened[0]

    def read_through(self, name: str) -> None:
        """Reads every tile of a task that has a card, once, whatever share of them is used.

        Raises:
            DataError: a tile or label map is damaged or contradicts the card.
        """
        if not isinstance(self.tasks, Mapping):
            options = self.options
            read_through(load_task_card(name), options["root"], options["num_workers"], options["sensors"])
