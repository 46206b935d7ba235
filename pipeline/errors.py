"""What ends a command on purpose: one base, whose subclasses say which exit code the command ends with.

Whoever raises one writes a message for a person: what is wrong, and what to write instead. `commands/main.py` prints it
without a traceback. Any other exception is a mistake of this code and keeps its traceback.

    0    done
    1    FAILED         the run began and failed
    2    NOT_STARTED    nothing was begun: the command, its configuration or its files are wrong
    3    DISAGREEMENT   diagnose found that the engines disagree
    75   TO_BE_RESUMED  a signal ended the run, and it can go on (EX_TEMPFAIL of sysexits.h)
    130  INTERRUPTED    a signal ended the run, and nothing was saved
"""

from __future__ import annotations

from typing import ClassVar, Final

FAILED: Final = 1
NOT_STARTED: Final = 2
DISAGREEMENT: Final = 3
TO_BE_RESUMED: Final = 75
INTERRUPTED: Final = 130


class SamerouteError(Exception):
    """Base of all errors that are messages to a user. exit_code: of the command that one of them ends."""

    exit_code: ClassVar[int] = FAILED
