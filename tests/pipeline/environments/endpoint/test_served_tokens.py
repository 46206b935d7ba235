"""Conversations over HTTP on both sides: what a real server received is what is trained on."""

from __future__ import annotations

import asyncio

import numpy as np
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


def test_ids_of_conversations_that_a_client_leads_are_those_that_the_server_received(client, tokenizer):
    async def lead(number):
        prompt, writer = prompt_of(tokenizer)
        sampling = Sampling(12, 1.0, stop_token_ids=(1,))
        made = Conversation(client, prompt, writer, sampling, max_turns=TURNS, max_tokens=800)
        async with serve(made) as address:
            own, messages = AsyncOpenAI(base_url=address.url, api_key=address.key), list(ASKED)
            tokens = 0
            for turn in range(TURNS):
                answer = await own.chat.completions.create(model="policy", messages=messages)
                tokens += answer.usage.completion_tokens
                messages += [
                    answer.choices[0].message.model_dump(),
                    {"role": "tool", "tool_call_id": f"f{turn}", "content": f"{number} {turn}"},
                ]
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
