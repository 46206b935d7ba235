"""Which of Ray's own processes died: where one does, all that Ray started dies with it, and does not say why."""

from __future__ import annotations

import signal
import time
from typing import Any

from ray._private import worker

_NAMES = {"raylet": "the raylet, which starts and ends processes", "gcs_server": "gcs_server, which knows the cluster"}
_SEEN_S = 1.0  # from a rank's end to that of the process that ended it


def what_died() -> str:
    """The beginning of a sentence, "Ray's ... was killed by SIGKILL; "; empty where Ray lives, or another machine has
    it."""
    node = worker._global_node
    if node is None:
        return ""
    deadline = time.monotonic() + _SEEN_S
    while True:
        for kind, processes in node.all_processes.items():
            for information in processes:
                code = information.process.poll()
                if kind in _NAMES and code is not None:
                    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
                    return f"Ray's process {_NAMES[kind]}, {how}; "
        if time.monotonic() > deadline:
            return ""
        time.sleep(0.1)


_print = worker.print_to_stdstream


def _print_all_but_the_raylets_end(data: dict[str, Any], ignore_prefix: bool) -> None:
    if not any(line.startswith("Raylet is terminated") for line in data["lines"]):
        _print(data, ignore_prefix)


def leave_out_the_raylets_log() -> None:
    """When its raylet dies, Ray (2.60) prints forty lines of that one's log on standard output, whatever its log level.
    `what_died` says it in one; everything else that Ray tells a driver is printed as before."""
    worker.print_to_stdstream = _print_all_but_the_raylets_end
