"""Ray's own processes: which are started, and which died. Where one does, all that Ray started dies with it, and does
not say why."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import services, worker
from ray._private.node import Node

from pipeline.say import to_stderr

_NAMES = {"raylet": "the raylet, which starts and ends processes", "gcs_server": "gcs_server, which knows the cluster"}
_UNUSED = ("start_monitor", "start_log_monitor", "start_api_server")
_IDLE = "import os,select;select.select([os.pidfd_open(int(os.environ['RAY_RAYLET_PID']))],[],[])"
"""A process that ends when the raylet that started it is gone."""
_SEEN_S = 1.0  # from a rank's end to that of the process that ended it


@contextlib.contextmanager
def only_what_runs_actors() -> Iterator[None]:
    """A cluster that is started inside has no process that adds machines, prints logs, shows or answers a dashboard.

    A run of its own uses none of them. Ray (2.60) starts all four, a Python process each, before its first actor: four
    seconds of a processor. No argument of `ray.init` leaves them out.
    """
    before = {name: getattr(Node, name) for name in _UNUSED}
    start = services.start_ray_process
    for name in _UNUSED:
        setattr(Node, name, lambda node, **settings: None)

    def start_with_an_idle_agent(command: list[str], kind: str, *arguments: Any, **settings: Any) -> Any:
        return start(_with_an_idle_agent(command) if kind == "raylet" else command, kind, *arguments, **settings)

    services.start_ray_process = start_with_an_idle_agent
    try:
        yield
    finally:
        services.start_ray_process = start
        for name, method in before.items():
            setattr(Node, name, method)


def end_own_cluster() -> None:
    """End the cluster that this process has started, its processes and theirs at once.

    They do not hear SIGTERM (`deaf.py`): Ray (2.60) would give each a second to follow it before it kills it, and the
    raylet's children notice only by and by that it is gone.
    """
    if (node := worker._global_node) is None:
        ray.shutdown()
        return
    kill, theirs = node.kill_all_processes, []

    def kill_at_once(**settings: Any) -> None:
        for _, process in _processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                theirs.extend(psutil.Process(process.pid).children(recursive=True))
        kill(**settings | {"allow_graceful": False})

    node.kill_all_processes = kill_at_once
    ray.shutdown()
    for child in theirs:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _with_an_idle_agent(command: list[str]) -> list[str]:
    """The raylet's command: its agent, which collects metrics and answers the dashboard, does nothing.

    The raylet (2.60) starts with an agent or not at all, waits until files name the agent's ports, and ends where the
    agent does. The files name a port where nobody listens; the raylet's log then says that metrics are not exported.
    """
    options = dict(word.removeprefix("--").split("=", 1) for word in command if "=" in word)
    for kind in ("metrics_agent", "metrics_export", "dashboard_agent_listen"):
        Path(options["session_dir"], f"{kind}_port_{options['node_id']}").write_text("1")
    idle = subprocess.list2cmdline([sys.executable, "-S", "-c", _IDLE])
    kept = [word for word in command if not word.startswith("--dashboard_agent_command=")]
    return [*kept, f"--dashboard_agent_command={idle}"]


def what_died() -> str:
    """The beginning of a sentence, "Ray's ... was killed by SIGKILL; "; empty where Ray lives, or another machine has
    it."""
    deadline = time.monotonic() + _SEEN_S
    while worker._global_node is not None and time.monotonic() < deadline:
        if words := ended():
            return f"{words}; "
        time.sleep(0.1)
    return ""


def ended() -> str:
    """ "Ray's process ... was killed by SIGKILL", now; empty where Ray lives, or another machine has it.

    To be looked at before every call of Ray: a driver whose raylet is gone is ended by Ray itself (2.60) at the next,
    with exit code 1 and before it can remove anything.
    """
    for kind, process in _processes():
        if (code := process.poll()) is not None:
            return f"Ray's process {_NAMES[kind]}, {_how(code)}"
    return ""


def _processes() -> list[tuple[str, Any]]:
    """Those of the cluster that this process has started, by kind."""
    node = worker._global_node
    started = {} if node is None else node.all_processes
    return [(kind, information.process) for kind in _NAMES for information in started.get(kind, [])]


def _how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


@contextlib.contextmanager
def died_said(say: Callable[[str], None] = to_stderr) -> Iterator[None]:
    """While the block lasts, the end of one of Ray's processes is said at once. Ray up inside.

    The line stands there even where Ray ends the driver before `ended` is looked at.
    """
    descriptors = {os.pidfd_open(process.pid): (kind, process) for kind, process in _processes()}
    ended, end = os.pipe()

    def watch() -> None:
        ready, _, _ = select.select([*descriptors, ended], [], [])
        if ended not in ready:
            kind, process = descriptors[ready[0]]
            code = process.poll()
            say(f"Ray's process {_NAMES[kind]}, {'is gone' if code is None else _how(code)}; the run ends")

    thread = threading.Thread(target=watch, name="sameroute ray", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.close(end)  # which makes `ended` readable
        thread.join()
        for descriptor in (*descriptors, ended):
            os.close(descriptor)


_print = worker.print_to_stdstream


def _print_all_but_the_raylets_end(data: dict[str, Any], ignore_prefix: bool) -> None:
    if not any(line.startswith("Raylet is terminated") for line in data["lines"]):
        _print(data, ignore_prefix)


def leave_out_the_raylets_log() -> None:
    """When its raylet dies, Ray (2.60) prints forty lines of that one's log on standard output, whatever its log level.
    `what_died` says it in one; everything else that Ray tells a driver is printed as before."""
    worker.print_to_stdstream = _print_all_but_the_raylets_end
