"""All groups of a step, in flight at once."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Protocol

from pipeline.engine.client import SGLangClient
from pipeline.engine.fleet import Fleet
from pipeline.engine.sampling import Sampling
from pipeline.rollout.session import Engine, Session
from pipeline.rollout.teacher import Teacher
from pipeline.types import Episode, Group, Prompt


class Attempt(Protocol):
    """One attempt at a prompt, of many turns."""

    @property
    def begun(self) -> bool:
        """Whether a token of it may have been sampled."""
        ...

    @property
    def moved(self) -> float:
        """When it last got further, seconds of time.monotonic()."""
        ...

    async def play(self) -> Episode:
        """To its end; the episode has a verdict. Raises what sampling raises."""
        ...


class Attempts(Protocol):
    """Who makes attempts: see `environments.running.Environments`."""

    def begin(self, engine: Engine, prompt: Prompt, sampling: Sampling, group: object) -> Attempt:
        """On the event loop that the engine is used on."""
        ...


async def sample_groups(
    client: SGLangClient | Fleet,
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    on_group: Callable[[int, Group], None] | None = None,
    attempts: Attempts | None = None,
    teacher: Teacher | None = None,
) -> list[Group]:
    """Sample n answers to every prompt; the server decides what runs together.

    attempts: make episodes of many turns; None: each is one answer. teacher: scores each one as it ends.

    sampling.seed: each prompt draws from streams of its own, that depend on this seed and on the prompt's index.

    on_group(position, group): called as soon as a group is complete, in the order of completion.
    Returns the groups, ungraded, in the order of the prompts.
    Raises the first error of any group, after the requests of all others have been given up.
    """

    async def episode(prompt: Prompt, own: Sampling) -> Episode:
        if attempts is None:
            made = Episode((await Session(client, prompt.ids, group=prompt.index).sample(own),))
        else:
            made = await attempts.begin(client, prompt, own, prompt.index).play()
        return made if teacher is None else await teacher.scored(made)

    async def one(position: int, prompt: Prompt) -> Group:
        own = [of_sample(sampling, prompt, i) for i in range(n)]
        group = Group(prompt, tuple(await all_or_none([episode(prompt, s) for s in own])))
        if on_group is not None:
            on_group(position, group)
        return group

    async with client, contextlib.nullcontext() if teacher is None else teacher:
        return await all_or_none([one(i, prompt) for i, prompt in enumerate(prompts)])


async def all_or_none[T](work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of all, in order. Raises the first error, after the others have been given up."""
    tasks = [asyncio.create_task(part) for part in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def of_sample(sampling: Sampling, prompt: Prompt, number: int) -> Sampling:
    """With the seed of a prompt's sample; the first ones of two prompts are 2^48 to one not near one another."""
    if sampling.seed is None:
        return sampling
    digest = hashlib.blake2b(f"{sampling.seed}/{prompt.index}".encode(), digest_size=6).digest()
    return replace(sampling, seed=int.from_bytes(digest) + number)


def sample_groups_sync(
    client: SGLangClient | Fleet,
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    on_group: Callable[[int, Group], None] | None = None,
    attempts: Attempts | None = None,
    teacher: Teacher | None = None,
) -> list[Group]:
    """`sample_groups` for a caller without an event loop."""
    groups: list[Group] = []

    # Not asyncio.run(sample_groups(...)): asyncio 3.12 formats the main task's result when it puts the interrupt
    # handler back, and to format thousands of arrays takes 0.2 s.
    async def run() -> None:
        groups.extend(await sample_groups(client, prompts, n, sampling, on_group, attempts, teacher))

    asyncio.run(run())
    return groups
