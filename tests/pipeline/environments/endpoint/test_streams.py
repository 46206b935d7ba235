"""Turns that reach the client while they are sampled."""

from __future__ import annotations

import asyncio
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import APIError, AsyncOpenAI

from pipeline.engine.sampling import Piece
from pipeline.environments.endpoint import listener
from pipeline.environments.endpoint.chat_request import ChatRequest
from pipeline.environments.endpoint.listener import endpoint_metrics
from pipeline.environments.turn_parser import TurnParser
from tests.support.scripted import Scripted, logprob_at
from tests.support.served import ASKED, END, QWEN, TOOL, call_text, served

MORE = {"role": "user", "content": "more"}
THINKS = TurnParser("qwen25", "qwen3")


@pytest.fixture(scope="module", autouse=True)
def loaded():
    THINKS.load()


def client_of(address) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=address.url, api_key=address.key)


def streamed(address, messages, **fields):
    return client_of(address).chat.completions.create(model="policy", messages=messages, stream=True, **fields)


async def heard(address, told):
    """What comes is added to `told`, as it comes."""
    async for piece in await streamed(address, ASKED):
        told.append(piece.choices[0].delta.content)


def put_together(pieces):
    """(message, log-probs) of a stream, as any client does it."""
    message, logprobs = {"role": "assistant", "content": ""}, []
    for piece in pieces:
        for choice in piece.choices:
            message["content"] += choice.delta.content or ""
            if thought := getattr(choice.delta, "reasoning_content", None):
                message["reasoning_content"] = message.get("reasoning_content", "") + thought
            for part in choice.delta.tool_calls or []:
                calls = message.setdefault("tool_calls", [])
                if part.index == len(calls):
                    calls.append({"id": part.id, "type": "function", "function": {"name": part.function.name}})
                function = calls[part.index]["function"]
                function["arguments"] = function.get("arguments", "") + part.function.arguments
            logprobs += choice.logprobs.content if choice.logprobs else []
    return message, logprobs


class Gated(Scripted):
    """Says one more token whenever it is allowed to."""

    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        self.allowed, self.cancelled = asyncio.Semaphore(0), False

    async def between(self):
        try:
            await self.allowed.acquire()
        except asyncio.CancelledError:
            self.cancelled = True
            raise


def test_each_token_is_with_the_client_before_the_next_is_sampled(tokenizer):
    async def run():
        engine = Gated(tokenizer, [f"abcd{END}"])
        async with served(tokenizer, engine=engine) as (_, _, address):
            told = []
            async for piece in await streamed(address, ASKED, logprobs=True):
                choice = piece.choices[0]
                if text := choice.delta.content:
                    told.append((text, [entry.token for entry in choice.logprobs.content]))
                    engine.allowed.release()
                    if len(told) == 4:
                        engine.allowed.release()
            assert told == [(text, [text]) for text in "abcd"]
            assert choice.finish_reason == "stop"

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_client_that_goes_away_in_the_middle_ends_the_sampling_and_no_history_has_what_it_was_not_told(tokenizer):
    """The rule: a request that is cut short leaves nothing, and the next request's messages are the prompt."""

    async def run():
        engine = Gated(tokenizer, [f"abcd{END}", f"two{END}"])
        async with served(tokenizer, engine=engine) as (made, _, address):
            endpoint_metrics()
            stream = await streamed(address, ASKED)
            async for piece in stream:
                if piece.choices[0].delta.content == "a":
                    break
            await stream.close()
            while not engine.cancelled:
                await asyncio.sleep(0.001)
            engine.rest, engine.between = [], Scripted(tokenizer, []).between
            told = [*ASKED, {"role": "assistant", "content": "a"}, MORE]
            message, _ = put_together([piece async for piece in await streamed(address, told)])
            assert message["content"] == "two"
            (rollout,) = made.rollouts
            assert rollout.prompt_ids.tolist() == made.writer.ids(made.writer.render(told)).tolist()
            assert rollout.response_ids[rollout.trained].tolist() == engine.ids(f"two{END}")
            metrics = endpoint_metrics()
            assert (metrics["endpoint/disconnects"], metrics["endpoint/branches_disconnect"]) == (1, 1)

    asyncio.run(asyncio.wait_for(run(), 10))


