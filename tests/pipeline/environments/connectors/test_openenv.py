"""Environments of OpenEnv over its WebSocket protocol, at a server that does what servers should not.

A public environment and OpenEnv's own server are in tests/end_to_end/test_connectors.py."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from pathlib import Path

import pytest
from aiohttp import web

from pipeline.config.rewards.conversations import EnvironmentConfig
from pipeline.engine.sampling import Sampling
from pipeline.environments.connectors.openenv import NoAction, OpenEnv, action_of, text_of, with_observation
from pipeline.environments.connectors.peer import ConnectorError
from pipeline.environments.loading import environment_of
from pipeline.environments.running import Environments
from tests.support.scripted import Scripted
from tests.support.served import END, prompt_of

FUNCTION = "pipeline.environments.connectors.openenv:OpenEnv"
SCHEMA = {"properties": {"message": {"type": "string"}}, "required": ["message"]}


def answer(kind, **data):
    return json.dumps({"type": kind, "data": data})


def observation(text, reward=None, done=False):
    return answer("observation", observation={"text": text, "metadata": {"a": 1}}, reward=reward, done=done)


async def play(request):
    """An echo that counts, is done at "end", and does what the messages say."""
    socket, seed = web.WebSocketResponse(), None
    await socket.prepare(request)
    async for message in socket:
        asked = json.loads(message.data)
        said = asked.get("data", {}).get("message", "")
        if asked["type"] == "reset":
            seed = asked["data"].get("seed")
            await socket.send_str(observation(f"game {seed}"))
        elif asked["type"] == "close" or said == "die":
            break
        elif said == "hang":
            await asyncio.sleep(60)
        else:
            await socket.send_str(
                {
                    "junk": "no JSON",
                    "strange": '{"type": "dance", "data": {}}',
                    "flood": observation("x" * 3_000_000),
                    "boom": answer("error", message="it broke", code="EXECUTION_ERROR"),
                    "full": answer("error", message="too many", code="CAPACITY_REACHED"),
                    "illegal": answer("error", message="no such move", code="VALIDATION_ERROR"),
                    "end": observation("", 2.0, True),
                    "not a number": answer("observation", observation={}, reward=float("nan"), done=True),
                }.get(said, observation(f"{seed} heard {said}", 0.25))
            )
    return socket


@pytest.fixture(scope="module")
def address():
    loop, found, ready = asyncio.new_event_loop(), [], threading.Event()

    async def start():
        application = web.Application()
        application.router.add_get("/schema", lambda _: asyncio.sleep(0, web.json_response({"action": SCHEMA})))
        application.router.add_get("/ws", play)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        found.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        ready.set()

    def run():
        asyncio.set_event_loop(loop)
        loop.run_until_complete(start())
        loop.run_forever()

    threading.Thread(target=run, daemon=True).start()
    assert ready.wait(10)
    yield found[0]
    loop.call_soon_threadsafe(loop.stop)


def played(tokenizer, address, *said, function=FUNCTION, reset=None, options=None, **settings):
    """The episode of a policy that says this."""
    given = {"address": address, "call_timeout_s": 3.0, "largest_message": 1_000_000} | (options or {})
    config = EnvironmentConfig(function=function, options=given, threads=1, max_tokens=3000, **settings)
    prompt, _ = prompt_of(tokenizer, metadata={} if reset is None else {"reset": reset})
    engine = Scripted(tokenizer, [text + END for text in said])

    async def run(environments):
        return await environments.begin(engine, prompt, Sampling(400, 1.0), None).play()

    with Environments(
        config, environment_of(config), tokenizer, [tokenizer.convert_tokens_to_ids(END)]
    ) as environments:
        return asyncio.run(run(environments))


def test_a_conversation_is_a_session_of_its_own_and_each_step_rewards_its_turn(tokenizer, address):
    episode = played(tokenizer, address, "hi", '{"message": "there"}', "end", reset={"seed": 7})
    assert episode.turn_rewards == (0.25, 0.25, 2.0)
    assert episode.verdict.reward == 2.5
    assert episode.note == "3 steps"
    assert len(episode.rollouts) == 1
    text = tokenizer.decode(episode.last.token_ids.tolist())
    assert "question\n\ngame 7" in text
    assert "7 heard hi" in text
    assert "7 heard there" in text
    assert "metadata" not in text


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("die", "went away in step"),
        ("junk", "said what OpenEnv does not have: 'no JSON'"),
        ("strange", "dance"),
        ("flood", "went away in step"),
        ("hang", r"step took more than 3 s \(environment.options.call_timeout_s\)"),
        ("boom", "failed with EXECUTION_ERROR: it broke"),
        ("full", "lower environment.at_once"),
        ("not a number", "not finite"),
    ],
)
def test_what_a_server_does_wrong_is_the_episodes_reason(tokenizer, address, said, why):
    episode = played(tokenizer, address, "hi", said)
    assert episode.verdict.reward is None
    assert why.replace("\\", "") in episode.verdict.what


def test_what_is_no_action_ends_the_conversation_with_its_own_reward_and_a_limit_keeps_what_was_earned(
    tokenizer, address
):
    illegal = played(tokenizer, address, "hi", "illegal", options={"invalid_reward": -1.0})
    assert illegal.turn_rewards == (0.25, -1.0)
    assert "no action: no such move" in illegal.note
    cut = played(tokenizer, address, "hi", "hi", "hi", max_turns=2)
    assert cut.verdict.reward == 0.5
    assert "not done" in cut.note


class Shouting(OpenEnv):
    """Actions and observations of its own."""

    def action(self, text):
        return {"message": text.upper()}

    def observation(self, seen):
        return f"<{text_of(seen)}>"


def test_a_class_of_ones_own_makes_actions_and_texts(tokenizer, address):
    episode = played(tokenizer, address, "hi", max_turns=1, function=f"{__name__}:Shouting")
    assert "<game None>" in tokenizer.decode(episode.last.prompt_ids.tolist())
    two = played(tokenizer, address, "hi", "hi", max_turns=2, function=f"{__name__}:Shouting")
    assert "<None heard HI>" in tokenizer.decode(two.last.token_ids.tolist())


def test_actions_and_observations_by_default():
    numbers = {"properties": {"values": {"type": "array"}}, "required": ["values"]}
    assert action_of('{"values": [1]}', numbers) == {"values": [1]}
    assert action_of('so:\n```json\n{"values": [1]}\n```', numbers) == {"values": [1]}
    assert action_of("[1]", SCHEMA) == {"message": "[1]"}
    with pytest.raises(NoAction, match="an object of JSON with values"):
        action_of("1, 2", numbers)
    assert text_of("a") == "a"
    assert text_of({"text": "a", "metadata": {"b": 1}, "empty": ""}) == "a"
    assert json.loads(text_of({"a": 1, "b": "x"})) == {"a": 1, "b": "x"}
    assert text_of([1]) == "[1]"
    assert with_observation([{"role": "system", "content": "s"}], "a")[1] == {"role": "user", "content": "a"}
    assert with_observation([{"role": "user", "content": ""}], "a") == [{"role": "user", "content": "a"}]


SERVER = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[4])!r})
from aiohttp import web
from tests.pipeline.environments.connectors.test_openenv import SCHEMA, play
async def schema(_): return web.json_response({{"action": SCHEMA}})
async def health(_): return web.json_response({{}})
app = web.Application()
app.router.add_get("/schema", schema); app.router.add_get("/health", health); app.router.add_get("/ws", play)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)
"""


