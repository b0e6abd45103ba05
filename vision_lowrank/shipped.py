"""Where the files lie that come with the project: in a checkout beside the package, once it is installed inside it."""

from pathlib import Path

from omegaconf import OmegaConf

PACKAGE = Path(__file__).resolve().parent
CONFIGS, CARDS_FOLDER = (
    PACKAGE / name if (PACKAGE / name).is_dir() else PACKAGE.parent / name for name in ("configs", "datasets")
)


def asset(name: str) -> str:
    """Returns the path of a file or folder in `assets`, relative where it can be, for run folders record it."""
    path, here = PACKAGE / "assets" / name, Path.cwd()
    return (path.relative_to(here) if path.is_relative_to(here) else path).as_posix()


# in configurations: ${asset:NAME}
OmegaConf.register_new_resolver("asset", asset, replace=True)
