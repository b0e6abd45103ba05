"""What several test modules share."""

from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root folder of this checkout."""
    return REPOSITORY


@pytest.fixture
def shared_path() -> Callable[..., Path]:
    """Function that returns a file or folder of the neighbour folder `../shared`, or skips the test without it."""

    def find(*parts: str) -> Path:
        path = SHARED.joinpath(*parts)
        if not path.exists():
            pytest.skip(f"../shared/{'/'.join(parts)} is not beside this checkout")
        return path

    return find
