"""Every command in the documents can be given: configurations compose, options parse, targets exist. None runs."""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from vision_lowrank.training import KEYS

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path
    for path in (*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), REPOSITORY / "datasets" / "README.md")
    if path.is_file()
)
CONFIGS = REPOSITORY / "configs"


def commands(path):
    """Yields the commands of a document: lines of blocks and texts between backticks that begin with a program."""
    text = re.sub(r" *\\\n\s*", " ", path.read_text(encoding="utf-8"))
    # a command in a sentence may be broken into two lines
    inline = [" ".join(part.split()) for part in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))]
    for line in (*text.splitlines(), *inline):
        command = re.sub(r"\s{2,}\S.*$|\s+#.*$", "", line.strip())
        command = re.sub(r"^(\w+=\S+ )+", "", command)
        if re.match(r"(\.venv/bin/)?python (-m )?[\w.]+(/[\w.]+)*( |$)|make [a-z]", command):
            yield command


FOUND = sorted({(path, command) for path in DOCUMENTS for command in commands(path)})


def names(kind):
    return [pytest.param(*case, id=f"{case[0].name}: {case[1]}") for case in FOUND if case[1].startswith(kind)]


def split(command):
    """Returns what runs, a file or a module, and its arguments."""
    words = shlex.split(command)[1:]
    return (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])


def test_commands_are_found():
    """The numbers only tell that the search has not gone blind."""
    programs = {split(command)[0] for _, command in FOUND if "python " in command}
    assert programs >= {"train.py", "vision_lowrank.compose", "vision_lowrank.evaluate", "vision_lowrank.data"}
    assert len(FOUND) > 40


def test_a_wrong_command_would_be_found(tmp_path):
    path = tmp_path / "guide.md"
    path.write_text(
        "Try `python train.py\nexperiment=nowhere`:\n\n    make demo   # here\n\n"
        "```\nA=1 python -m a.b x \\\n  y=2\n```\n"
    )
    assert set(commands(path)) == {"python train.py experiment=nowhere", "make demo", "python -m a.b x y=2"}
    with pytest.raises(HydraException):
        check_overrides("train", ["experiment=nowhere"])
    with pytest.raises(HydraException):
        check_overrides("train", ["experiment=indian_pines", "data.patch_sise=9"])
    with pytest.raises(AssertionError):
        check_overrides("train", ["experiment=indian_pines", "+sead=1"])


def check_overrides(name, overrides, folder=CONFIGS):
    """Composes a configuration; an override of a key that does not exist, or of an unknown choice, is an error."""
    if "-m" in overrides:
        # the first of the values that are swept over
        overrides = [item if "[" in item else item.partition(",")[0] for item in overrides if item != "-m"]
    with initialize_config_dir(str(folder), version_base="1.3"):
        config = compose(name, overrides)
    if name == "train":
        assert set(config) <= set(KEYS)


@pytest.mark.parametrize(("path", "command"), names(("python", ".venv")))
def test_a_documented_command_can_be_given(path, command, monkeypatch):
    program, arguments = split(command)
    if program in ("venv", "pip"):
        return
    if program == "pytest":
        assert [item for item in arguments if "/" in item and not (REPOSITORY / item).exists()] == []
        return
    module = importlib.import_module(program.removesuffix(".py"))
    if configuration := re.search(r'config_path=(.+?), config_name="(\w+)"', Path(module.__file__).read_text()):
        place, name = configuration.groups()
        folder = Path(module.__file__).parent / eval(place, vars(module))
        if "..." in arguments:
            # stands for the overrides of another line, without which there is nothing to compose
            assert [item for item in arguments if not item.startswith(("...", "resume=", "ckpt_path="))] == []
            return
        check_overrides(name, arguments, folder.resolve())
        return
    check_options(module, arguments, monkeypatch)


class Parsed(Exception):
    pass


def check_options(module, arguments, monkeypatch):
    """Lets a program read its arguments, and stops it there."""
    if Path(module.__file__).name == "__init__.py":
        module = importlib.import_module(f"{module.__name__}.__main__")
    if not hasattr(module, "argparse"):
        assert not arguments, f"{module.__name__} takes no arguments"
        return
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, given=None, namespace=None):
        parse(parser, given, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    with pytest.raises(Parsed):
        module.main()


def test_a_wrong_option_would_be_found(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        check_options(importlib.import_module("vision_lowrank.data"), ["fetsh", "salinas"], monkeypatch)
    assert "fetsh" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["less_vit", "lola_specvit"])
def test_documented_models_are_built(name):
    (code,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / f"{name}.md").read_text(), flags=re.S)
    known = {}
    exec(code, known)
    assert known["model"].num_classes == (10 if name == "less_vit" else 16)
    assert "logits" not in known or known["logits"].shape == (2, 10)


@pytest.mark.parametrize(("path", "command"), names("make"))
def test_a_documented_target_exists(path, command):
    target = command.split()[1]
    assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), flags=re.M), f"{path.name}: {command}"
