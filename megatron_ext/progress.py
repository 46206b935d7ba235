"""How far this rank is with what takes long, for whoever asks meanwhile."""

from __future__ import annotations


class Progress:
    """done, total: bytes of weights that were read, or passed on, of this rank's model; total 0: nothing was begun."""

    def __init__(self) -> None:
        self.done = self.total = 0

    def begin(self, total: int) -> None:
        """Something of so many bytes begins."""
        self.done, self.total = 0, total

    def add(self, nbytes: int) -> None:
        """So many more are done."""
        self.done += nbytes


WEIGHTS = Progress()
"""Of the last model that was loaded, sent or written; a process is one rank."""
