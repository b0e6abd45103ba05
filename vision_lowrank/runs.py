"""Run folders, the record of where a result came from, and files that are either whole or absent."""

import csv
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError

from vision_lowrank.argument_types import fits
from vision_lowrank.errors import ConfigError
from vision_lowrank.records import describe

# there is no asking for it without setting it
_UMASK = os.umask(0o077)
os.umask(_UMASK)
# rank 0 of a distributed run tells the processes that it starts where to write
RUN_VARIABLE = "VISION_LOWRANK_RUN"
# names of `_temporary`
_LEFTOVER = re.compile(r"\.(?P<stem>.+)\.[0-9a-f]{8}\.part(?P<suffix>\.\w+)?")
# sections that make a run what it is, but for where things lie and who reads them
_OF_A_RUN = {"data", "model", "task", "adapter", "pretraining", "regime", "seed"}
_PLACES = {"data.root", "data.num_workers"}
# what a resumed run may have another of
_MAY_CHANGE = {"resume", "device", "devices", "runs_root"}
# numpy's older generators take no larger ones
LARGEST_SEED = 2**32 - 1


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Gives a temporary name beside `path` that becomes `path` when the block ends without an error.

    An interrupted or failed block leaves an older file at `path` as it was. The temporary name keeps the suffix, since
    many writers choose the format by it. Missing parent folders are made.

    Args:
        path: the file to write.

    Raises:
        OSError: the disk is full, the folder is read-only, or the like; `filename` is `path`.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        # some writers make files that only their owner may read
        temporary.chmod(0o666 & ~_UMASK)
        # without it a crash of the machine can leave the new name on an empty file
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary), temporary):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    except SafetensorError as error:
        if (told := _of_system(error, path)) is not None:
            raise told from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Gives a temporary folder beside `path` whose files move to `path` when the block ends without an error.

    Each file there is the old one or the new one, never a part; files that the block did not write stay.

    Args:
        path: the folder to write files into.

    Raises:
        OSError: as for `atomic_path`.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in sorted(part for part in temporary.rglob("*") if part.is_file()):
            with atomic_path(path / file.relative_to(temporary)) as whole:
                os.replace(file, whole)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except SafetensorError as error:
        if (told := _of_system(error, path)) is not None:
            raise told from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _of_system(error: SafetensorError, path: Path) -> OSError | None:
    """Returns the error of the system that safetensors tells of in words, such as that of a full disk, if it does."""
    told = re.search(r"\(os error (\d+)\)", str(error))
    return None if told is None else OSError(int(told[1]), os.strerror(int(told[1])), str(path))


def check_writable(path: Path) -> None:
    """Makes the folder of a file that is to be written later, and tries it.

    Raises:
        OSError: nothing can be written there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files and folders that killed writers left anywhere in a folder."""
    for path in sorted(folder.rglob(".*")):
        if not _LEFTOVER.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_leftovers_of(path: Path) -> None:
    """Removes the temporary files that killed writers of one file left beside it."""
    for found in path.parent.glob(".*.part*"):
        match = _LEFTOVER.fullmatch(found.name)
        if match and (match["stem"], match["suffix"] or "") == (path.stem, path.suffix):
            found.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.part{path.suffix}")


