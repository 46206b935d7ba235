"""The other forms, /v1/responses and /v1/messages, as the unchanged clients of the openai and anthropic packages speak
them: the same conversations below."""

from __future__ import annotations

import asyncio
import contextlib
import json
from types import MappingProxyType

import numpy as np
import pytest
from anthropic import APIStatusError as AnthropicError
from anthropic import AsyncAnthropic
from openai import APIStatusError, AsyncOpenAI

from pipeline.engine.sampling import Piece
from pipeline.environments.endpoint import listener
from pipeline.environments.endpoint.listener import endpoint_metrics
from pipeline.environments.turn_parser import TurnParser
from tests.support.scripted import Scripted, logprob_at
from tests.support.served import ASKED, END, TOOL, call_text, post, served

THINKS = TurnParser("qwen25", "qwen3")
SAID = [
    f"<think>\nhm\n</think>\n\nI look.\n{call_text(12)}{END}",
    f"{call_text(13)}\n{call_text(14)}{END}",
    f"it is 27{END}",
]
FUNCTION = TOOL["function"]


@pytest.fixture(scope="module", autouse=True)
def loaded():
    THINKS.load()


class Broke(Exception):
    """A stream of responses ended with an error; that client has no exception for it."""


class Responses:
    """The openai package's responses.create. history: as this form has it."""

    tool = MappingProxyType({"type": "function", **FUNCTION})
    limit = "max_output_tokens"
    cut = "incomplete"
    error = APIStatusError

    def __init__(self, address):
        self.client = AsyncOpenAI(base_url=address.url, api_key=address.key)
        self.history = list(ASKED)

    async def answer(self, **fields):
        return await self.client.responses.create(model="policy", input=self.history, **fields)

    async def turn(self):
        """(text, thinking, [(id, function, arguments)], why it ended, tokens before, log-probs); the history has it."""
        answer = await self.answer(tools=[dict(self.tool)], include=["message.output_text.logprobs"])
        self.history += [item.model_dump(exclude_none=True) for item in answer.output]
        parts = [part for item in answer.output if item.type == "message" for part in item.content]
        thoughts = [part.text for item in answer.output if item.type == "reasoning" for part in item.content]
        calls = [(i.call_id, i.name, json.loads(i.arguments)) for i in answer.output if i.type == "function_call"]
        logprobs = [entry.logprob for part in parts for entry in part.logprobs]
        text = "".join(part.text for part in parts)
        return text, "".join(thoughts), calls, answer.status, answer.usage.input_tokens, logprobs

    def told(self, results):
        self.history += [
            {"type": "function_call_output", "call_id": call_id, "output": text} for call_id, text in results
        ]


class StreamedResponses(Responses):
    """As a stream, whose events are checked."""

    async def answer(self, **fields):
        events = [e async for e in await super().answer(stream=True, **fields)]
        if events[-1].type == "error":
            raise Broke(events[-1].message)
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
        answer = events[-1].response
        for index, item in enumerate(answer.output):
            own = [event for event in events if getattr(event, "output_index", None) == index]
            assert (own[0].type, own[-1].type) == ("response.output_item.added", "response.output_item.done")
            assert own[-1].item == item
            deltas = "".join(event.delta for event in own if event.type.endswith(".delta"))
            assert deltas == (item.arguments if item.type == "function_call" else item.content[0].text)
        return answer


class Messages:
    """The anthropic package's messages.create."""

    tool = MappingProxyType(
        {"name": "look", "description": FUNCTION["description"], "input_schema": FUNCTION["parameters"]}
    )
    limit = "max_tokens"
    cut = "max_tokens"
    error = AnthropicError

    def __init__(self, address):
        self.client = AsyncAnthropic(base_url=address.url.removesuffix("/v1"), api_key=address.key)
        self.history = list(ASKED)

    async def answer(self, **fields):
        return await self.client.messages.create(**self.named(fields))

    def named(self, fields):
        return {"model": "policy", "messages": self.history, "max_tokens": 400} | fields

    async def turn(self):
        answer = await self.answer(tools=[dict(self.tool)])
        self.history.append({"role": "assistant", "content": [block.model_dump() for block in answer.content]})
        text = "".join(block.text for block in answer.content if block.type == "text")
        thoughts = "".join(block.thinking for block in answer.content if block.type == "thinking")
        calls = [(block.id, block.name, block.input) for block in answer.content if block.type == "tool_use"]
        return text, thoughts, calls, answer.stop_reason, answer.usage.input_tokens, None

    def told(self, results):
        blocks = [{"type": "tool_result", "tool_use_id": call_id, "content": text} for call_id, text in results]
        self.history.append({"role": "user", "content": blocks})


class StreamedMessages(Messages):
    """The package's own accumulation of a stream."""

    async def answer(self, **fields):
        async with self.client.messages.stream(**self.named(fields)) as stream:
            texts = "".join([text async for text in stream.text_stream])
            answer = await stream.get_final_message()
        assert texts == "".join(block.text for block in answer.content if block.type == "text")
        return answer


