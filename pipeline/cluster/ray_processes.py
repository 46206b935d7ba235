"""Which of Ray's own processes died: where one does, all that Ray started dies with it, and does not say why."""

from __future__ import annotations

import signal
import time

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
