"""Answers as a run gets them, and a way to act in the middle of one, however fast the machine is."""

from __future__ import annotations

import asyncio

from pipeline.engine.client import SGLangClient
from pipeline.engine.control import SGLangControl
from pipeline.engine.fleet import Fleet, ServerProcess
from pipeline.engine.sampling import Sampling
from pipeline.rollout.sampler import all_or_none
from pipeline.rollout.session import Session
from pipeline.types import Rollout


async def answers(engine: SGLangClient | Fleet, prompt_ids, n: int, sampling: Sampling) -> list[Rollout]:
    """n answers to a prompt."""
    async with engine:
        return await all_or_none([Session(engine, prompt_ids).sample(sampling) for _ in range(n)])


async def sampling_begins(server: SGLangControl | ServerProcess, timeout_s: float = 60) -> None:
    """Wait until the server has sampled a first token of a request: its load says so after each prefill."""
    control = SGLangControl(server.url, keys=server.keys, timeout_s=timeout_s)

    def running() -> int:
        return sum(load["num_running_reqs"] for load in control.get("/v1/loads")["loads"])

    async with asyncio.timeout(timeout_s):
        while await asyncio.to_thread(running) == 0:
            await asyncio.sleep(0.02)