def write_json(path: str | Path, content: Any) -> None:
    """Writes `content` atomically as indented JSON; arrays, tensors, dataclasses and paths are converted.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not know: write None for "no value".
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows atomically; the columns are the keys of all rows in order of first appearance, gaps stay empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)


def create_run_folder(root: str | Path, experiment: str, seed: int, stamp: str | None = None) -> Path:
    """Makes `root/experiment/<stamp>-seed<seed>/`; a second run in the same second gets the suffix `-2`.

    Args:
        root: folder of all runs.
        experiment: one folder name.
        seed: the run's seed.
        stamp: tells runs apart; None for the time as YYYYmmdd-HHMMSS.

    Raises:
        ConfigError: `experiment` is not a plain name.
    """
    if not re.fullmatch(r"\w[\w.-]*", experiment):
        raise ConfigError(f"experiment name {experiment!r}: use letters, digits, '_', '-' and '.' only")
    parent = Path(root) / experiment
    parent.mkdir(parents=True, exist_ok=True)
    name = f"{stamp or datetime.now().strftime('%Y%m%d-%H%M%S')}-seed{seed}"
    attempt = 1
    while True:
        folder = parent / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:
            attempt += 1
        else:
            return folder


def start_run(config: DictConfig, precision: str, data_hashes: Mapping[str, str]) -> Path:
    """Makes the folder of a new run, with its configuration and provenance; the processes it starts get the same one.

    Processes that `srun` starts know it by the number of their job and step.

    Args:
        config: has `runs_root`, `name` and `seed`.
        precision: see `provenance`.
        data_hashes: see `provenance`.

    Raises:
        ConfigError: this is one of several processes that something else has started.
    """
    step = _slurm_step()
    if process_rank() > 0:
        if RUN_VARIABLE in os.environ:
            return Path(os.environ[RUN_VARIABLE])
        if step is not None:
            return Path(config.runs_root) / config.name / f"{step}-seed{config.seed}"
        raise ConfigError(
            f"process {process_rank()} of several was not told the folder of the run; start one train.py, which starts "
            "the others, or all of them by srun"
        )
    folder = create_run_folder(config.runs_root, config.name, config.seed, step)
    os.environ[RUN_VARIABLE] = str(folder)
    write_json(folder / "provenance.json", provenance(precision, data_hashes))
    # last: by it a run that can be resumed is known
    with atomic_path(folder / "config.yaml") as temporary:
        OmegaConf.save(config, temporary, resolve=True)
    return folder


def check_command(config: DictConfig, **own: Any) -> None:
    """Refuses options of a command that are missing, or of a kind that it could not work with.

    Args:
        config: the command's.
        own: annotations of options by name, beside those that commands share: `name`, `runs_root`, `device` and
            `resume`, texts, and `seed` and `devices`, whole numbers.

    Raises:
        ConfigError: an option is not given or not as annotated, or a number is too small.
    """
    # omegaconf's own list of them stumbles over what refers to one of them
    plain: Any = OmegaConf.to_container(config)
    if missing := sorted(name for name, value in _flat(plain).items() if value == "???"):
        raise ConfigError(f"{', '.join(missing)} not given; the command needs {'them' if missing[1:] else 'it'}")
    for name, hint in {"name": str, "runs_root": str, "device": str, "resume": str | None, **own}.items():
        if name in config and not fits(hint, config[name]):
            number = type(config[name]) in (int, float)
            remedy = f"; for a name of digits write \"{name}='{config[name]}'\"" if number else ""
            raise ConfigError(f"{name}={config[name]} is not {describe(hint)}{remedy}")
    for name, least in {"seed": 0, "devices": 1}.items():
        if name in config and (type(config[name]) is not int or config[name] < least):
            raise ConfigError(f"{name}={config[name]}: give a whole number from {least} up")
    if config.get("seed", 0) > LARGEST_SEED:
        raise ConfigError(f"seed={config.seed}: give a number up to {LARGEST_SEED}")
    # each process that a run starts would go through the whole sweep, and write into a folder of another run
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN and _several_processes(config):
        raise ConfigError("-m, several runs in one command, goes with one device; run them one by one")


def _several_processes(config: DictConfig) -> bool:
    keys = ("devices", "trainer.devices", "trainer.num_nodes")
    return any(_count_devices(OmegaConf.select(config, key, default=1)) > 1 for key in keys)


def _count_devices(devices: Any) -> int:
    """Returns how many devices Lightning takes this to mean: a number, their numbers, or all."""
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]
    if isinstance(devices, list | ListConfig):
        return len(devices)
    return torch.accelerator.device_count() if str(devices) in ("auto", "-1") else int(devices)


def open_run(config: DictConfig, precision: str) -> Path:
    """Makes the folder of a new run, or returns that of the interrupted one in `config.resume`.

    Args:
        config: as for `start_run`, with `resume`, and `device` and `devices`, in which the two runs may differ.
        precision: see `provenance`.

    Raises:
        ConfigError: the folder is not of a run, or of one with another configuration, or that is no YAML.
    """
    if config.resume is None:
        return start_run(config, precision, {})
    path = Path(config.resume) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"resume={config.resume}: no config.yaml there; give the folder of an interrupted run")
    before, now = _settings_of(path), _settings(config)
    if changed := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
        raise ConfigError(f"resume={config.resume}: that run differs in {', '.join(changed)}; give the same options")
    if process_rank() == 0:
        remove_leftovers(path.parent)
    return path.parent


def resumed_run(config: DictConfig) -> Path:
    """Returns the folder of the run that `config.ckpt_path` is of.

    Raises:
        ConfigError: it lies in no run, or in one with other data, model or training, or whose file is no YAML.
    """
    folder = Path(config.ckpt_path).resolve().parents[1]
    for name in ("config.yaml", "provenance.json"):
        if not (folder / name).is_file():
            raise ConfigError(f"ckpt_path={config.ckpt_path}: no {name} in {folder}; give a checkpoint inside its run")
    before, now = _flat(_settings_of(folder / "config.yaml")), _flat(_settings(config))
    keys = {key for key in before.keys() | now.keys() if key.partition(".")[0] in _OF_A_RUN} - _PLACES
    changed = sorted(key for key in keys if before.get(key) != now.get(key))
    # it may lie elsewhere by now, but what it saw counts
    if (before.get("base") is None) != (now.get("base") is None):
        changed.insert(0, "base")
    if changed:
        raise ConfigError(
            f"ckpt_path={config.ckpt_path}: that run differs in {', '.join(changed)}; give the same options"
        )
    return folder


def note_resumption(config: DictConfig, folder: Path) -> None:
    """Gives a run whose training was resumed the configuration that it ended with; does nothing for others.

    What of the old one is gone (epochs, say, which may differ) `provenance.json` keeps under `resumed`, by name what
    was and what is. Meant for when the training is done: one that fails leaves the files as they were.

    Args:
        config: of the resumption.
        folder: of the run.
    """
    if config.ckpt_path is None:
        return
    before, now = _flat(_settings_of(folder / "config.yaml")), _flat(_settings(config))
    options = {key: [before.get(key), now.get(key)] for key in sorted((before.keys() | now.keys()) - {"ckpt_path"})}
    here = provenance("", {})
    resumption = {name: here[name] for name in ("time", "command", "code", "threads")}
    resumption["changed"] = {key: pair for key, pair in options.items() if pair[0] != pair[1]}
    content = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    write_json(folder / "provenance.json", content | {"resumed": [*content.get("resumed", []), resumption]})
    with atomic_path(folder / "config.yaml") as temporary:
        OmegaConf.save(OmegaConf.merge(config, {"ckpt_path": None}), temporary, resolve=True)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested entries under names with dots."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def _settings_of(path: Path) -> dict[str, Any]:
    """Returns the settings in a run's `config.yaml`."""
    try:
        return _settings(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{path}: no valid YAML ({' '.join(str(error).split())}); resume another run") from error


def _settings(config: Any) -> dict[str, Any]:
    """Returns the entries of a configuration that make a run what it is."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return {str(key): value for key, value in plain.items() if key not in _MAY_CHANGE}


def process_rank() -> int:
    """Returns the number of this process in a distributed run, 0 outside of one; known before anything is set up."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", "0"))))