class Silent(Scripted):
    """Tells of no token before its answer has ended, as a process that is heard of now and then."""

    async def sample(self, *args, on_tokens=None, **named):
        return await super().sample(*args, **named)


SAID = {
    "plain": "one",
    "a call": f"I look.\n{call_text(12)}",
    "two calls": f"{call_text(13)}\n{call_text(14)}",
    "what begins like a call": "1 <tool",
    "a call that is cut": '<tool_call>\n{"name": "look", "argum',
    "a call of nothing": '<tool_call>\n{"name": "lick", "arguments": {}}\n</tool_call>',
    "thinking": "<think>\nhm\n</think>\n\none",
    "thinking and a call": f"<think>\nhm <\n</think>\n\n{call_text(12)}",
    "characters of several tokens": "\u00e9 \U0001f600 \u4e2d",
}


@pytest.mark.parametrize(("kind", "cut"), [(Scripted, 10**6), (Scripted, 3), (Silent, 10**6), (Silent, 4)], ids=str)
@pytest.mark.parametrize("case", SAID)
def test_what_a_client_puts_together_goes_on_in_exact_tokens_however_it_came(case, kind, cut, tokenizer):
    """cut: tokens after which an update of the weights ends a request. Where calls and thinking were told, they are
    those of the whole answer."""
    text = SAID[case]

    async def run():
        engine = kind(tokenizer, [text + END, f"two{END}"], cut)
        async with served(tokenizer, engine=engine, parser=THINKS, tools=[TOOL]) as (made, _, address):
            pieces = [piece async for piece in await streamed(address, ASKED, logprobs=True)]
            message, logprobs = put_together(pieces)
            whole = THINKS.parse(text, [TOOL])
            calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", [])]
            if "cut" not in case:
                assert tuple(calls) == whole.calls
            if "nothing" not in case:  # a stream shows what looks like a call before its function is known
                assert message["content"].strip() == whole.content.strip()
            assert message.get("reasoning_content", "").strip() == (whole.thinking or "").strip()
            before = len(engine.asked[0][0])
            told = [entry.logprob for entry in logprobs]
            assert told == [logprob_at(before + i) for i in range(len(engine.ids(text)))]
            endpoint_metrics()
            answers = [{"role": "tool", "tool_call_id": c["id"], "content": "1"} for c in message.get("tool_calls", [])]
            sent = [*ASKED, message, *(answers or [MORE])]
            if "cut" in case:
                return
            await client_of(address).chat.completions.create(model="policy", messages=sent)
            assert sum(value for name, value in endpoint_metrics().items() if "branches" in name) == 0
            (rollout,) = made.rollouts
            sampled = [engine.ids(said + END) for said in (text, "two")]
            assert rollout.response_ids[rollout.trained].tolist() == list(itertools.chain(*sampled))

    asyncio.run(asyncio.wait_for(run(), 10))


class Loses(Scripted):
    """Says two tokens, and then something else from the start."""

    async def sample(self, token_ids, sampling, *, on_tokens, **named):
        if not self.asked:
            for i, token in enumerate(self.ids("xy")):
                on_tokens(Piece(len(token_ids) + i, (token,), (-1.0,)))
        return await super().sample(token_ids, sampling, on_tokens=on_tokens, **named)


