"""Encoders of a benchmark as its configuration describes them: built, prepared for a task, tried on it, named."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import lightning as L
from omegaconf import DictConfig, OmegaConf

from vision_lowrank.errors import ConfigError
from vision_lowrank.instantiate import instantiate
from vision_lowrank.raster_data import Opened
from vision_lowrank.raster_features import count_gmacs, weights_digest
from vision_lowrank.raster_fitting import try_model
from vision_lowrank.tasks.raster_tasks import RasterModel


def find_encoders(config: DictConfig, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the configurations of the encoders by name: `model`, or the several of the benchmark.

    Raises:
        ConfigError: there is none, or one that takes no weights is to load some.
    """
    given: Any = None if config.get("model") is None else OmegaConf.to_container(config.model, resolve=True)
    encoders = dict(options["encoders"] or {}) if given is None else {"model": given}
    if not encoders:
        raise ConfigError("no encoder to measure; give model=NAME, or benchmark.encoders")
    if config.weights is not None:
        for name, spec in encoders.items():
            if "weights" not in spec:
                raise ConfigError(f"weights={config.weights}: {spec['_target_']} has none to load; leave it out")
            encoders[name] = {**spec, "weights": config.weights}
    return encoders


def encoder_maker(spec: Mapping[str, Any], opened: Opened, seed: int, device: str) -> Callable[[], Any]:
    """Returns a function that builds the same prepared encoder each time.

    Raises:
        ConfigError: on a call; the encoder cannot be built, or does not take the channels of the task.
    """

    def make() -> Any:
        L.seed_everything(seed, workers=True, verbose=False)
        encoder = instantiate(spec)
        if opened.data.radar:
            if not hasattr(encoder, "prepare_radar"):
                raise ConfigError(f"{encoder.name} does not tell radar from optical channels; use sensors=[optical]")
            encoder.prepare_radar(opened.data.radar)
        encoder.prepare(opened.data.wavelengths.tolist())
        return encoder.to(device)

    return make


def try_encoders(encoders: Mapping[str, Mapping[str, Any]], opened: Opened, heads: Collection[str], seed: int) -> None:
    """Runs samples through each encoder and the heads on it, so that what does not fit is known before work starts.

    Args:
        encoders: configurations by name.
        opened: a task; the samples are the first ones of its sets.
        heads: that are trained on encoders with parameters.
        seed: of the encoders.

    Raises:
        ConfigError: an encoder does not fit the task or a head, or rows could not tell two encoders apart.
    """
    known: dict[tuple[str, str], str] = {}
    for name, spec in encoders.items():
        encoder = encoder_maker(spec, opened, seed, "cpu")().eval()
        for samples in opened.tests.values():
            count_gmacs(encoder, samples, opened.data.kind, "cpu")
        if "upernet" in heads and any(True for _ in encoder.parameters()):
            try_model(RasterModel(encoder, opened.data.kind, len(opened.data.classes), "upernet"), opened.data, "cpu")
        # rows know an encoder by these
        called = (encoder.name, weights_name(encoder, spec))
        if called in known:
            raise ConfigError(
                f"benchmark.encoders: {known[called]} and {name} are both called {encoder.name}; run them apart"
            )
        known[called] = name


def weights_name(encoder: Any, spec: Mapping[str, Any]) -> str:
    """Returns what a table calls the weights."""
    if not any(True for _ in encoder.parameters()):
        return "none"
    known = spec.get("weights") is not None or spec.get("pretrained")
    return weights_digest(encoder) if known else "random"
