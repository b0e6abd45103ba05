"""What the sections `benchmark` and `tasks` of configs/benchmark/gfm_bench.yaml and mini.yaml may hold."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vision_lowrank.argument_types import check_least
from vision_lowrank.data.task_cards import SENSORS
from vision_lowrank.errors import ConfigError
from vision_lowrank.records import make_record
from vision_lowrank.runs import checked_seeds


@dataclass(frozen=True)
class Neighbours:
    """The protocol `knn`: numbers of neighbours that vote, and images read at once."""

    neighbours: tuple[int, ...]
    batch_size: int

    def __post_init__(self) -> None:
        if not self.neighbours:
            raise ConfigError("benchmark.protocols.knn.neighbours is empty; give at least one number")
        for number in self.neighbours:
            check_least(1, **{"benchmark.protocols.knn.neighbours": number})
        check_least(1, **{"benchmark.protocols.knn.batch_size": self.batch_size})


@dataclass(frozen=True)
class Training:
    """What protocols that train have: rates to choose from, epochs, and samples of a step."""

    learning_rates: tuple[float, ...]
    epochs: int
    batch_size: int

    def __post_init__(self) -> None:
        if not self.learning_rates or not all(0 < rate < math.inf for rate in self.learning_rates):
            rates = list(self.learning_rates)
            raise ConfigError(f"learning_rates of benchmark.protocols: {rates}; give at least one, all above 0")
        check_least(1, epochs=self.epochs, batch_size=self.batch_size)


@dataclass(frozen=True)
class Tuning(Training):
    """The protocol `finetune`: the head too, null for that of the task's authors."""

    head: Literal["linear", "upernet"] | None = None


@dataclass(frozen=True)
class Adapting(Tuning):
    """The protocol `adapter`: the layers that get LoRAs too, and their rank."""

    targets: tuple[str, ...] = ()
    rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets:
            raise ConfigError("benchmark.protocols.adapter.targets is empty; name layers of the encoder")
        check_least(1, **{"benchmark.protocols.adapter.rank": self.rank})


@dataclass(frozen=True)
class Protocols:
    """The protocols; one that is not there, or null, is left out."""

    knn: Neighbours | None = None
    linear: Training | None = None
    finetune: Tuning | None = None
    adapter: Adapting | None = None


@dataclass(frozen=True)
class Bands:
    """Nanometres from and to: to train on, and further ranges to test on."""

    train: tuple[float, ...]
    test: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        for limits in (self.train, *self.test):
            if len(limits) != 2 or not 0 < limits[0] < limits[1]:
                raise ConfigError(f"benchmark.bands: {list(limits)}; give nanometres from and to")


@dataclass(frozen=True)
class RasterOptions:
    """The section `benchmark`."""

    kind: str
    root: str
    split: Literal["published", "grouped", "blocks"]
    fractions: tuple[float, ...] | None
    seeds: tuple[int, ...]
    num_workers: int
    sensors: tuple[str, ...]
    bands: Bands | None
    encoders: dict[str, dict[str, Any]] | None
    protocols: Protocols

    def __post_init__(self) -> None:
        checked_seeds(list(self.seeds))
        if not self.sensors or set(self.sensors) - set(SENSORS):
            raise ConfigError(f"benchmark.sensors={list(self.sensors)}: give {' or '.join(SENSORS)}, or both")
        check_least(0, **{"benchmark.num_workers": self.num_workers})
        if self.fractions is not None and not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ConfigError(f"benchmark.fractions={list(self.fractions)}: give shares above 0, up to 1")


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses a section `benchmark` that cannot work, before work starts.

    Raises:
        ConfigError: an entry is unknown, missing, of another kind or out of range.
    """
    protocols = options.get("protocols")
    if isinstance(protocols, Mapping):
        known = Protocols.__dataclass_fields__
        if strange := [str(name) for name in protocols if name not in known]:
            raise ConfigError(f"benchmark.protocols has {', '.join(strange)}; it can have {', '.join(known)}")
    if not protocols or not options.get("seeds") or (isinstance(protocols, Mapping) and not any(protocols.values())):
        raise ConfigError("benchmark.protocols and benchmark.seeds need at least one entry each")
    make_record(RasterOptions, options, "benchmark", ConfigError)


def check_tasks(tasks: Any) -> None:
    """Refuses a section `tasks` that is neither a list of cards nor a mapping of descriptions.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(tasks, Mapping):
        for name, spec in tasks.items():
            if not isinstance(spec, Mapping) or "_target_" not in spec:
                raise ConfigError(f"tasks.{name} is {spec}; give what makes the task, with _target_")
    elif not isinstance(tasks, Sequence) or isinstance(tasks, str) or not all(isinstance(name, str) for name in tasks):
        raise ConfigError(f"tasks={tasks}: give a list of cards, such as [eurosat]")
    if not tasks:
        raise ConfigError("tasks is empty; give at least one")
