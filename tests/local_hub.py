"""A hub repository on this machine, which can misbehave."""

import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


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
        self.more_headers = {}
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
        for header in hub.more_headers.items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body[start:][:cut])

    def log_message(self, *arguments):
        pass


class HubServer(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """A client that hangs up early is none of the tests' errors."""
