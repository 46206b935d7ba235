"""A server that does not outlive the run: python guard.py COMMAND...

Its standard input is a pipe that only the run holds. When the run is gone, however it ended, the pipe is closed, and
this ends its session: itself, the command, and all that the command started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main(command: list[str]) -> None:
    """Ends as the command does."""
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        sys.exit(f"{command[0]} cannot be started: {error}")
    threading.Thread(target=end_with_the_run, daemon=True).start()
    sys.exit(child.wait())


def end_with_the_run() -> None:
    """Wait for the end of standard input, then end the session."""
    while os.read(0, 1 << 16):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
