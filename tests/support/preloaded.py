"""Processes that have made their imports, once for all workers of a session: servers, ranks and drivers are forked.

A server's imports take ten seconds of a processor, a trainer rank's and a driver's five, and tests start some twenty of
each.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from pipeline.config.server import ServerConfig
from pipeline.engine.processes import TOKEN_VARIABLE
from pipeline.engine.server import SGLangServer
from pipeline.forks import FORKS_VARIABLE, ROOM

WORKER_FORKS_VARIABLE = "SAMEROUTE_WORKER_FORKS"
DRIVER_FORKS_VARIABLE = "SAMEROUTE_DRIVER_FORKS"
VARIABLES = (
    FORKS_VARIABLE,
    WORKER_FORKS_VARIABLE,
    DRIVER_FORKS_VARIABLE,
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_prestart_worker_first_driver",
    "RAY_enable_worker_prestart",
)
"""Where servers, ranks and drivers come from; and Ray starts no workers ahead, which would not be forked."""

_WORKER = Path(__file__).with_name("forked_worker.py")
_TITLE = " " * 4000  # processes change their titles in place, and children have longer ones


def set_up_by_a_fork() -> None:
    """From now on Ray's workers of a cluster that this process starts are forked at once, without Ray's own script."""
    from ray._private import ray_constants

    ray_constants.SETUP_WORKER_FILENAME = str(_WORKER)


def server_environment() -> dict[str, str]:
    """What a server on the CPU has in its environment, but for what is its own."""
    server = SGLangServer(ServerConfig(), Path(), Path(), device="cpu", seed=0, return_routed_experts=True)
    return {k: v for k, v in server._environment().items() if k not in (TOKEN_VARIABLE, "TMPDIR")}


def start(folder: Path, keeper: int) -> dict[str, str]:
    """All of them, started where no other worker has; they end with the process `keeper`.

    Returns the environment under which servers, Ray's workers and drivers are forked from them.
    """
    servers, workers, drivers = (folder / name for name in ("servers", "workers", "drivers"))
    job = {"runtime_env": {"py_executable": f"{sys.executable} {_WORKER}"}}
    values = str(servers), str(workers), str(drivers), json.dumps(job), "0", "0"
    variables = dict(zip(VARIABLES, values, strict=True))
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "servers.log").exists():
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
            _start("pipeline.engine.inside.preloaded", servers, keeper, server_environment())
            _start("tests.support.preloaded_worker", workers, keeper, one_thread)
            _start("tests.support.preloaded_driver", drivers, keeper, one_thread | variables)
    return variables


def _start(module: str, path: Path, keeper: int, environment: dict[str, str]) -> None:
    with path.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(path), str(keeper), _TITLE],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment | ROOM,
        )
    deadline = time.monotonic() + 60
    while not path.exists():  # its imports come after it listens
        assert process.poll() is None, path.with_suffix(".log").read_text()
        assert time.monotonic() < deadline, f"{module} does not listen"
        time.sleep(0.02)