def test_a_stream_whose_server_is_lost_ends_with_an_error_and_the_next_request_begins_a_branch(tokenizer):
    async def run():
        engine = Loses(tokenizer, [f"one{END}", f"two{END}"])
        async with served(tokenizer, engine=engine) as (made, _, address):
            endpoint_metrics()
            told = []
            with pytest.raises(APIError, match="was lost"):
                await heard(address, told)
            assert told == ["", "x", "y"]
            said = await client_of(address).chat.completions.create(model="policy", messages=ASKED)
            assert said.choices[0].message.content == "two"
            metrics = endpoint_metrics()
            counted = [metrics[f"endpoint/{name}"] for name in ("streams_lost", "branches_lost", "disconnects")]
            assert counted == [1, 1, 0]
            assert (made.turns, made.turn_rewards([0.5])) == (1, (0.0, 0.5))  # "one" reached nobody
            assert "one" not in tokenizer.decode(made.rollouts[-1].token_ids.tolist())

    asyncio.run(asyncio.wait_for(run(), 10))


@pytest.mark.parametrize("begun", [False, True])
def test_an_engine_that_fails_has_a_status_before_the_first_token_and_an_error_behind_it(begun, tokenizer):
    class Dies(Scripted):
        async def sample(self, token_ids, sampling, *, on_tokens, **_):
            if begun:
                on_tokens(Piece(len(token_ids), (self.ids("x")[0],), (-1.0,)))
                await asyncio.sleep(0.01)
            raise RuntimeError("out of memory")

    async def run():
        async with served(tokenizer, engine=Dies(tokenizer, [])) as (made, _, address):
            with pytest.raises(APIError, match="out of memory") as caught:
                await heard(address, [])
            assert hasattr(caught.value, "status_code") is not begun
            assert caught.value.code == "engine_failed"
            assert made.error is not None

    asyncio.run(asyncio.wait_for(run(), 10))


fragments = st.lists(
    st.sampled_from([
        "a", " ", "\n", "<", "<tool_call>", "</tool_call>", "<tool_call>\n", "\n</tool_call>", "<think>", "</think>",
        '{"name": "look", "arguments": {"x": 1}}', call_text(3), '{"name"', "}", "\u4e2d",
    ]),
    max_size=7,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(fragments, st.integers(1, 9), st.booleans())
def test_no_text_makes_a_stream_tell_less_than_it_ends_with(pieces, size, thinks):
    """What was told at any time stands at the beginning of what is told in the end, and no content is lost for good
    where no call was found."""
    text, parser = "".join(pieces), THINKS if thinks else QWEN
    stream = parser.stream([TOOL])
    told = [stream.take(text[i : i + size]) for i in range(0, len(text), size)] + [stream.end()]
    said = stream.said
    assert "".join(f.content for f in told) == said.content
    assert "".join(f.thinking for f in told) == (said.thinking or "")
    arguments = [""] * len(said.calls)
    for fragment in told:
        for place, _, more in fragment.calls:
            arguments[place] += more
    assert arguments == [call[1] for call in said.calls]
    if not thinks and "<" not in text:
        assert said.content == text
    assert np.all([json.loads(a) is not None for a in arguments if a.endswith("}")])


def test_a_turn_whose_last_words_did_not_reach_the_client_is_one_that_nobody_saw(tokenizer):
    """The engine has ended it, the client has gone away: it is no history, and the program gives no reward for it."""

    async def run():
        async with served(tokenizer, [f"one{END}", f"two{END}"]) as (made, _, address):
            conversation = listener._shared().served[address.key]

            async def leave():
                parts = conversation.stream(ChatRequest.read({"model": "policy", "messages": ASKED}))
                await anext(parts)
                while not made.turns:
                    await asyncio.sleep(0.001)
                await asyncio.sleep(0.01)
                await parts.aclose()

            on_its_loop = asyncio.run_coroutine_threadsafe(leave(), listener._shared().loop)
            await asyncio.wrap_future(on_its_loop)
            said = await client_of(address).chat.completions.create(model="policy", messages=ASKED)
            assert said.choices[0].message.content == "two"
            assert (made.turns, made.turn_rewards([0.5])) == (1, (0.0, 0.5))
            assert "one" not in tokenizer.decode(made.rollouts[-1].token_ids.tolist())

    asyncio.run(asyncio.wait_for(run(), 10))
