"""Who may import whom, and what stays unloaded."""

import subprocess
import sys
import tomllib


def test_layers_keep_their_directions(repository):
    settings = tomllib.loads((repository / "pyproject.toml").read_text())
    count = len(settings["tool"]["importlinter"]["contracts"])
    script = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", script, "--no-cache"]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"Contracts: {count} kept, 0 broken." in result.stdout


IMPORT_ALL = """
import importlib, pkgutil, sys
import vision_lowrank
assert not {"torch", "diffusers"} & set(sys.modules)
for module in pkgutil.walk_packages(vision_lowrank.__path__, "vision_lowrank."):
    if not module.name.startswith("vision_lowrank.compose"):
        importlib.import_module(module.name)
        print(module.name)
assert "diffusers" not in sys.modules
"""


def test_nothing_but_the_composer_imports_diffusers():
    result = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert {"vision_lowrank.data.modules", "vision_lowrank.models.official"} <= set(result.stdout.split())
