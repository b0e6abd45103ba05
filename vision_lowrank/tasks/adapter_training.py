"""What adapters need around and during training, whatever the task: how they get into a model, and what a step does.

What a configuration's `adapter` holds tells `AdapterOptions`.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from vision_lowrank.adapters import (
    LoRAXS,
    ParameterCount,
    count_parameters,
    inject,
    lora_sb_gradients,
    save_adapter,
)
from vision_lowrank.adapters.dylora import DyLoRAAdapter, sample_rank
from vision_lowrank.adapters.flylora import FlyLoRAAdapter, balance_ranks
from vision_lowrank.adapters.lora_pro import adjust_gradients
from vision_lowrank.adapters.methods import Method
from vision_lowrank.adapters.peft_methods import inject_peft
from vision_lowrank.adapters.sora import SoRAAdapter, active_ranks, proximal_step
from vision_lowrank.adapters.targets import Targets
from vision_lowrank.data.scene import IGNORE
from vision_lowrank.errors import ConfigError
from vision_lowrank.processes import ALONE, SharedBatches
from vision_lowrank.records import make_record
from vision_lowrank.runs import atomic_folder

logger = logging.getLogger(__name__)

# what a model takes, in its order, and the labels
Batches = Sequence[tuple[Sequence[Tensor], Tensor]]


@dataclass(frozen=True)
class Cycles:
    """Settings of `CyclicalStrength`, the first cycle in epochs.

    Raises:
        ConfigError: one is out of range.
    """

    first_cycle: float
    growth: int = 2
    minimum: float = 0.1

    def __post_init__(self) -> None:
        if not (0 < self.first_cycle < math.inf and self.growth >= 1 and 0 <= self.minimum <= 1):
            raise ConfigError(
                f"adapter.cycles: first_cycle={self.first_cycle}, growth={self.growth}, minimum={self.minimum}; give "
                "epochs above 0, a whole number from 1 up and a share"
            )


@dataclass(frozen=True)
class StepOptions:
    """Arguments of `AdapterTraining`."""

    sparsity: float | None = None
    lora_pro: bool = False


@dataclass(frozen=True)
class AdapterOptions:
    """The section `adapter` of a configuration.

    Attributes:
        name: of the method, for tables.
        method: an adapter of our own, or `PeftAdapter`, as `instantiate` takes it.
        targets: layers, see `adapters.inject`.
        train: modules to train beside the adapters, such as the head.
        cycles: of strength and learning rate, None for a strength of 1.
        learning_rate: the highest.
        rate_ratio: of the factors B (LoRA+).
        training: what steps do beside the optimiser.
        samples: of training, that methods which start from data see.
        size: key of `method` that gives an adapter its size.

    Raises:
        ConfigError: one is out of range.
    """

    name: str
    method: Any
    targets: tuple[str, ...]
    train: tuple[str, ...]
    cycles: Cycles | None
    learning_rate: float
    rate_ratio: float | None
    training: StepOptions
    samples: int
    size: str

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"adapter.learning_rate is {self.learning_rate}; give a number above 0")
        if self.samples < 1:
            raise ConfigError(f"adapter.samples is {self.samples}; give at least 1")


def read_options(section: Mapping[str, Any]) -> AdapterOptions:
    """Returns the section `adapter` of a configuration.

    Raises:
        ConfigError: an entry is unknown, missing, of another kind or out of range.
    """
    return make_record(AdapterOptions, section, "adapter", ConfigError)


class PeftAdapter:
    """A method of peft as a configuration names it.

    Args:
        name: one of `peft_methods.PEFT_METHODS`.
        rank: as for `peft_methods.inject_peft`.
        settings: likewise: `alpha`, `dropout`, `seed`, `factor`, where the method has them.
    """

    def __init__(self, name: str, rank: int, **settings: Any) -> None:
        self.name = name
        self.rank = rank
        self.settings = settings


def put_adapters(
    model: nn.Module,
    method: Method | PeftAdapter,
    targets: Targets,
    train: Targets,
    batches: Callable[[], Batches],
) -> nn.Module:
    """Puts adapters on a model, with what the method wants to see of the data first, and freezes the rest.

    Args:
        model: without adapters; it is changed.
        method: ours or of peft.
        targets: layers, see `adapters.inject`.
        train: modules to train beside the adapters, such as the head.
        batches: returns training samples; called only by methods that start from data: LoRA-SB takes the gradient of
            the cross-entropy on them, `eva` of peft what they give the layers to see.

    Returns:
        The model to train: `model`, or peft's model around it.

    Raises:
        AdapterError: targets or settings do not fit the model.
    """
    if isinstance(method, PeftAdapter):
        inputs = [list(taken) for taken, _ in batches()] if method.name == "eva" else []
        settings: dict[str, Any] = {"rank": method.rank, "train": train, "inputs": inputs, **method.settings}
        adapted: nn.Module = inject_peft(model, method.name, targets, **settings)
        return adapted
    if isinstance(method, LoRAXS) and method.init == "gradient":
        training = model.training
        model.eval()
        losses = (F.cross_entropy(model(*taken), label, ignore_index=IGNORE) for taken, label in batches())
        lora_sb_gradients(model, targets, losses)
        model.train(training)
    inject(model, targets, method, train=train)
    return model


def first_batches(loader: Any, inputs: Sequence[str], samples: int) -> Batches:
    """Returns the first batches of a loader of {"image": ..., "label": ...}, of as many samples together at least.

    Of `SharedBatches` these are the whole batches: every process returns what one alone would, so that all start alike.
    """
    batches = getattr(loader, "batch_sampler", None)
    if isinstance(batches, SharedBatches):
        loader = DataLoader(
            loader.dataset,
            batch_sampler=batches.of(ALONE),
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
        )
    found: list[tuple[Sequence[Tensor], Tensor]] = []
    for batch in loader:
        found.append(([batch[name] for name in inputs], batch["label"]))
        samples -= len(batch["label"])
        if samples <= 0:
            break
    return found


def save_adapters(model: Any, folder: Path) -> None:
    """Writes the adapters with the modules trained beside them, for `adapters.load_adapter` or for peft."""
    if hasattr(model, "peft_config"):
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)
    else:
        save_adapter(model, folder)


def count_trained(model: Any) -> ParameterCount:
    """Counts parameters by kind, with our adapters, with peft's, or without any."""
    if not hasattr(model, "peft_config"):
        return count_parameters(model)
    parameters = dict(model.named_parameters())
    # peft trains a copy of each module and keeps the frozen original beside it
    sizes = {name: value.numel() for name, value in parameters.items() if ".original_module." not in name}
    trained = {name: size for name, size in sizes.items() if parameters[name].requires_grad}
    head = sum(size for name, size in trained.items() if ".modules_to_save." in name)
    trainable = sum(trained.values())
    return ParameterCount(sum(sizes.values()) - trainable, trainable - head, head, trainable)