KINDS = [Responses, StreamedResponses, Messages, StreamedMessages]


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_of_the_form_leads_a_conversation_with_tools_and_thinking_in_exact_tokens(kind, tokenizer):
    async def run():
        async with served(tokenizer, SAID, parser=THINKS, tools=[TOOL]) as (made, engine, address):
            endpoint_metrics()
            client, ended, seen = kind(address), [], []
            while len(ended) < len(SAID):
                text, thoughts, calls, why, before, logprobs = await client.turn()
                ended.append(why)
                seen.append((text.strip(), thoughts.strip(), [call[1:] for call in calls]))
                assert before == len(engine.asked[-1][0])
                own = [logprob_at(before + i) for i in range(len(engine.ids(SAID[len(ended) - 1])))]
                assert logprobs is None or logprobs == [one for one in own if one in logprobs]  # some of them, in order
                if calls:
                    client.told([(call_id, str(found["x"])) for call_id, _, found in calls])
            return made, engine, ended, seen, endpoint_metrics()

    made, engine, ended, seen, metrics = asyncio.run(run())
    assert seen[0] == ("I look.", "hm", [("look", {"x": 12})])
    assert seen[1:] == [("", "", [("look", {"x": 13}), ("look", {"x": 14})]), ("it is 27", "", [])]
    assert ended in (["completed"] * 3, ["tool_use", "tool_use", "end_turn"])
    assert sum(value for name, value in metrics.items() if "branches" in name) == 0
    (rollout,) = made.rollouts
    assert np.array_equal(rollout.response_ids[rollout.trained], np.concatenate([engine.ids(t) for t in SAID]))
    assert [m["content"] for m in made.messages if m["role"] == "tool"] == ["12", "13", "14"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_is_cut_says_so_and_a_system_prompt_begins_with_it(kind, tokenizer):
    async def run():
        async with served(tokenizer, ["a long answer"]) as (made, _, address):
            system = {"instructions": "be kind"} if kind.limit == "max_output_tokens" else {"system": "be kind"}
            answer = await kind(address).answer(**{kind.limit: 4}, **system)
            assert kind.cut in (getattr(answer, "status", None), getattr(answer, "stop_reason", None))
            assert "be kind" in tokenizer.decode(made.rollouts[0].prompt_ids.tolist())
            assert made.messages[-1]["content"] == "a lo"

    asyncio.run(run())


def asked(path, **fields):
    own = {"input": "question"} if path == "/responses" else {"messages": ASKED, "max_tokens": 9}
    return json.dumps({"model": "policy", **own, **fields}).encode()


REFUSED = {
    "wrong key": ({"key": "sk-wrong"}, {}, 401),
    "oversized": ({"data": b" " * (listener.LARGEST_BODY + 1)}, {}, 413),
    "no JSON": ({"data": b"{"}, {}, 400),
    "no object": ({"data": b"[]"}, {}, 400),
    "unknown field": ({}, {"colour": "red"}, 400),
    "another model": ({}, {"model": "gpt-9"}, 404),
    "another temperature": ({}, {"temperature": 0.2}, 400),
    "tools without a parser": ({}, {"tools": [dict(Responses.tool)]}, 400),
    "wrong method": ({"method": "GET", "data": None}, {}, 405),
}
KIND_OF = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}


@pytest.mark.parametrize("path", ["/responses", "/messages"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_answered_is_refused_in_the_form_of_the_path_and_changes_nothing(case, path, tokenizer):
    request, fields, status = REFUSED[case]
    if path == "/messages" and "tools" in fields:
        fields = {"tools": [dict(Messages.tool)]}

    async def run():
        async with served(tokenizer, [f"answer{END}"]) as (made, engine, address):
            found, said = await post(address, **{"data": asked(path, **fields), "path": path} | request)
            assert found == status
            if path == "/messages":
                assert said["type"] == "error"
                assert said["error"]["type"] == KIND_OF.get(status, "invalid_request_error")
            else:
                assert set(said["error"]) == {"message", "type", "param", "code"}
            assert case != "unknown field" or "colour" in said["error"]["message"]
            assert (engine.asked, made.messages) == ([], ASKED)
            assert (await post(address, asked(path), path=path))[0] == 200

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "fields", "where"),
    [
        ("/responses", {"input": [{"role": "user", "content": "a", "colour": 1}]}, "input[0].colour"),
        ("/responses", {"input": [{"type": "function_call", "call_id": "c"}]}, "input[0].name"),
        ("/responses", {"previous_response_id": "resp_1"}, "previous_response_id"),
        ("/messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
         "messages[0].content[0].text"),
        ("/messages", {"tool_choice": {"type": "any"}}, "tool_choice.type"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_by_the_name_of_its_field(path, fields, where, tokenizer):
    async def run():
        async with served(tokenizer) as (_, _, address):
            status, said = await post(address, asked(path, **fields), path=path)
            assert (status, where in said["error"]["message"]) == (400, True), said

    asyncio.run(run())


class Dies(Scripted):
    async def sample(self, token_ids, sampling, *, on_tokens, **_):
        on_tokens(Piece(len(token_ids), tuple(self.ids("x")), (-1.0,)))
        await asyncio.sleep(0.01)
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("kind", [StreamedResponses, StreamedMessages])
def test_a_stream_that_breaks_ends_with_the_forms_error(kind, tokenizer):
    async def run():
        async with served(tokenizer, engine=Dies(tokenizer, [])) as (_, _, address):
            with pytest.raises((Broke, kind.error), match="out of memory"):
                await kind(address).answer()

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/responses", "/messages"])
def test_a_client_that_goes_away_in_the_middle_ends_the_sampling(path, tokenizer):
    class Waits(Scripted):
        cancelled = False

        async def between(self):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled = True
                raise

    async def run():
        engine = Waits(tokenizer, [f"abc{END}"])
        async with served(tokenizer, engine=engine) as (made, _, address):
            asking = asyncio.ensure_future(post(address, asked(path, stream=True), path=path))
            while not engine.asked:
                await asyncio.sleep(0.001)
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asking
            while not engine.cancelled:
                await asyncio.sleep(0.001)
            assert made.rollouts == ()

    asyncio.run(asyncio.wait_for(run(), 10))