def test_a_command_starts_the_server_and_what_cannot_be_used_is_refused_and_says_why():
    made = OpenEnv(command=[sys.executable, "-c", SERVER, "{port}"])
    assert made.schema == SCHEMA
    for options, why in (
        ({}, "either address"),
        ({"address": "http://127.0.0.1:9"}, "no OpenEnv server answers at http://127.0.0.1:9/schema"),
        ({"address": "127.0.0.1:9"}, "write http://HOST:PORT"),
        ({"address": "http://127.0.0.1:9", "call_timeout_s": "9"}, "call_timeout_s='9' is no number above 0"),
        ({"command": ["sleep", "60"]}, "names no {port}"),
        ({"command": "sleep {port}"}, "a command is a list of texts"),
        ({"command": ["sleep", 60, "{port}"]}, r"a list of texts, .* and not \['sleep', 60,"),
        ({"command": ["nothing-of-this-name", "{port}"]}, "cannot be started"),
        ({"command": [sys.executable, "-c", "raise SystemExit('no luck')", "{port}"]}, "no luck"),
        ({"command": ["sleep", "6{port}"], "start_timeout_s": 0.5}, "did not answer at /health within 0.5 s"),
    ):
        with pytest.raises(ConnectorError, match=why):
            OpenEnv(**options)
