"""To act in the middle of an answer, however fast the machine is."""

from __future__ import annotations

import asyncio

from pipeline.engine.control import SGLangControl
from pipeline.engine.fleet import ServerProcess


async def sampling_begins(server: SGLangControl | ServerProcess, timeout_s: float = 60) -> None:
    """Wait until the server has sampled a first token of a request: its load says so after each prefill."""
    control = SGLangControl(server.url, keys=server.keys, timeout_s=timeout_s)

    def running() -> int:
        return sum(load["num_running_reqs"] for load in control.get("/v1/loads")["loads"])

    async with asyncio.timeout(timeout_s):
        while await asyncio.to_thread(running) == 0:
            await asyncio.sleep(0.02)
