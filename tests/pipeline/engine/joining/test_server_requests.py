"""What a person asks of a run's servers lies in its directory until the run has answered."""

from __future__ import annotations

import os

import pytest

from pipeline.engine.joining.server_requests import (
    ServerRequestError,
    answer,
    answered,
    ask,
    read_keys,
    read_now,
    waiting,
    withdraw,
    write_keys,
    write_now,
)
from pipeline.engine.keys import ServerKeys

KEYS = ServerKeys("one", "two")


def test_requests_are_read_in_order_and_each_has_its_answer(tmp_path):
    write_keys(tmp_path / "keys", KEYS)
    assert waiting(tmp_path) == []
    asked = [
        ask(tmp_path, "add", "http://a:1/", tmp_path / "keys", None),
        ask(tmp_path, "remove", "http://b:2", None, None),
    ]
    assert waiting(tmp_path) == asked
    assert [(request.number, request.url) for request in asked] == [(1, "http://a:1"), (2, "http://b:2")]
    assert answered(tmp_path, asked[0]) is None
    answer(tmp_path, asked[0], "it has joined", refused=False)
    assert waiting(tmp_path) == asked[1:]
    assert answered(tmp_path, asked[0]).words == "it has joined"
    withdraw(tmp_path, asked[1])
    assert waiting(tmp_path) == []
    assert ask(tmp_path, "remove", "http://b:2", None, None).number == 2
    assert not [name for name in os.listdir(tmp_path / "servers") if name.startswith(".")]


@pytest.mark.parametrize("url", ["10.0.0.7:30000", "http://", "http://a:1/generate", "ftp://a:1"])
def test_what_is_no_address_of_a_server_is_refused_at_once(tmp_path, url):
    with pytest.raises(ServerRequestError, match="write http://HOST:PORT"):
        ask(tmp_path, "add", url, None, None)


def test_keys_that_others_can_read_or_that_are_none_are_refused(tmp_path):
    file = tmp_path / "keys"
    write_keys(file, KEYS)
    assert read_keys(file) == KEYS
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o640)
    with pytest.raises(ServerRequestError, match="write chmod 600"):
        read_keys(file)
    (tmp_path / "none").write_text("{}")
    (tmp_path / "none").chmod(0o600)
    for wrong in ("none", "missing"):
        with pytest.raises(ServerRequestError, match="holds no keys of a server"):
            ask(tmp_path, "add", "http://a:1", tmp_path / wrong, None)


def test_the_servers_as_they_were_after_the_last_step(tmp_path):
    assert read_now(tmp_path) == []
    rows = [{"url": "http://a:1", "state": "serving", "weights": 3, "added": False}]
    write_now(tmp_path, rows)
    assert read_now(tmp_path) == rows
