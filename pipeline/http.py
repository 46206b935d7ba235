"""HTTP of this package: `request` where a caller waits, `session` where many calls are in flight.

aiohttp does both. httpx would too, but with it a rollout of 256 short answers takes 8% longer and 1.9 times the
client's CPU time (`python scripts/bench_http.py --rounds 80`: 0.495 against 0.467 s, 76 against 41 ms).

The proxy variables of the environment (http_proxy, ...) count only where a call asks for them: a run's own servers are
never reached through a proxy.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import aiohttp

HttpError = aiohttp.ClientError
"""A call that got no whole answer; `TimeoutError` where it took too long."""


@dataclass(frozen=True)
class Answer:
    """status: of HTTP. text: the body."""

    status: int
    text: str

    def json(self) -> Any:
        """Of the body. Raises ValueError where it is none."""
        return json.loads(self.text)


_IDLE_S = 2.0
"""A connection that was idle for longer is not used again. SGLang (uvicorn) closes one after 5 s, and a caller whose
event loop stood still meanwhile would not have heard of it."""


def session(timeout_s: float | None, *, proxies: bool = False) -> aiohttp.ClientSession:
    """For any number of calls at once; the servers queue, not the client.

    timeout_s: of one call, its body included; None: none. proxies: those that the environment names count.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S),
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        trust_env=proxies,
    )


def bearer(key: str | None) -> dict[str, str]:
    """The header that carries a key; none for None."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def request(
    method: str,
    url: str,
    *,
    timeout_s: float,
    body: dict[str, Any] | bytes | None = None,
    key: str | None = None,
    proxies: bool = False,
) -> Answer:
    """One call, waited for; from a thread without a running event loop. body: sent as JSON; bytes are JSON already.

    key: see `bearer`. Raises HttpError and TimeoutError.
    """
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    headers = bearer(key) | ({} if data is None else {"Content-Type": "application/json"})

    async def call() -> Answer:
        async with (
            session(timeout_s, proxies=proxies) as opened,
            opened.request(method, url, data=data, headers=headers) as answer,
        ):
            return Answer(answer.status, await answer.text(errors="replace"))

    return asyncio.run(call())
