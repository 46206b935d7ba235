from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.request

import aiohttp
import numpy as np
import pytest
from openai import AsyncOpenAI, BadRequestError, InternalServerError

from pipeline.engine.control import UnreachableError
from pipeline.environments.endpoint import listener, serve
from pipeline.environments.endpoint.listener import endpoint_metrics
from tests.support.served import ASKED, END, TOOL, body, post, served, talk_of

MORE = {"role": "user", "content": "more"}


def openai_of(address, **options) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=address.url, api_key=address.key, **options)


REFUSED = {
    "wrong key": ({"key": "sk-wrong", "data": body()}, 401, "invalid_api_key", None),
    "unknown path": ({"path": "/embeddings", "data": body()}, 404, "unknown_url", None),
    "no such model": ({"method": "GET", "path": "/models/gpt-9"}, 404, "model_not_found", None),
    "wrong method": ({"method": "GET", "data": None}, 405, "method_not_allowed", None),
    "oversized": ({"data": b" " * (listener.LARGEST_BODY + 1)}, 413, "request_too_large", None),
    "no JSON": ({"data": b"{"}, 400, "invalid_json", None),
    "brackets without end": ({"data": b"[" * 99999}, 400, "invalid_json", None),
    "half of a character": ({"data": body([{"role": "user", "content": "\ud83d"}])}, 400, "template_refused", None),
    "no object": ({"data": b"[]"}, 400, "invalid_json", None),
    "unknown field": ({"data": body(colour="red")}, 400, "unknown_parameter", "colour"),
    "unknown field of a message": (
        {"data": body([{"role": "user", "content": "a", "colour": 1}])},
        400,
        "unknown_parameter",
        "messages[0].colour",
    ),
    "no messages": ({"data": b'{"model": "policy", "messages": []}'}, 400, "invalid_value", "messages"),
    "an image": (
        {"data": body([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}])},
        400,
        None,
        None,
    ),
    "two answers": ({"data": body(n=2)}, 400, "invalid_value", "n"),
    "a stop": ({"data": body(stop=["a"])}, 400, "unsupported_value", "stop"),
    "another temperature": ({"data": body(temperature=0.2)}, 400, "unsupported_value", "temperature"),
    "another top_p": ({"data": body(top_p=0.5)}, 400, "unsupported_value", "top_p"),
    "a seed": ({"data": body(seed=1)}, 400, "unsupported_value", "seed"),
    "another model": ({"data": body(model="gpt-9")}, 404, "model_not_found", "model"),
    "a forced call": ({"data": body(tools=[TOOL], tool_choice="required")}, 400, "invalid_value", "tool_choice"),
    "tools without a parser": ({"data": body(tools=[TOOL])}, 400, "unsupported_value", "tools"),
    "two limits": ({"data": body(max_tokens=3, max_completion_tokens=4)}, 400, "invalid_value", "max_tokens"),
    "a role that is none": ({"data": body([{"role": "robot", "content": "a"}])}, 400, "invalid_value", None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_answered_is_refused_in_the_standards_form_and_changes_nothing(case, tokenizer):
    request, status, code, param = REFUSED[case]

    async def run():
        async with served(tokenizer, [f"answer{END}"]) as (made, engine, address):
            found, said = await post(address, **{"data": None} | request)
            assert found == status
            assert set(said) == {"error"}
            assert set(said["error"]) == {"message", "type", "param", "code"}
            assert code in (None, said["error"]["code"])
            assert param in (None, said["error"]["param"])
            assert said["error"]["message"]
            assert (engine.asked, made.messages) == ([], ASKED)
            assert (await post(address, body()))[0] == 200

    asyncio.run(run())


def test_the_model_is_told_of_and_the_key_may_come_behind_any_spelling_of_bearer(tokenizer):
    async def run():
        async with served(tokenizer) as (_, _, address), aiohttp.ClientSession() as session:
            assert (await openai_of(address).models.retrieve("policy")).id == "policy"
            for said in ("bearer {}", "BEARER  {}", "{}"):
                headers = {"Authorization": said.format(address.key)}
                async with session.get(address.url + "/models", headers=headers) as answer:
                    assert answer.status == 200

    asyncio.run(run())


def test_a_body_that_is_not_of_its_encoding_is_the_clients_mistake(tokenizer):
    async def run():
        async with served(tokenizer, [f"answer{END}"]) as (_, _, address):
            headers = {"Authorization": f"Bearer {address.key}", "Content-Encoding": "gzip"}
            async with (
                aiohttp.ClientSession() as session,
                session.post(address.url + "/chat/completions", data=body(), headers=headers) as answer,
            ):
                assert (answer.status, (await answer.json())["error"]["code"]) == (400, "invalid_json")
            assert (await post(address, body()))[0] == 200

    asyncio.run(run())


def test_fields_of_a_providers_books_and_those_that_say_what_the_run_does_are_taken(tokenizer):
    async def run():
        async with served(tokenizer, [f"answer{END}"], temperature=0.7) as (_, _, address):
            taken = {"user": "me", "metadata": {"a": "b"}, "store": False, "temperature": 0.7, "top_p": 1, "n": 1}
            fields = taken | {"presence_penalty": 0, "response_format": {"type": "text"}, "stop": []}
            status, said = await post(address, body(**fields))
            assert (status, said["choices"][0]["message"]["content"]) == (200, "answer")

    asyncio.run(run())


def test_a_key_ends_with_its_conversation_and_opens_no_other(tokenizer):
    async def run():
        async with served(tokenizer, [f"one{END}"]) as (_, _, first):
            async with served(tokenizer, [f"two{END}"]) as (_, _, second):
                assert first.url == second.url
                said = [(await post(a, body()))[1]["choices"][0]["message"]["content"] for a in (first, second)]
                assert said == ["one", "two"]
            assert (await post(second, body()))[0] == 401
            assert (await post(first, None, path="/models", method="GET"))[1]["data"][0]["id"] == "policy"

    asyncio.run(run())


def test_two_hundred_conversations_at_once_half_of_them_in_streams_lose_nothing(tokenizer):
    def said(text):
        if not text.startswith("data: "):
            return json.loads(text)["choices"][0]["message"]
        pieces = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
        return {"role": "assistant", "content": "".join(p["choices"][0]["delta"].get("content", "") for p in pieces)}

    async def lead(number, session):
        async with served(tokenizer, [f"{number} {t}{END}" for t in range(3)]) as (made, engine, address):
            messages = list(ASKED)
            headers = {"Authorization": f"Bearer {address.key}"}
            for turn in range(3):
                data = body(messages, stream=number % 2 == 1)
                async with session.post(address.url + "/chat/completions", data=data, headers=headers) as answer:
                    message = said(await answer.text())
                assert message["content"] == f"{number} {turn}"
                messages += [message, MORE]
            (rollout,) = made.rollouts
            sampled = np.concatenate([engine.ids(f"{number} {t}{END}") for t in range(3)])
            assert np.array_equal(rollout.response_ids[rollout.trained], sampled)

    async def run():
        endpoint_metrics()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(lead(number, session) for number in range(200)))
        metrics = endpoint_metrics()
        assert (metrics["endpoint/conversations"], metrics["endpoint/requests"]) == (200, 600)
        assert sum(value for name, value in metrics.items() if "branches" in name or "refused" in name) == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("why", "change"),
    [
        ("history", lambda said: [*said[:-1], {"role": "assistant", "content": "other"}, MORE]),
        ("history", lambda said: [*said, MORE, {"role": "assistant", "content": "other"}, MORE]),
        ("history", lambda said: list(said)),
        ("history", lambda said: [{"role": "system", "content": "summary"}, MORE]),
        (None, lambda said: [*said, MORE]),
        (None, lambda said: [said[0] | {"content": [{"type": "text", "text": "question"}]}, said[1], MORE]),
    ],
)
def test_messages_that_do_not_go_on_begin_a_branch_that_is_counted_and_both_are_trained_on(why, change, tokenizer):
    async def run():
        async with served(tokenizer, [f"one{END}", f"two{END}"]) as (made, engine, address):
            first = (await post(address, body()))[1]["choices"][0]["message"]
            endpoint_metrics()
            sent = change([*ASKED, first])
            assert (await post(address, body(sent)))[0] == 200
            metrics = endpoint_metrics()
            counted = {name for name, value in metrics.items() if "branches" in name and value}
            assert counted == (set() if why is None else {f"endpoint/branches_{why}"})
            assert len(made.rollouts) == (1 if why is None else 2)
            trained = np.concatenate([r.response_ids[r.trained] for r in made.rollouts])
            assert np.array_equal(trained, np.concatenate([engine.ids(f"{t}{END}") for t in ("one", "two")]))
            if why is not None:
                assert (
                    made.rollouts[1].prompt_ids.tolist()
                    == made.writer.ids(made.writer.render(made.messages[:-1])).tolist()
                )

    asyncio.run(run())


