import functools
import importlib
import math
import pathlib
import re
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from timm.scheduler import CosineLRScheduler

from vision_lowrank.argument_types import fits
from vision_lowrank.errors import ConfigError
from vision_lowrank.instantiate import instantiate, resolve
from vision_lowrank.runs import create_run_folder

REFUSAL = r"refused|there is no module|has no"


def test_partial_optimizer_takes_parameters_later():
    config = OmegaConf.create({"_target_": "torch.optim.AdamW", "lr": 0.5, "betas": [0.8, 0.9], "_partial_": True})
    make = instantiate(config)
    assert isinstance(make, functools.partial)
    optimizer = make([torch.nn.Parameter(torch.ones(1))])
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["lr"] == 0.5
    assert type(make.keywords["betas"]) is list


def test_extra_arguments_reach_the_outermost_target():
    optimizer = instantiate({"_target_": "torch.optim.SGD", "lr": 0.1}, params=[torch.nn.Parameter(torch.ones(1))])
    scheduler = instantiate({"_target_": "timm.scheduler.CosineLRScheduler", "t_initial": 5}, optimizer=optimizer)
    assert isinstance(scheduler, CosineLRScheduler)
    assert scheduler.optimizer is optimizer


def test_recursion_through_mappings_and_lists(tmp_path):
    checkpoint = {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "monitor": "${name}", "mode": "max"}
    config = OmegaConf.create(
        {
            "name": "val/oa",
            "made": {"callbacks": [checkpoint, 3], "plain": {"a": None}},
            "trainer": {
                "_target_": "lightning.pytorch.Trainer",
                "accelerator": "cpu",
                "logger": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(tmp_path)},
                "callbacks": [checkpoint],
                "enable_progress_bar": False,
            },
        }
    )
    built = instantiate(config)
    assert built["made"]["plain"] == {"a": None}
    assert type(built["made"]["callbacks"]) is list
    assert isinstance(built["made"]["callbacks"][0], ModelCheckpoint)
    assert built["made"]["callbacks"][1] == 3
    assert built["trainer"].logger.save_dir == str(tmp_path)
    assert built["trainer"].checkpoint_callback.monitor == "val/oa"


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "posix.system",
        "logging.os.system",
        "builtins.eval",
        "pathlib.Path.unlink",
        "functools.partial",
        "subprocess.run",
        "torch.load",
        "torch.hub.load",
        "lightning.pytorch.LightningModule",
        "hydra.utils.instantiate",
        # names inside the list, objects outside
        "vision_lowrank.runs.os.system",
        "vision_lowrank.runs.os",
        "vision_lowrank.runs.subprocess.run",
        "vision_lowrank.runs.contextmanager",
        "vision_lowrank.instantiate.functools.partial",
        "vision_lowrank.instantiate.Any",
        "vision_lowrank.instantiate.DictConfig",
        "torch.optim.optimizer.torch.load",
        "torch.optim.lr_scheduler.types.FunctionType",
        "lightning.pytorch.callbacks.model_checkpoint.shutil.rmtree",
        "lightning.pytorch.loggers.csv_logs.os.remove",
        "lightning.pytorch.Trainer.save_checkpoint",
        "timm.scheduler.scheduler.ABC",
        # neighbours in spelling, private names, things that are no names
        "vision_lowrank_evil.anything",
        "torch.optimizer.AdamW",
        "torch.optim",
        "vision_lowrank",
        "vision_lowrank.runs._plain",
        "vision_lowrank.__builtins__.eval",
        "vision_lowrank..runs",
        "",
        None,
        3,
    ],
)
def test_targets_off_the_list_are_refused_and_not_called(target, tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("alive")
    argument = f"rm -f {canary}; touch {tmp_path / 'executed'}"
    for inner in ({"_target_": target}, {"_target_": target, "command": argument}, {"_target_": target, "path": "x"}):
        with pytest.raises(ConfigError, match=REFUSAL):
            instantiate(inner)
        with pytest.raises(ConfigError, match=REFUSAL):
            instantiate({"_target_": "torch.optim.AdamW", "_partial_": True, "lr": [{"deep": inner}]})
    assert [file.name for file in tmp_path.iterdir()] == ["canary"]


def test_aliases_planted_in_our_own_package_are_refused(tmp_path, monkeypatch):
    """The object decides, not the name; a copied `__module__` does not help."""
    runs = importlib.import_module("vision_lowrank.runs")
    canary = tmp_path / "canary"
    canary.write_text("alive")

    def spoofed(path):
        pathlib.Path(path).unlink()

    spoofed.__module__, spoofed.__qualname__ = "vision_lowrank.runs", "write_json"
    aliases = {"alias": pathlib.Path.unlink, "spoofed": spoofed, "bound": canary.unlink, "half": functools.partial(id)}
    for name, value in aliases.items():
        monkeypatch.setattr(runs, name, value, raising=False)
        with pytest.raises(ConfigError, match="refused"):
            instantiate({"_target_": f"vision_lowrank.runs.{name}", "path": str(canary)})
    assert canary.exists()


def test_nothing_is_built_before_everything_is_checked(tmp_path):
    good = {"_target_": "vision_lowrank.runs.create_run_folder", "root": str(tmp_path), "experiment": "a", "seed": 1}
    assert resolve(good["_target_"]) is create_run_folder
    with pytest.raises(ConfigError, match="refused"):
        instantiate({"first": good, "second": {"_target_": "os.getcwd"}})
    assert not any(tmp_path.iterdir())
    assert instantiate(good).parent == tmp_path / "a"


def test_names_outside_are_not_even_imported(tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\ndef run(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="refused"):
        instantiate({"_target_": "evil_module.run"})
    assert "evil_module" not in sys.modules
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_target_": "torch.optim.AdamW", "_partial_": True, "weight_decy": 1}, "'weight_decy'.*'weight_decay'"),
        ({"_target_": "lightning.pytorch.Trainer", "max_epoch": 1}, "'max_epoch'.*did you mean 'max_epochs'"),
        ({"a": [{"_target_": "torch.optim.SGD", "lr": 1}]}, r"lacks the argument 'params' \(at a\[0\]\)"),
        ({"_target_": "torch.optim.AdmW"}, "has no 'AdmW': did you mean 'AdamW'"),
        ({"_target_": "vision_lowrank.modles.net"}, "no module 'vision_lowrank.modles'"),
        ({"_target_": "torch.optim.SGD", "_args_": [1]}, "'_args_' is not supported"),
    ],
)
def test_misspellings_name_the_nearest_valid_word(config, message):
    with pytest.raises(ConfigError, match=message) as caught:
        instantiate(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"lr": "???"}, "'lr'.*[Mm]issing"), ({"a": {"lr": "${optimizer.lr}"}}, "'a.lr'.*optimizer.lr")],
)
def test_unresolved_values_are_named(config, message):
    with pytest.raises(ConfigError, match=message) as caught:
        instantiate(OmegaConf.create(config))
    assert "\n" not in str(caught.value)


