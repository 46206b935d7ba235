"""Threads that environments run in, each with an event loop of its own.

What a person writes may block: a tool that sleeps, a client that is not asynchronous, a long computation. On the event
loop of the servers' connections that would break them: SGLang closes a connection that is idle for 5 s. Here it holds
up the conversations of its own thread, and nobody else.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_END_S = 5.0


class Place[E]:
    """One thread and what was made in it.

    load: conversations that run in it.
    """

    def __init__(self, make: Callable[[], E], number: int):
        """make: called in the thread. Raises what it raises."""
        self.load = 0
        self._loop, self._made = asyncio.new_event_loop(), threading.Event()
        self._environment: E | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(make,), name=f"sameroute environments {number}", daemon=True
        )
        self._thread.start()
        self._made.wait()
        if self._error is not None:
            raise self._error

    @property
    def environment(self) -> E:
        assert self._environment is not None
        return self._environment

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run it in the thread; cancelling the future cancels the work."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def answers(self, within_s: float) -> bool:
        """Whether the thread gets to something new in time; asked from another loop."""
        nothing = asyncio.sleep(0)
        done, _ = await asyncio.wait({asyncio.wrap_future(self.submit(nothing))}, timeout=within_s)
        return bool(done)

    def stop(self, within_s: float = _END_S) -> bool:
        """End it; False where something in it blocks, and the thread is left behind."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _run(self, make: Callable[[], E]) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._environment = make()
        except BaseException as error:  # whoever made this place raises it
            self._error = error
            self._made.set()
            self._loop.close()
            return
        asyncio.set_event_loop(self._loop)  # once more: an asyncio.run in there leaves the thread without one
        self._made.set()
        try:
            self._loop.run_forever()
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()
