"""What configs/benchmark/few_labels.yaml may hold, at its top and in the section `benchmark`."""

from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from vision_lowrank.data.few_labels import check_kept
from vision_lowrank.errors import ConfigError
from vision_lowrank.precision import choose_device
from vision_lowrank.random_walk import read_walk
from vision_lowrank.records import make_record
from vision_lowrank.runs import checked_seeds

# what follows the name of a method in that of its second row
WALKED = " + random walk"


@dataclass(frozen=True)
class Method:
    """A method: its samples, a name in `data`, and what makes it; or `members`, methods whose majority it is."""

    data: str
    members: tuple[str, ...] = ()
    regime: Literal["full", "probe", "adapt"] = "full"
    base: str | None = None
    transductive: bool = False
    model: dict[str, Any] | None = None
    task: dict[str, Any] | None = None
    trainer: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    pretraining: dict[str, Any] | None = None


@dataclass(frozen=True)
class FewLabels:
    """The section `benchmark`.

    Raises:
        ConfigError: a name in it is none of what it has to name.
    """

    kind: str
    card: str
    reference: str
    choices: dict[str, tuple[str, ...]]
    splits: dict[str, dict[str, Any]]
    data: dict[str, dict[str, Any]]
    methods: dict[str, Method]
    random_walk: dict[str, Any]

    def __post_init__(self) -> None:
        named = {f"methods.{name}.members": method.members for name, method in self.methods.items()}
        named |= {f"choices.{name}": members for name, members in self.choices.items()}
        for where, members in named.items():
            if strange := [item for item in members if item not in self.methods]:
                raise ConfigError(f"benchmark.{where} has {', '.join(strange)}, which is no method")
        for name, method in self.methods.items():
            if method.data not in self.data:
                raise ConfigError(f"benchmark.methods.{name}.data={method.data}: it can be {', '.join(self.data)}")
            if not method.members and method.model is None:
                raise ConfigError(f"benchmark.methods.{name} has neither a model nor members; give one of them")
        rows = [*self.methods, *self.choices]
        if self.reference.removesuffix(WALKED) not in rows:
            raise ConfigError(
                f"benchmark.reference={self.reference}: it can be {', '.join(rows)}, each with '{WALKED}' too"
            )


@dataclass(frozen=True)
class Chosen:
    """What a command chooses of it."""

    methods: tuple[str, ...]
    kinds: tuple[str, ...]
    labels: tuple[float | int, ...]
    seeds: tuple[int, ...]


def check_options(config: DictConfig) -> None:
    """Refuses what would fail later.

    Raises:
        VisionLowRankError: an option is unknown, of another kind, out of range, or names what is not there.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True)
    for name, remedy in (("random_walk", "leave it: each run gives a second row"), ("choices", "for none give {}")):
        if plain["benchmark"].get(name) is None:
            raise ConfigError(f"benchmark.{name} is null; {remedy}")
    read_walk(config.benchmark.random_walk)
    options = make_record(FewLabels, plain["benchmark"], "benchmark", ConfigError)
    chosen = make_record(Chosen, {name: plain[name] for name in Chosen.__annotations__}, "few_labels", ConfigError)
    for name, values, known in (
        ("methods", chosen.methods, options.methods),
        ("kinds", chosen.kinds, options.splits),
    ):
        if strange := [item for item in values if item not in known]:
            raise ConfigError(f"{name} has {', '.join(strange)}; it can have {', '.join(known)}")
    for name in Chosen.__annotations__:
        values = getattr(chosen, name)
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{name}={list(values)}: give at least one, none twice")
    checked_seeds(list(chosen.seeds))
    for kept in chosen.labels:
        check_kept(kept)
    if config.resume is not None or config.devices != 1:
        raise ConfigError("few_labels goes on by itself, on one device: leave out resume and devices")
    # raises where there is none
    choose_device(config.device)
