"""A grader's questions one by one on an event loop: each is answered while others are still being asked or graded."""

from __future__ import annotations

import asyncio
from typing import Self

from pipeline.rewards.grader import Grader
from pipeline.rewards.protocol import Question, Verdict


class Asking:
    """An async context; nobody else may ask the grader meanwhile. What is still open when it ends is cancelled."""

    def __init__(self, grader: Grader):
        self.grader = grader
        self._outbox = bytearray()
        self._open: dict[int, tuple[bytes, asyncio.Future[Verdict]]] = {}
        self._descriptor = -1
        self._writing = False
        self._soon: asyncio.Handle | None = None
        self._restarts = 0
        self._asked_again: set[int] = set()
        """Questions that were open at the last restart: while they are, another restart counts with it."""

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._watch()
        return self

    async def __aexit__(self, *details: object) -> None:
        self._forget()
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        for _, future in self._open.values():
            future.cancel()
        self._open.clear()

    async def ask(self, question: Question) -> Verdict:
        """A verdict of all components together. Raises VerifierError where one cannot be loaded, RewardError where the
        supervisor is killed again and again."""
        parts = self.grader.parts(question)
        futures = [self._loop.create_future() for _ in parts]
        self._open |= {number: (packed, f) for (number, packed), f in zip(parts.items(), futures, strict=True)}
        self._outbox += b"".join(parts.values())
        if self._soon is None:  # what ends at one moment is asked at once: each write wakes two processes
            self._soon = self._loop.call_soon(self._send)
        try:
            return self.grader.together(question, await asyncio.gather(*futures))
        finally:
            for number in parts:
                self._open.pop(number, None)

    def _send(self) -> None:
        self._soon = None
        self._exchange()

    def _exchange(self) -> None:
        """Whatever can be sent or taken now."""
        try:
            verdicts = self.grader.exchange(self._outbox)
            if verdicts is None:
                self._restart()
                return
        except Exception as error:  # a mistake of ours too: else who asked would wait for ever
            self._forget()  # there will be no more
            for _, future in self._open.values():
                if not future.done():
                    future.set_exception(error)
            return
        for number, verdict in verdicts:
            self._asked_again.discard(number)
            if number in self._open and not (future := self._open[number][1]).done():  # else its caller has gone
                future.set_result(verdict)
        if not self._asked_again:
            self._restarts = 0
        self._write_if_needed()

    def _restart(self) -> None:
        self._forget()
        self._restarts += 1
        self.grader.restart(self._restarts)
        self._asked_again = set(self._open)
        self._outbox = bytearray(b"".join(packed for packed, _ in self._open.values()))
        self._watch()
        self._write_if_needed()

    def _watch(self) -> None:
        self._descriptor = self.grader.fileno()
        self._loop.add_reader(self._descriptor, self._exchange)

    def _write_if_needed(self) -> None:
        if bool(self._outbox) == self._writing:
            return
        self._writing = bool(self._outbox)
        if self._writing:
            self._loop.add_writer(self._descriptor, self._exchange)
        else:
            self._loop.remove_writer(self._descriptor)

    def _forget(self) -> None:
        """The socket is looked at no more."""
        self._loop.remove_reader(self._descriptor)
        self._loop.remove_writer(self._descriptor)
        self._writing = False
