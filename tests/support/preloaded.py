"""Processes that have made their imports, once for all workers of a session: servers, ranks and drivers are forked.

A server's imports take ten seconds of a processor, a trainer rank's and a driver's five, and tests start some twenty of
each. The whole suite's own workers, of nine seconds each, are forked too.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from pipeline.forks import FORKS_VARIABLE, ROOM

WORKER_FORKS_VARIABLE = "SAMEROUTE_WORKER_FORKS"
DRIVER_FORKS_VARIABLE = "SAMEROUTE_DRIVER_FORKS"
PROGRAM_FORKS_VARIABLE = "SAMEROUTE_PROGRAM_FORKS"
VARIABLES = (
    FORKS_VARIABLE,
    WORKER_FORKS_VARIABLE,
    DRIVER_FORKS_VARIABLE,
    PROGRAM_FORKS_VARIABLE,
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_prestart_worker_first_driver",
    "RAY_enable_worker_prestart",
)
"""Where servers, ranks, drivers and programs come from; and Ray starts no workers ahead, which would not be forked."""

PLACES = ("servers", "workers", "drivers", "programs")
"""What listens at them, in the order of the variables."""

IMPORTS_S = 240
"""In which imports are made on a machine that does much else."""

_WORKER = Path(__file__).with_name("forked_worker.py")
_TITLE = " " * 4000  # processes change their titles in place, and children have longer ones


def set_up_by_a_fork() -> None:
    """From now on Ray's workers of a cluster that this process starts are forked at once, without Ray's own script."""
    from ray._private import ray_constants

    ray_constants.SETUP_WORKER_FILENAME = str(_WORKER)


def _variables(folder: Path) -> dict[str, str]:
    job = {"runtime_env": {"py_executable": f"{sys.executable} {_WORKER}"}}
    places = (str(folder / name) for name in PLACES)
    return dict(zip(VARIABLES, (*places, json.dumps(job), "0", "0"), strict=True))


def start(folder: Path, keeper: int) -> dict[str, str]:
    """All of them, started where no other worker has; they end with the process `keeper`.

    Returns the environment under which servers, Ray's workers and drivers are forked from them.
    """
    servers = folder / "servers"
    variables = _variables(folder)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "servers.log").exists():
            from tests.support import preloaded_servers

            with servers.with_suffix(".log").open("wb") as log:
                preloaded_servers.start(servers, keeper, log, _TITLE)
        if not (folder / "imports.log").exists():
            _start_imports(folder, keeper, variables)
        for name in PLACES:
            _wait_for(folder / name)
    return variables


def python_of_workers(folder: Path, keeper: int) -> str:
    """The command line of a Python that is a worker of pytest-xdist; the imports that it needs begin now."""
    _start_imports(folder, keeper, _variables(folder))
    return shlex.join([sys.executable, "-m", "tests.support.forked_pytest", str(folder / "tests")])


def _start_imports(folder: Path, keeper: int, variables: dict[str, str]) -> None:
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    _start("tests.support.preloaded_imports", folder / "imports", keeper, one_thread, folder)


def _start(module: str, log: Path, keeper: int, environment: dict[str, str], place: Path) -> None:
    with log.with_suffix(".log").open("wb") as file:
        subprocess.Popen(
            [sys.executable, "-m", module, str(place), str(keeper), _TITLE],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment | ROOM,
        )


def _wait_for(place: Path) -> None:
    deadline = time.monotonic() + IMPORTS_S
    while not place.exists():
        logs = "".join(log.read_text() for log in place.parent.glob("*.log"))
        assert time.monotonic() < deadline, f"nobody listens at {place}: {logs}"
        time.sleep(0.02)
