"""One call, waited for: what comes back, and through whom it goes."""

from __future__ import annotations

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline import http
from tests.support.receivers import free_port

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@contextlib.contextmanager
def receiver(delay_s=0.0):
    """Answers 418 and says what it was asked; yields its address and the requests."""
    seen, release = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append((self.path, self.rfile.read(int(self.headers.get("Content-Length", 0)))))
            release.wait(delay_s)
            self.send_response(418)
            self.end_headers()
            self.wfile.write(b'{"short": "and stout"}')

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        release.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def clean_environment(monkeypatch):
    for name in (*PROXIES, "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_an_answer_has_its_status_and_text():
    with receiver() as (url, seen):
        answer = http.request("POST", f"{url}/teapot", timeout_s=5, body={"a": [1]})
        assert (answer.status, answer.json()) == (418, {"short": "and stout"})
        http.request("POST", f"{url}/teapot", timeout_s=5, body=b"[2]")
        assert seen == [("/teapot", b'{"a": [1]}'), ("/teapot", b"[2]")]


def test_a_receiver_that_is_slow_or_away_is_an_error():
    with receiver(delay_s=20) as (url, _), pytest.raises(TimeoutError):
        http.request("POST", url, timeout_s=0.2)
    with pytest.raises(http.HttpError):
        http.request("POST", f"http://127.0.0.1:{free_port()}", timeout_s=5)


@pytest.mark.parametrize("name", PROXIES)
def test_a_dead_proxy_of_the_environment_is_not_asked(clean_environment, name):
    clean_environment.setenv(name, f"http://127.0.0.1:{free_port()}")
    with receiver() as (url, _):
        assert http.request("POST", url, timeout_s=5).status == 418


def test_a_proxy_is_asked_where_the_call_says_so(clean_environment):
    with receiver() as (proxy, seen):
        clean_environment.setenv("http_proxy", proxy)
        assert http.request("POST", "http://hooks.example/alert", timeout_s=5, proxies=True).status == 418
        assert [path for path, _ in seen] == ["http://hooks.example/alert"]