def test_unknown_argument_behind_kwargs(monkeypatch):
    module = types.ModuleType("vision_lowrank.fake")

    def inner(width=3):
        raise AssertionError("never reached")

    def factory(**kwargs):
        return inner(**kwargs)

    factory.__module__, factory.__qualname__ = module.__name__, "factory"
    module.factory = factory
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(ConfigError, match=r"vision_lowrank.fake.factory has no argument 'widht'"):
        instantiate({"_target_": "vision_lowrank.fake.factory", "widht": 3})


SPLIT = {"kind": "random", "train": 0.1, "validation": 0.1}


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("patch_size", "nine", "a whole number"),
        ("patch_size", 9.0, "a whole number"),
        ("patch_size", True, "a whole number"),
        ("patch_size", None, "a whole number"),
        ("components", [1, 2], "a whole number or null"),
        ("whiten", 1, "true or false"),
        ("split", "random", "a mapping"),
        ("root", 3, "a text"),
    ],
)
def test_arguments_of_another_kind_are_named(key, value, kind):
    config = {
        "_target_": "vision_lowrank.data.modules.SceneDataModule",
        **{"card": "indian_pines", "root": "data", "patch_size": 9, "components": None, "whiten": False},
        **{"split": SPLIT, "batch_size": 2, "evaluation_batch_size": 2, "seed": 0},
    }
    instantiate(config)
    with pytest.raises(ConfigError, match=re.escape(f"{key}={value!r} is not {kind}; it is an argument of")):
        instantiate(config | {key: value})


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (float, [1, 0.5, math.inf], ["1", True, None, math.nan, [1.0]]),
        (float | None, [None, 2], ["none", math.nan]),
        (tuple[float, float], [[0.1, 1], (1, 2)], [[0.1], [0.1, 0.2, 0.3], 0.5, "ab", [0.1, "x"], [0.1, math.nan]]),
        (tuple[int, ...], [[], [1, 2, 3], {"_target_": "x"}], [[1.5], 3, {"a": 1}]),
        (Sequence[str] | str, ["a", ["a", "b"]], [[1], 1]),
        (Mapping[str, int], [{"a": 1}], [{"a": "b"}, [1]]),
        (Literal["mean", "max"], ["mean"], ["median", None]),
        (pathlib.Path | None, ["here", pathlib.Path("there"), None], [3]),
        (torch.nn.Module, [{"_target_": "x"}, torch.nn.Identity()], ["linear", 3, [3]]),
        (Any, [None, 3, "a", [1], math.nan], []),
    ],
)
def test_what_fits_an_annotation(hint, good, bad):
    assert [value for value in good if not fits(hint, value)] == []
    assert [value for value in bad if fits(hint, value)] == []


@pytest.mark.parametrize("wrong", [{"num_nodes": "many"}, {"devices": 0}, {"strategy": None}])
def test_what_a_library_refuses_is_an_error_of_the_configuration(wrong):
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    with pytest.raises(ConfigError, match=r"lightning\.pytorch\.Trainer: .*(num_nodes|devices|strategy)"):
        instantiate({"_target_": "lightning.pytorch.Trainer", **quiet, **wrong})


def test_arguments_that_a_function_hands_on_are_checked_with_those_of_its_class():
    small = {"_target_": "vision_lowrank.models.lola_specvit.lola_specvit_tiny", "num_classes": 3}
    with pytest.raises(ConfigError, match="dim='wide' is not a whole number"):
        instantiate(small | {"dim": "wide"})