def _slurm_step() -> str | None:
    """Returns what names a SLURM step of several processes, None outside of one."""
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")
    if job is None or step is None or int(os.environ.get("SLURM_NTASKS", "1")) < 2:
        return None
    return f"slurm{job}.{step}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"


def checked_seeds(seeds: Any) -> list[int]:
    """Returns the seeds of several runs or images.

    Raises:
        ConfigError: they are no list of different whole numbers from 0 up to `LARGEST_SEED`.
    """
    if not isinstance(seeds, list | ListConfig) or not seeds or not all(type(s) is int and s >= 0 for s in seeds):
        raise ConfigError(f"seeds={seeds}: give a list of whole numbers from 0 up")
    if max(seeds) > LARGEST_SEED:
        raise ConfigError(f"seeds={list(seeds)}: give numbers up to {LARGEST_SEED}")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds={list(seeds)}: the same seed gives the same again; give each once")
    return list(seeds)


def provenance(precision: str, data_hashes: Mapping[str, str]) -> dict[str, Any]:
    """Collects what a reader needs to repeat a run; meant for `provenance.json`.

    Args:
        precision: the precision string given to Lightning.
        data_hashes: sha256 per data file.

    Returns:
        Keys `time`, `command`, `code` (git commit and whether files differ from it; None outside a checkout),
        `python`, `packages`, `platform`, `processor`, `gpus`, `threads`, `precision`, `data`.
    """
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "code": _git_state(Path(__file__)),
        "python": platform.python_version(),
        "packages": _package_versions(),
        "platform": platform.platform(),
        "processor": _processor_name(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "precision": precision,
        "data": dict(data_hashes),
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _git_state(file: Path) -> dict[str, Any] | None:
    """Returns commit and dirty flag of the checkout that tracks `file`, None if there is none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        # a package installed below somebody's unrelated checkout must not report that checkout's commit
        git("ls-files", "--error-unmatch", file.name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def _package_versions() -> dict[str, str]:
    """Returns the installed version of this package and of each of its dependencies."""
    try:
        requirements = importlib.metadata.requires("vision-lowrank") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    names = {re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requirements if "extra ==" not in line}
    return {name: importlib.metadata.version(name) for name in sorted({"vision-lowrank", *names})}


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), flags=re.MULTILINE)
        if match:
            return match.group(1)
    return platform.processor() or platform.machine()
