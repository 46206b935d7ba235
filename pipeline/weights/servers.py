"""Calls to all servers at once, each failure under its server's name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from megatron_ext.collective_clock import waiting
from pipeline.engine.control import ServerAddress, SGLangControl
from pipeline.engine.server import ServerError
from pipeline.errors import SamerouteError

_CALLS = 3  # of a server at once, at most


class WeightTransferError(SamerouteError):
    """A server did not take the weights, or holds others; the message names it."""


class WeightCheckError(WeightTransferError):
    """Every server took the weights, and then did not hold them, or could not say. To send them again mends nothing."""


class Servers:
    """The servers that get the weights. timeout_s: of one call."""

    def __init__(self, addresses: Sequence[ServerAddress], *, timeout_s: float):
        self.timeout_s = timeout_s
        self.controls = [SGLangControl(a.url, keys=a.keys, timeout_s=timeout_s, log_path=a.log_path) for a in addresses]
        self._threads = ThreadPoolExecutor(max_workers=_CALLS * len(addresses))
        self._under_way: list[SGLangControl] = []

    def ask(self, path: str, body: dict[str, Any] | None = None) -> list[Future[Any]]:
        """POST the same to every server, in the background; `answers` waits for all."""
        return [self.later(control, path, body or {}) for control in self.controls]

    def later(self, control: SGLangControl, path: str, body: dict[str, Any]) -> Future[Any]:
        """POST in the background."""
        return self._threads.submit(self.guard, control, lambda: control.post(path, body))

    @staticmethod
    def answers(futures: Sequence[Future[Any]]) -> None:
        """Wait for calls. Raises WeightTransferError for the first that failed."""
        with waiting():
            for future in futures:
                future.result()

    def guard(self, control: SGLangControl, call: Callable[[], Any]) -> Any:
        """`call()`, its failure a WeightTransferError that names the server."""
        self._under_way.append(control)
        try:
            return call()
        except ServerError as error:
            raise WeightTransferError(f"weight transfer to {control.url} failed: {error}") from error
        finally:
            self._under_way.remove(control)

    def awaited(self) -> list[str]:
        """A sentence for each server that has been asked and has not answered; from any thread."""
        waiting = {c.url: c.log_path for c in list(self._under_way)}
        return [f"the server {url} has not answered; its log: {log}" for url, log in waiting.items()]

    def close(self) -> None:
        self._threads.shutdown(wait=False)
