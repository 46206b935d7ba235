"""Several servers as one client."""

from __future__ import annotations

import asyncio

import pytest

from pipeline.engine.pool import ClientPool
from pipeline.engine.server import ServerError


class Server:
    """Stands for a client; answers wait until `release`."""

    def __init__(self, name):
        self.name, self.open, self.asked, self.release = name, 0, [], asyncio.Event()

    async def __aenter__(self):
        self.open += 1
        return self

    async def __aexit__(self, *_):
        self.open -= 1

    async def generate(self, ids, n, sampling):
        assert self.open > 0
        self.asked.append((tuple(ids), n))
        await self.release.wait()
        if ids == [13]:
            raise ServerError("unlucky")
        return [f"{self.name}:{ids[0]}"] * n

    async def score(self, ids):
        return self.name, ids


def test_groups_go_to_the_server_with_the_fewest_samples_in_flight():
    async def run():
        a, b = Server("a"), Server("b")
        pool = ClientPool([a, b])
        async with pool, pool:
            tasks = [asyncio.create_task(pool.generate([i], n, None)) for i, n in enumerate([8, 2, 2, 2, 2, 4])]
            await asyncio.sleep(0)
            assert [n for _, n in a.asked] == [8, 4]
            assert [n for _, n in b.asked] == [2, 2, 2, 2]
            b.release.set()
            await asyncio.gather(*tasks[1:5])
            assert await pool.score([5]) == ("b", [5])
            a.release.set()
            assert await tasks[0] == ["a:0"] * 8
        assert a.open == b.open == 0

    asyncio.run(run())


def test_a_failed_group_is_no_longer_in_flight():
    async def run():
        a, b = Server("a"), Server("b")
        a.release.set()
        b.release.set()
        pool = ClientPool([a, b])
        async with pool:
            with pytest.raises(ServerError, match="unlucky"):
                await pool.generate([13], 4, None)
            await pool.generate([1], 1, None)
        assert [ids for ids, _ in a.asked] == [(13,), (1,)]
        assert b.asked == []

    asyncio.run(run())