def test_an_agent_that_begins_with_messages_of_its_own_opens_the_conversation_with_them(tokenizer):
    async def run():
        async with served(tokenizer, [f"one{END}"]) as (made, _, address):
            endpoint_metrics()
            own = [{"role": "system", "content": "be kind"}, *ASKED]
            assert (await post(address, body(own)))[0] == 200
            assert endpoint_metrics()["endpoint/branches_opening"] == 1
            assert "be kind" in tokenizer.decode(made.rollouts[0].prompt_ids.tolist())

    asyncio.run(run())


class Slow:
    """An engine whose first answer never comes."""

    def __init__(self, inner):
        self.inner, self.began, self.cancelled = inner, asyncio.Event(), False

    async def sample(self, *args, **named):
        if not self.began.is_set():
            self.began.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled = True
                raise
        return await self.inner.sample(*args, **named)


def test_a_client_that_goes_away_ends_the_sampling_and_the_next_request_begins_a_branch(tokenizer):
    async def run():
        inner = talk_of(tokenizer, [f"one{END}"])[1]
        engine = Slow(inner)
        async with served(tokenizer, engine=engine) as (made, _, address):
            endpoint_metrics()
            leaving = asyncio.ensure_future(post(address, body()))
            await asyncio.wait_for(engine.began.wait(), 10)
            leaving.cancel()
            status, said = await post(address, body())
            assert (status, said["choices"][0]["message"]["content"]) == (200, "one")
            assert engine.cancelled
            metrics = endpoint_metrics()
            assert (metrics["endpoint/disconnects"], metrics["endpoint/branches_disconnect"]) == (1, 1)
            assert [m["role"] for m in made.messages] == ["user", "assistant"]
            (rollout,) = made.rollouts
            assert rollout.trained_tokens == len(inner.ids(f"one{END}"))

    asyncio.run(run())


