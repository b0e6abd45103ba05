"""The bounds that pyproject.toml states and the versions that constraints.txt pins belong together."""

import ast
import importlib.metadata
import re
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


@pytest.fixture(scope="module")
def project(repository):
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def requirements(project):
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    # an extra may name another one of the project itself
    return [item for item in map(Requirement, lines) if item.name != project["name"]]


@pytest.fixture(scope="module")
def pinned(repository):
    lines = [line.partition("#")[0].strip() for line in (repository / "constraints.txt").read_text().splitlines()]
    return dict(line.split("==") for line in lines if line)


def test_each_dependency_is_pinned_to_a_version_that_its_bound_allows(requirements, pinned):
    versions = {canonicalize_name(name): version for name, version in pinned.items()}
    assert len(versions) == len(pinned)
    assert [item.name for item in requirements if canonicalize_name(item.name) not in versions] == []
    refused = [str(item) for item in requirements if versions[canonicalize_name(item.name)] not in item.specifier]
    assert refused == []


def test_what_the_package_imports_is_declared(repository, requirements):
    """What another dependency brings along has no bound of ours, and may go."""
    files = [repository / "train.py", *(repository / "vision_lowrank").rglob("*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    modules = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"vision_lowrank"}
    declared = {canonicalize_name(item.name) for item in requirements}
    found = importlib.metadata.packages_distributions()
    lacking = {name for name in modules if not declared & {canonicalize_name(part) for part in found.get(name, [name])}}
    assert lacking == set()
    assert {"torch", "yaml", "PIL"} <= modules


def test_a_bound_that_refuses_its_pin_would_be_found():
    assert "1.9.1" not in Requirement("scikit-learn>=1.10").specifier
    assert "1.10.1" in Requirement("scikit-learn>=1.9").specifier


def test_bounds_are_lower_ones(requirements):
    """An upper one keeps a user from mending what a new version breaks."""
    operators = {(item.name, part.operator) for item in requirements for part in item.specifier}
    assert {name for name, operator in operators if operator != ">="} == set()


def test_pins_satisfy_each_other(pinned):
    """What is pinned is what the pinned packages themselves ask for, as far as they are installed."""
    pins = {canonicalize_name(name): version for name, version in pinned.items()}
    problems = []
    for name, version in pinned.items():
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if found.version.partition("+")[0] != version:
            continue
        for line in found.requires or []:
            needed = Requirement(line)
            if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
                continue
            pin = pins.get(canonicalize_name(needed.name))
            if pin is not None and not needed.specifier.contains(pin, prereleases=True):
                problems.append(f"{name} {version} needs {needed}, pinned is {pin}")
    assert problems == []


def test_environment_yml_and_requires_python_agree_with_the_oldest_python(repository, project):
    conda = re.search(r"python=([\d.]+)", (repository / "environment.yml").read_text()).group(1)
    assert Version(conda) in Requirement(f"python{project['requires-python']}").specifier
