"""What stands for servers and a trainer where a fleet is tested without either."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from pipeline.config.server import ServerConfig
from pipeline.engine.client import AbortedError
from pipeline.engine.control import UnreachableError
from pipeline.engine.fleet import Fleet, FleetServer
from pipeline.engine.keys import ServerKeys
from pipeline.engine.sampling import Sampling
from pipeline.engine.server import NodeGoneError, ServerError
from pipeline.types import Sampled

SAMPLING = Sampling(max_new_tokens=9, temperature=1.0)
"""Where it does not matter."""


class Server:
    """Stands for a server's process and its client; answers wait until `release`. steered: the calls that steer it."""

    def __init__(self, name):
        self.name, self.open, self.asked, self.steered, self.version, self.deaf = name, 0, [], [], 0, False
        self.url, self.log_path, self.living, self.starts = f"http://{name}", Path(f"{name}.log"), True, 1
        self.keys = ServerKeys(f"{name}-api", f"{name}-admin")
        self.waiting, self.failures, self.nodeless = 0, 0, False
        self.release, self.aborts, self.loading = asyncio.Event(), 0, threading.Event()
        self.decoder = SimpleNamespace(wide_routes=0)
        self.loading.set()

    def wait_ready(self):
        assert self.loading.wait(10)
        assert self.living

    def alive(self):
        return self.living

    def restart(self):
        self.starts += 1
        self.living, self.deaf = True, False
        if self.nodeless:
            self.living = False
            raise NodeGoneError("the node of the server is gone")
        if self.failures:
            self.failures -= 1
            raise ServerError("the SGLang server ended with code -9 while starting\nTraceback ...")

    def stop(self):
        self.living = False

    def stacks(self):
        return []

    def log_tail(self):
        return f"{self.log_path}:\nthe last words"

    async def __aenter__(self):
        self.open += 1
        return self

    async def __aexit__(self, *_):
        self.open -= 1

    async def sample(self, ids, sampling, *, routes_from=0, on_tokens=None):
        assert self.open > 0
        began = self.version
        self.asked.append((ids[0], began))
        await self.release.wait()
        if ids == [13]:
            raise ServerError("unlucky")
        if ids == [14] and self.starts == 1:
            self.living = False
            raise UnreachableError("cut off")
        if ids == [15]:
            raise UnreachableError("reset by peer")
        versions = np.array([began, self.version], np.int32)
        empty = np.zeros(2, np.float32)
        return Sampled(np.array([ids[0], len(self.name)], np.int32), empty, None, versions, "stop")

    async def score(self, ids):
        if self.aborts:
            self.aborts -= 1
            raise AbortedError("aborted")
        return self.name, ids

    async def ask(self, method, path, body=None):
        self.steered.append(path)
        if path == "/abort_request":
            self.release.set()
        return {}

    async def current_loads(self, timeout_s=None):
        return [load(waiting=self.waiting)]


class Member(FleetServer):
    """Asks no process."""

    def answers(self, timeout_s):
        return self.process.living and not self.process.deaf


class Trainers:
    """Stands for the trainer ranks; keeps what was sent. bad: versions that a server does not take, once each."""

    def __init__(self, *bad):
        self.sent, self.bad, self.current = [], list(bad), True

    def send_weights(self, version, servers, *, flush):
        self.sent.append((version, [server.url for server in servers], flush))
        if version in self.bad:
            self.bad.remove(version)
            raise ServerError("unlucky")

    def send_again(self, version, servers):
        if self.current:
            self.send_weights(version, servers, flush=True)
        return self.current


def load(running=0, waiting=0, used=0):
    return {
        "num_running_reqs": running,
        "num_waiting_reqs": waiting,
        "num_used_tokens": used,
        "max_total_num_tokens": 1000,
        "max_running_requests": 8,
    }


def fleet_of(*servers, **settings):
    fleet = Fleet([Member(server, server) for server in servers], ServerConfig(probe_timeout_s=0.05, **settings))
    fleet.members.say = lambda _: None
    fleet.wait_ready()
    return fleet


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)
