"""What listens on the other side, and a loop of steps without engines."""

from __future__ import annotations

import contextlib
import json
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client.parser import text_string_to_metric_families

from pipeline.config import Config, load_config
from pipeline.engine.server import reserve_port


def config_of(folder, *overrides: str) -> Config:
    """The quickstart's, its run in `folder`/run."""
    return load_config("configs/quickstart.yaml", [f"run.directory={folder / 'run'}", *overrides])


def free_port() -> int:
    """One that nobody is given meanwhile: see `reserve_port`."""
    return reserve_port("127.0.0.1", None)


def scrape(port: int) -> dict[str, list[tuple[dict[str, str], float]]]:
    """name -> [(labels, value)] of every sample that an endpoint serves."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.type in ("gauge", "counter", "info") or family.name == "sameroute_run_info", family
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


class Said(list):
    """Lines for people."""

    def __call__(self, line: str) -> None:
        self.append(line)


class Webhook:
    """url; received: (path, content type, JSON) of every POST. status: what it answers."""

    def __init__(self, port: int, status: int):
        self.received: list[tuple[str, str, dict]] = []
        self.status = status
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.received.append((self.path, self.headers["Content-Type"], json.loads(body)))
                self.send_response(hook.status)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"


@contextlib.contextmanager
def webhook(status: int = 200) -> Iterator[Webhook]:
    """A real HTTP server."""
    hook = Webhook(0, status)
    thread = threading.Thread(target=hook.server.serve_forever)
    thread.start()
    try:
        yield hook
    finally:
        hook.server.shutdown()
        hook.server.server_close()
        thread.join()