class AdapterTraining(Callback):
    """Does at each step what the model's adapters ask for; a model without such adapters trains as ever.

    The model is the task's `model`, or the task itself where it has none. DyLoRA gets its rank before each step, drawn
    from the step and the task's `seed`, or else torch's initial seed in process 0, so that a resumed run and all
    processes draw the same. SoRA's gates take a proximal step after each step of the optimiser, and FlyLoRA's biases
    move. LoRA-Pro replaces the gradients before they are clipped.

    Args:
        sparsity: weight of the sum of |gate| of SoRA in the loss; the threshold of the proximal step is this times the
            present learning rate. SoRA needs it, other methods have no gates.
        lora_pro: train plain LoRA with the gradients of LoRA-Pro.

    Raises:
        ConfigError: the sparsity is negative.
    """

    def __init__(self, sparsity: float | None = None, lora_pro: bool = False) -> None:
        if sparsity is not None and not 0 <= sparsity < float("inf"):
            raise ConfigError(f"adapter.training.sparsity={sparsity}: give a finite number of at least 0")
        self.sparsity = sparsity
        self.lora_pro = lora_pro
        self.seed = 0

    def check(self, model: nn.Module) -> None:
        """Compares the settings with the adapters of a model that has no gradients yet.

        Raises:
            ConfigError: SoRA without a sparsity.
            AdapterError: settings for adapters that the model does not have.
        """
        if self.sparsity is None and _has(model, SoRAAdapter):
            raise ConfigError("SoRA without adapter.training.sparsity would be LoRA: give it, such as 0.3")
        if self.sparsity is not None:
            active_ranks(model)
        if self.lora_pro:
            adjust_gradients(model)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses settings that do not belong to the model, see `check`, and settles the seed."""
        self.check(_model(pl_module))
        seed: Any = getattr(pl_module, "seed", None)
        self.seed = trainer.strategy.broadcast(torch.initial_seed()) if seed is None else seed

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes the optimiser's steps be followed by the proximal one, and by that of FlyLoRA's biases."""
        model, sparsity = _model(pl_module), self.sparsity
        if _has(model, FlyLoRAAdapter):
            trainer.optimizers[0].register_step_post_hook(lambda *_: balance_ranks(model))
        if sparsity is None:
            return
        gates = {module.sora_gate for module in model.modules() if isinstance(module, SoRAAdapter)}

        def shrink(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            rates = [group["lr"] for group in optimizer.param_groups if not gates.isdisjoint(group["params"])]
            proximal_step(model, sparsity * rates[0])

        # not at the batch's end, which is no step where gradients are accumulated or an overflow is skipped
        trainer.optimizers[0].register_step_post_hook(shrink)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draws the rank of the step."""
        model = _model(pl_module)
        if _has(model, DyLoRAAdapter):
            sample_rank(model, torch.Generator().manual_seed(self.seed + trainer.global_step))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Replaces the gradients."""
        if self.lora_pro:
            adjust_gradients(_model(pl_module))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tells how many ranks SoRA left."""
        if self.sparsity is not None:
            ranks = active_ranks(_model(pl_module))
            logger.info("SoRA: %d ranks with a gate that is not zero, in %d layers", sum(ranks.values()), len(ranks))


def _model(task: L.LightningModule) -> nn.Module:
    model = getattr(task, "model", None)
    return model if isinstance(model, nn.Module) else task


def _has(model: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(module, kind) for module in model.modules())
