"""Which processes are told to talk on this machine alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cluster.loopback import is_loopback, loopback_environment
from pipeline.config.server import ServerConfig
from pipeline.engine.server import SGLangServer

NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def environment(host):
    server = SGLangServer(ServerConfig(host=host), Path(), Path(), device="cpu", seed=0, return_routed_experts=True)
    return {name: value for name, value in server._environment().items() if name in NAMES}


@pytest.mark.parametrize(("host", "alone"), [
    ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
    ("0.0.0.0", False), ("10.0.0.7", False), ("node-7", False),
])  # fmt: skip
def test_a_server_at_a_loopback_address_keeps_its_groups_there(host, alone):
    assert is_loopback(host) == alone
    assert environment(host) == (dict.fromkeys(NAMES, "lo") if alone else {})


def test_an_interface_that_the_user_names_stays(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    expected = {"GLOO_SOCKET_IFNAME": "eth9", "NCCL_SOCKET_IFNAME": "lo"}
    assert loopback_environment() == expected
    assert environment("127.0.0.1") == expected
