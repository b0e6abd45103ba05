"""A tiny scene on disk, written as a user would (arrays and one card), and a hub that can misbehave."""

import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import yaml

HEIGHT, WIDTH, CHANNELS, CLASSES = 24, 20, 6, 3


class TinyScene:
    """Folder with `image.npy`, `labels.npy` and `tiny.yaml`; change `card`, `image` or `labels`, then `write()`."""

    def __init__(self, folder):
        generator = np.random.default_rng(7)
        self.folder = folder
        self.image = generator.normal(100, 20, (HEIGHT, WIDTH, CHANNELS)).astype(np.float32)
        self.labels = generator.integers(0, CLASSES + 1, (HEIGHT, WIDTH)).astype(np.uint8)
        self.card = {
            "name": "tiny",
            "title": "Tiny scene",
            "sensor": "a random generator",
            "files": {"image": ["image.npy"], "labels": ["labels.npy"]},
            "shape": {"height": HEIGHT, "width": WIDTH, "channels": CHANNELS},
            "bands": {"start": 450, "stop": 950, "count": CHANNELS},
            "gsd": 2,
            "classes": [
                {"name": "grass", "colour": "#00ff00"},
                {"name": "soil", "colour": "#aa5500"},
                {"name": "water", "colour": "#0000ff"},
            ],
            "licence": "CC0",
            "citation": "nobody",
        }

    def write(self):
        np.save(self.folder / "image.npy", self.image)
        np.save(self.folder / "labels.npy", self.labels)
        path = self.folder / "tiny.yaml"
        path.write_text(yaml.safe_dump(self.card))
        return path


@pytest.fixture
def tiny(tmp_path):
    return TinyScene(tmp_path)


class Hub:
    """What a hub repository serves and how; `requests` lists (file, Range header, whole path) as they came.

    Each number in `cuts` ends one request for that file after so many bytes; 0 hangs up without an answer.
    """

    def __init__(self):
        self.files = {}
        self.cuts = {}
        self.kind = "application/octet-stream"
        self.knows_ranges = True
        self.tells_length = True
        self.requests = []

    def ranges(self):
        """The files asked for and from where, without whole paths."""
        return [request[:2] for request in self.requests]


class HubHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        hub = self.server.hub
        name = urllib.parse.unquote(self.path.partition("/resolve/")[2].partition("/")[2])
        wanted = self.headers.get("Range")
        hub.requests.append((name, wanted, self.path))
        cut = hub.cuts[name].pop(0) if hub.cuts.get(name) else None
        if cut == 0:
            return
        if name not in hub.files:
            self.send_error(404)
            return
        body = hub.files[name]
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and hub.knows_ranges else 0
        if start and start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", hub.kind)
        if hub.tells_length:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:][:cut])

    def log_message(self, *arguments):
        pass


class HubServer(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """A client that hangs up early is none of the tests' errors."""


@pytest.fixture
def hub(monkeypatch):
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
def no_network(monkeypatch):
    """Points downloads to a port where nobody listens; returns its address."""
    server = HubServer(("127.0.0.1", 0), HubHandler)
    server.server_close()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "*")
    return f"http://127.0.0.1:{server.server_port}"
