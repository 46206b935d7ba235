"""All groups of a step, in flight at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from pipeline.rollout.client import Sampling, SGLangClient
from pipeline.rollout.pool import ClientPool
from pipeline.types import Group, Prompt


async def sample_groups(
    client: SGLangClient | ClientPool,
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    on_group: Callable[[int, Group], None] | None = None,
) -> list[Group]:
    """Sample n answers to every prompt; the server decides what runs together.

    on_group(position, group): called as soon as a group is complete, in the order of completion.
    Returns the groups, ungraded, in the order of the prompts.
    Raises the first error of any group, after the requests of all others have been given up.
    """

    async def one(position: int, prompt: Prompt) -> Group:
        group = Group(prompt, tuple(await client.generate(prompt.ids, n, sampling)))
        if on_group is not None:
            on_group(position, group)
        return group

    async with client:
        tasks = [asyncio.create_task(one(i, prompt)) for i, prompt in enumerate(prompts)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def sample_groups_sync(
    client: SGLangClient | ClientPool,
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    on_group: Callable[[int, Group], None] | None = None,
) -> list[Group]:
    """`sample_groups` for a caller without an event loop."""
    groups: list[Group] = []

    # Not asyncio.run(sample_groups(...)): asyncio 3.12 formats the main task's result when it puts the interrupt
    # handler back, and to format thousands of arrays takes 0.2 s.
    async def run() -> None:
        groups.extend(await sample_groups(client, prompts, n, sampling, on_group))

    asyncio.run(run())
    return groups
