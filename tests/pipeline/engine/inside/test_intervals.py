"""What has too little to say waits; what ended, or asked for no interval, is heard."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest

from pipeline.engine.inside.intervals import send_intervals
from pipeline.engine.sampling import Sampling


def request_of(tokens: int, told: int = 0, *, interval: int | None = 4, stream: bool = True, ended: bool = False):
    return SimpleNamespace(
        stream=stream,
        sampling_params=SimpleNamespace(stream_interval=interval),
        output_ids=list(range(tokens)),
        send_token_offset=told,
        finished=lambda: ended,
    )


@pytest.mark.parametrize(
    ("request_", "heard"),
    [
        (request_of(1), False),  # SGLang's own way sends the first at once
        (request_of(3), False),
        (request_of(4), True),
        (request_of(6), True),  # a step may bring several
        (request_of(7, told=4), False),
        (request_of(8, told=4), True),
        (request_of(1, ended=True), True),
        (request_of(0, ended=True), True),
        (request_of(1, interval=1), True),
        (request_of(1, interval=None), True),
        (request_of(1, stream=False), True),
    ],
)
def test_who_is_heard(request_, heard):
    seen = []
    send_intervals(
        lambda streamer, requests, *args, **how: seen.append((requests, args, how)), None, [request_], 1, a=2
    )
    assert seen == [([request_] if heard else [], (1,), {"a": 2})]


def test_tokens_of_a_long_answer_are_heard_of_before_it_ends(client):
    heard = []

    async def run():
        async with client:
            long = Sampling(600, 1.0, ignore_eos=True)
            await client.sample([1, 2, 3], long, on_tokens=lambda _: heard.append(time.monotonic()))
            return time.monotonic()

    ended = asyncio.run(run())
    assert len(heard) == 3  # 256 and 512 tokens, and all
    assert heard[1] - heard[0] > 0.2 * (ended - heard[0])
