"""A folder for Unix sockets, whose paths the kernel cuts at 107 bytes however long TMPDIR is."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_RANDOM = 8  # characters that mkdtemp adds to a name
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")


def make_socket_folder(longest: int) -> Path:
    """A new, empty folder whose path has at most `longest` bytes: where TMPDIR says, or in /tmp or the like.

    Its name says which process made it, sameroute-PID-abcdefgh, except in a run's own folder, whose name does.
    Raises OSError where no such place can be written.
    """
    named = f"sameroute-{os.getpid()}-"
    room = longest - len(named) - _RANDOM - 1
    for parent in (tempfile.gettempdir(), *_SHORT):
        prefix = "" if Path(parent).name.startswith("sameroute-") else named
        fits = len(os.fsencode(parent)) + 1 + len(prefix) + _RANDOM <= longest
        if fits and os.access(parent, os.W_OK | os.X_OK):
            return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    raise OSError(
        f"no folder for sockets: {tempfile.gettempdir()} is longer than {room} bytes, and none of "
        f"{', '.join(_SHORT)} can be written; set TMPDIR to a shorter path"
    )
