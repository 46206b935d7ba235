"""Answers of one HTTP request that are ready at one moment leave in one piece, not each in a piece of its own.

SGLang 0.5.23 sends every answer of a stream by itself, and its HTTP server takes longer to send a piece than to write
it. A piece has few answers enough that whoever reads them has begun before the last is written.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

MOST = 32  # answers of a piece


def install() -> None:
    """Register the hook; call while SGLang loads its plugins."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.entrypoints.http_server.serve_generate_request", join, HookType.AROUND)


async def join(original: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
    """serve_generate_request: what it streams, joined."""
    response = await original(*args, **kwargs)
    chunks = getattr(response, "body_iterator", None)
    if chunks is not None:
        response.body_iterator = joined(chunks)
    return response


async def joined(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes. Closed, or cancelled, it ends `chunks` before it ends. Raises what they raise, behind what came
    before."""
    ready: list[bytes] = []
    came = asyncio.Event()

    async def read() -> None:
        try:
            async for chunk in chunks:
                ready.append(chunk)
                came.set()
                if len(ready) >= MOST:
                    await asyncio.sleep(0)  # whoever sends has its turn
        finally:
            came.set()

    reading = asyncio.create_task(read())
    try:
        while ready or not reading.done():
            await came.wait()
            came.clear()
            if ready:
                piece = b"".join(ready)
                ready.clear()
                yield piece
        await reading
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
