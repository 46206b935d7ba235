"""Conversations over HTTP on both sides: what a real server received is what is trained on."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from openai import AsyncOpenAI

from pipeline.engine.sampling import Sampling
from pipeline.environments.conversation import Conversation
from pipeline.environments.endpoint import serve
from tests.support.served import ASKED, prompt_of

TURNS, CONVERSATIONS = 5, 12


def watched(client):
    """The ids of every request that goes to the server from now on."""
    received, chunks = [], client._chunks

    def send(body):
        ids = body["input_ids"]
        received.extend(map(tuple, ids) if isinstance(ids[0], list) else [tuple(ids)])
        return chunks(body)

    client._chunks = send
    return received


def before_each_turn(rollout):
    """Ids that stood before each run of sampled tokens."""
    starts = np.flatnonzero(np.diff(np.concatenate([[False], rollout.trained]).astype(int)) == 1)
    return [tuple(rollout.token_ids[: len(rollout.prompt_ids) + start].tolist()) for start in starts]


async def whole(client, messages):
    """(message, tokens of it)"""
    answer = await client.chat.completions.create(model="policy", messages=messages)
    return answer.choices[0].message.model_dump(), answer.usage.completion_tokens


async def streamed(client, messages):
    """The same, put together from a stream."""
    said, tokens = "", 0
    async for piece in await client.chat.completions.create(
        model="policy", messages=messages, stream=True, stream_options={"include_usage": True}
    ):
        said += "".join(choice.delta.content or "" for choice in piece.choices)
        tokens = piece.usage.completion_tokens if piece.usage else tokens
    return {"role": "assistant", "content": said}, tokens


@pytest.mark.parametrize("asked", [whole, streamed])
def test_ids_of_conversations_that_a_client_leads_are_those_that_the_server_received(asked, client, tokenizer):
    async def lead(number):
        prompt, writer = prompt_of(tokenizer)
        sampling = Sampling(12, 1.0, stop_token_ids=(1,))
        made = Conversation(client, prompt, writer, sampling, max_turns=TURNS, max_tokens=800)
        async with serve(made) as address:
            own, messages = AsyncOpenAI(base_url=address.url, api_key=address.key), list(ASKED)
            tokens = 0
            for turn in range(TURNS):
                message, count = await asked(own, messages)
                tokens += count
                messages += [message, {"role": "tool", "tool_call_id": f"f{turn}", "content": f"{number} {turn}"}]
            await own.close()
        (rollout,) = made.rollouts
        assert rollout.trained_tokens == tokens
        assert len(rollout.routes) == len(rollout.token_ids) - 1
        return rollout

    async def run():
        received = watched(client)
        async with client:
            return await asyncio.gather(*(lead(number) for number in range(CONVERSATIONS))), received

    rollouts, received = asyncio.run(run())
    expected = [ids for rollout in rollouts for ids in before_each_turn(rollout)]
    assert len(expected) == CONVERSATIONS * TURNS
    assert sorted(received) == sorted(expected)
    assert all(str(number) in tokenizer.decode(r.token_ids.tolist()) for number, r in enumerate(rollouts))


def test_a_client_that_leaves_a_stream_ends_its_request_on_the_server_and_the_next_is_exact(client, tokenizer):
    async def run():
        received = watched(client)
        prompt, writer = prompt_of(tokenizer)
        long = Sampling(900, 1.0, ignore_eos=True)
        made = Conversation(client, prompt, writer, long, max_turns=TURNS, max_tokens=950)
        async with client, serve(made) as address:
            own = AsyncOpenAI(base_url=address.url, api_key=address.key)
            stream = await own.chat.completions.create(model="policy", messages=ASKED, stream=True)
            pieces = 0
            async for _ in stream:
                pieces += 1
                if pieces == 20:
                    break
            running = [load["num_running_reqs"] for load in await client.current_loads()]
            await stream.close()
            while any(load["num_running_reqs"] for load in await client.current_loads()):
                await asyncio.sleep(0.02)
            told = await own.chat.completions.create(model="policy", messages=ASKED, max_tokens=5)
            await own.close()
        assert running == [1]  # it was told of while it was sampled
        (rollout,) = made.rollouts
        assert rollout.trained_tokens == told.usage.completion_tokens == 5
        assert len(rollout.routes) == len(rollout.token_ids) - 1
        assert received == before_each_turn(rollout) * 2

    asyncio.run(asyncio.wait_for(run(), 60))
