"""What several test modules share."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from local_hub import Hub, HubHandler, HubServer

from vision_lowrank.plots import figures

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root folder of this checkout."""
    return REPOSITORY


@pytest.fixture(scope="session", autouse=True)
def _coarse_pictures() -> Iterator[float]:
    """Draws pictures at a quarter of their resolution, and gives the full one: at that they outlast the trainings."""
    with pytest.MonkeyPatch.context() as patch:
        full = figures.DPI
        patch.setattr(figures, "DPI", full / 4)
        yield full


@pytest.fixture
def full_resolution(_coarse_pictures: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws pictures at the resolution that users have."""
    monkeypatch.setattr(figures, "DPI", _coarse_pictures)


@pytest.fixture
def shared_path() -> Callable[..., Path]:
    """Function that returns a file or folder of the neighbour folder `../shared`, or skips the test without it."""

    def find(*parts: str) -> Path:
        path = SHARED.joinpath(*parts)
        if not path.exists():
            pytest.skip(f"../shared/{'/'.join(parts)} is not beside this checkout")
        return path

    return find


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """What the hub serves that downloads of the test go to."""
    server = HubServer(("127.0.0.1", 0), HubHandler)
    server.hub = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "*")
    yield server.hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> str:
    """Points downloads to a port where nobody listens; returns its address."""
    server = HubServer(("127.0.0.1", 0), HubHandler)
    server.server_close()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "*")
    return f"http://127.0.0.1:{server.server_port}"
