"""Clients that are not ours, tools and streams, by SGLang's own parsers."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
from openai import AsyncOpenAI

from pipeline.environments.turn_parser import TurnParser
from tests.support.scripted import logprob_at
from tests.support.served import ASKED, END, QWEN, TOOL, body, call_text, served

SAID = [f"I look.\n{call_text(12)}{END}", f"{call_text(13)}\n{call_text(14)}{END}", f"it is 27{END}"]
STRICT = TOOL | {"function": TOOL["function"] | {"strict": True}}
"""As that package wants it before it puts a stream together."""


@pytest.fixture(scope="module", autouse=True)
def loaded():
    TurnParser("qwen25", "qwen3").load()


class WithOpenAI:
    """The openai package, whole answers."""

    def __init__(self, address):
        self.client = AsyncOpenAI(base_url=address.url, api_key=address.key)

    async def turn(self, messages):
        answer = await self.client.chat.completions.create(
            model="policy", messages=messages, tools=[TOOL], logprobs=True
        )
        (choice,) = answer.choices
        logprobs = [entry.logprob for entry in choice.logprobs.content]
        return choice.message.model_dump(exclude_none=True), choice.finish_reason, logprobs, answer.usage


class StreamedOpenAI(WithOpenAI):
    """The openai package, its own accumulation of a stream."""

    async def turn(self, messages):
        async with self.client.chat.completions.stream(
            model="policy", messages=messages, tools=[STRICT], logprobs=True, stream_options={"include_usage": True}
        ) as stream:
            answer = await stream.get_final_completion()
        (choice,) = answer.choices
        logprobs = [entry.logprob for entry in choice.logprobs.content]
        message = choice.message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"})
        for call in message.get("tool_calls") or []:
            call.pop("index", None)
            call["function"].pop("parsed_arguments", None)
        return message, choice.finish_reason, logprobs, answer.usage


class WithCurl:
    """curl, pieces of a stream put together by hand."""

    def __init__(self, address):
        self.address = address

    async def turn(self, messages):
        sent = body(messages, tools=[TOOL], logprobs=True, stream=True, stream_options={"include_usage": True})
        process = await asyncio.create_subprocess_exec(
            "curl", "-sS", "-N", "--fail-with-body", f"{self.address.url}/chat/completions",
            "-H", f"Authorization: Bearer {self.address.key}", "-H", "Content-Type: application/json", "-d", "@-",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        printed, _ = await process.communicate(sent)
        assert process.returncode == 0, printed
        lines = [line.removeprefix("data: ") for line in printed.decode().splitlines() if line]
        assert lines.pop() == "[DONE]"
        pieces = [json.loads(line) for line in lines]
        choices = [choice for piece in pieces for choice in piece["choices"]]
        message, logprobs = {"role": "assistant", "content": ""}, []
        for choice in choices:
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            logprobs += [entry["logprob"] for entry in (choice["logprobs"] or {}).get("content", ())]
            for part in delta.get("tool_calls") or []:
                calls = message.setdefault("tool_calls", [])
                if part["index"] == len(calls):
                    calls.append({"id": part["id"], "type": "function", "function": dict(part["function"])})
                else:
                    calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
        usage = type("Usage", (), pieces[-1]["usage"])
        return message, choices[-1]["finish_reason"], logprobs, usage


@pytest.mark.parametrize("kind", [WithOpenAI, StreamedOpenAI, WithCurl])
def test_a_client_leads_a_conversation_with_tools_and_each_request_goes_on_in_exact_tokens(kind, tokenizer):
    async def run():
        async with served(tokenizer, SAID, parser=QWEN, tools=[TOOL]) as (made, engine, address):
            client, messages, reasons = kind(address), list(ASKED), []
            while reasons[-1:] != ["stop"]:
                message, reason, logprobs, usage = await client.turn(messages)
                reasons.append(reason)
                messages.append(message)
                before = len(engine.asked[-1][0])
                shown = len(engine.ids(SAID[len(reasons) - 1])) - 1
                assert logprobs == [logprob_at(before + i) for i in range(shown)]
                assert usage.prompt_tokens == before
                for call in message.get("tool_calls") or []:
                    x = json.loads(call["function"]["arguments"])["x"]
                    messages.append({"role": "tool", "tool_call_id": call["id"], "content": str(x)})
            return made, engine, messages, reasons

    made, engine, messages, reasons = asyncio.run(run())
    assert reasons == ["tool_calls", "tool_calls", "stop"]
    assert [m["content"] for m in messages if m["role"] == "tool"] == ["12", "13", "14"]
    assert messages[1]["content"].strip() == "I look."
    assert messages[-1]["content"] == "it is 27"
    (rollout,) = made.rollouts
    sampled = [engine.ids(text) for text in SAID]
    assert np.array_equal(rollout.response_ids[rollout.trained], np.concatenate(sampled))
    for (asked, _), said, (then, _) in zip(engine.asked, sampled, engine.asked[1:], strict=False):
        assert np.array_equal(then[: len(asked) + len(said)], np.concatenate([asked, said]))
    calls = [call for m in made.messages for call in m.get("tool_calls") or []]
    assert [call["function"]["arguments"] for call in calls] == [{"x": 12}, {"x": 13}, {"x": 14}]
    assert len({call["id"] for call in calls}) == 3
    told = [[(name, json.loads(arguments)["x"], result) for name, arguments, result in turn] for turn in made.calls]
    assert told == [[("look", 12, "12")], [("look", 13, "13"), ("look", 14, "14")], []]


def test_without_a_choice_of_tools_what_looks_like_a_call_is_text(tokenizer):
    async def run():
        async with served(tokenizer, SAID, parser=QWEN) as (_, _, address):
            client = AsyncOpenAI(base_url=address.url, api_key=address.key)
            said = await client.chat.completions.create(
                model="policy", messages=ASKED, tools=[TOOL], tool_choice="none"
            )
            assert said.choices[0].message.tool_calls is None
            assert said.choices[0].message.content == SAID[0].removesuffix(END)

    asyncio.run(run())


def test_tools_that_change_begin_a_branch_whose_prompt_has_them(tokenizer):
    async def run():
        async with served(tokenizer, [f"one{END}", f"two{END}"], parser=QWEN) as (made, _, address):
            client = AsyncOpenAI(base_url=address.url, api_key=address.key)
            first = await client.chat.completions.create(model="policy", messages=ASKED)
            messages = [*ASKED, first.choices[0].message, {"role": "user", "content": "more"}]
            await client.chat.completions.create(model="policy", messages=messages, tools=[TOOL])
            texts = [tokenizer.decode(rollout.prompt_ids.tolist()) for rollout in made.rollouts]
            assert ["look something up" in text for text in texts] == [False, True]

    asyncio.run(run())


def test_thinking_is_a_field_of_its_own_and_need_not_come_back(tokenizer):
    async def run():
        said = [f"<think>\nhm\n</think>\n\none{END}", f"two{END}"]
        async with served(tokenizer, said, parser=TurnParser(thinking="qwen3")) as (made, _, address):
            client = AsyncOpenAI(base_url=address.url, api_key=address.key)
            first = (await client.chat.completions.create(model="policy", messages=ASKED)).choices[0].message
            assert (first.reasoning_content.strip(), first.content.strip()) == ("hm", "one")
            assert made.messages[-1]["reasoning_content"] == first.reasoning_content
            messages = [*ASKED, {"role": "assistant", "content": first.content}, {"role": "user", "content": "more"}]
            await client.chat.completions.create(model="policy", messages=messages)
            assert len(made.rollouts) == 1

    asyncio.run(run())
