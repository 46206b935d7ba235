"""Answers that are ready together leave together, and nothing else changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from pipeline.engine.inside.joined_answers import MOST, join, joined


async def chunks_of(*rounds: int, ended: list[str]) -> AsyncIterator[bytes]:
    """So many at a moment, moment after moment."""
    try:
        for number, count in enumerate(rounds):
            for i in range(count):
                yield f"{number}.{i};".encode()
            await asyncio.sleep(0.001)
    finally:
        ended.append("ended")


async def pieces_of(*rounds: int) -> tuple[list[bytes], list[str]]:
    ended: list[str] = []
    return [piece async for piece in joined(chunks_of(*rounds, ended=ended))], ended


@pytest.mark.parametrize(
    ("rounds", "pieces"), [((), 0), ((1,), 1), ((5, 0, 3), 2), ((2 * MOST,), 2), ((MOST + 1,), 2)], ids=str
)
def test_what_is_ready_at_one_moment_is_one_piece(rounds, pieces):
    found, ended = asyncio.run(pieces_of(*rounds))
    expected = "".join(f"{number}.{i};" for number, count in enumerate(rounds) for i in range(count))
    assert b"".join(found).decode() == expected
    assert len(found) == pieces
    assert ended == ["ended"]


def test_what_goes_wrong_comes_behind_what_was_there():
    async def failing() -> AsyncIterator[bytes]:
        yield b"one"
        yield b"two"
        raise ValueError("three")

    async def run() -> list[bytes]:
        stream = joined(failing())
        found = [await anext(stream)]
        with pytest.raises(ValueError, match="three"):
            await anext(stream)
        return found

    assert asyncio.run(run()) == [b"onetwo"]


@pytest.mark.parametrize("how", ["closed", "cancelled"])
def test_who_stops_reading_ends_the_answers_first(how):
    """SGLang aborts what a closed connection asked for as its stream ends."""
    ended: list[str] = []

    async def forever() -> AsyncIterator[bytes]:
        try:
            yield b"one"
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("ended")

    async def run() -> None:
        stream = joined(forever())
        assert await anext(stream) == b"one"
        if how == "closed":
            await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue]
        else:
            waiting = asyncio.create_task(anext(stream))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        ended.append("closed")

    asyncio.run(run())
    assert ended == ["ended", "closed"]


def test_an_answer_that_is_no_stream_stays_as_it_is():
    async def answer() -> str:
        return "whole"

    assert asyncio.run(join(answer)) == "whole"
