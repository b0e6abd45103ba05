"""What pyproject.toml cannot say: once installed, configurations and dataset cards lie inside the package."""

from setuptools import find_namespace_packages, setup

found = find_namespace_packages(include=["vision_lowrank*", "configs*", "datasets*"])
setup(
    packages=[name if name.startswith("vision_lowrank") else f"vision_lowrank.{name}" for name in found],
    package_dir={f"vision_lowrank.{name}": name for name in ("configs", "datasets")},
)
