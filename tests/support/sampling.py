"""To act in the middle of an answer, however fast the machine is."""

from __future__ import annotations

import asyncio
import json
import urllib.request


async def sampling_begins(url: str, timeout_s: float = 60) -> None:
    """Wait until the server at `url` has sampled a first token of a request: its load says so after each prefill."""

    def running() -> int:
        with urllib.request.urlopen(f"{url}/v1/loads", timeout=timeout_s) as answer:
            return sum(load["num_running_reqs"] for load in json.load(answer)["loads"])

    async with asyncio.timeout(timeout_s):
        while await asyncio.to_thread(running) == 0:
            await asyncio.sleep(0.02)