def test_a_second_request_on_one_conversation_waits_for_the_first(tokenizer):
    async def run():
        async with served(tokenizer, [f"one{END}", f"two{END}"]) as (made, _, address):
            answers = await asyncio.gather(*(post(address, body()) for _ in range(2)))
            assert sorted(said["choices"][0]["message"]["content"] for _, said in answers) == ["one", "two"]
            assert len(made.rollouts) == 2

    asyncio.run(run())


def test_a_request_in_flight_is_told_that_its_conversation_has_ended(tokenizer):
    async def run():
        engine = Slow(None)
        async with served(tokenizer, engine=engine) as (_, _, address):
            asking = asyncio.ensure_future(post(address, body()))
            await asyncio.wait_for(engine.began.wait(), 10)
        status, said = await asking
        assert (status, said["error"]["code"]) == (401, "invalid_api_key")
        assert engine.cancelled

    asyncio.run(run())


@pytest.mark.parametrize("limits", [{"max_turns": 1}, {"max_tokens": 12}])
def test_a_limit_is_told_as_a_context_that_is_full(limits, tokenizer):
    async def run():
        async with served(tokenizer, [f"one{END}"] * 2, **limits) as (made, _, address):
            client = openai_of(address)
            first = await client.chat.completions.create(model=address.model, messages=ASKED)
            with pytest.raises(BadRequestError) as caught:
                await client.chat.completions.create(
                    model=address.model, messages=[*ASKED, first.choices[0].message.model_dump(), MORE]
                )
            assert caught.value.code == "context_length_exceeded"
            assert f"environment.{next(iter(limits))}" in caught.value.message
            assert made.cut == next(iter(limits)).removeprefix("max_")

    asyncio.run(run())


def test_an_answer_has_no_more_tokens_than_the_client_asks_for(tokenizer):
    async def run():
        async with served(tokenizer, ["a long answer"]) as (_, _, address):
            said = await openai_of(address).chat.completions.create(model="policy", messages=ASKED, max_tokens=4)
            assert (said.choices[0].finish_reason, said.usage.completion_tokens) == ("length", 4)
            assert said.choices[0].message.content == "a lo"

    asyncio.run(run())


def test_an_engine_that_dies_is_told_to_the_client_once_and_to_the_run(tokenizer):
    class Dead:
        asked = 0

        async def sample(self, *_, **__):
            Dead.asked += 1
            raise UnreachableError("the server is gone")

    async def run():
        async with served(tokenizer, engine=Dead()) as (made, _, address):
            with pytest.raises(InternalServerError, match="the server is gone") as caught:
                await openai_of(address).chat.completions.create(model="policy", messages=ASKED)
            assert caught.value.status_code == 503
            assert isinstance(made.error, UnreachableError)
            assert Dead.asked == 1

    asyncio.run(run())


def test_a_mistake_of_the_server_ends_the_attempt(tokenizer):
    class Broken:
        tools = thinking = None

        def parse(self, *_):
            raise RuntimeError("a mistake")

    async def run():
        async with served(tokenizer, [f"one{END}"], parser=Broken()) as (_, _, address):
            status, said = await post(address, body())
            assert (status, said["error"]["type"]) == (500, "server_error")

    with pytest.raises(RuntimeError, match="a mistake"):
        asyncio.run(run())


def test_a_program_that_blocks_its_environments_event_loop_is_answered(tokenizer):
    """Its requests go through neither that loop nor the one of the servers' connections, which go on meanwhile."""

    async def blocking(made):
        async with serve(made) as address:
            time.sleep(0.1)
            asking = urllib.request.Request(
                address.url + "/chat/completions", body(), {"Authorization": f"Bearer {address.key}"}
            )
            with urllib.request.urlopen(asking, timeout=10) as answer:
                return json.load(answer)["choices"][0]["message"]["content"]

    async def run():
        made, _ = talk_of(tokenizer, [f"one{END}"])
        said = []
        thread = threading.Thread(target=lambda: said.append(asyncio.run(blocking(made))))
        thread.start()
        await asyncio.to_thread(thread.join)
        assert said == ["one"]

    asyncio.run(run())
