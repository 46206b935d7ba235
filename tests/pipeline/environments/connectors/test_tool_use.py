"""Conversations with the tools of MCP servers."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from pipeline.config.rewards.conversations import EnvironmentConfig
from pipeline.engine.sampling import Sampling
from pipeline.environments.connectors.tool_use import ToolUse
from pipeline.environments.loading import LoadingError, environment_of
from pipeline.environments.running import Environments
from pipeline.errors import SamerouteError
from tests.support.scripted import Scripted
from tests.support.served import END, prompt_of

TOOL_USE = "pipeline.environments.connectors.tool_use:ToolUse"
HOSTILE = [sys.executable, str(Path(__file__).parent / "hostile_tools.py")]


def call(name: str, arguments: str = "{}") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def played(tokenizer, *said, **settings):
    """The episode of a policy that says this."""
    options = {"servers": [{"command": HOSTILE}], "call_timeout_s": 0.5}
    given = {"function": TOOL_USE, "options": options, "tool_parser": "qwen25", "max_tokens": 9000}
    config = EnvironmentConfig(threads=1, **(given | settings))
    prompt, _ = prompt_of(tokenizer, metadata={"answer": "42"})
    engine = Scripted(tokenizer, [text + END for text in said])

    async def run(environments):
        return await environments.begin(engine, prompt, Sampling(900, 1.0), None).play()

    stops = [tokenizer.convert_tokens_to_ids(END)]
    with Environments(config, environment_of(config), tokenizer, stops) as environments:
        return asyncio.run(run(environments)), engine


def test_calls_are_answered_until_the_policy_makes_none(tokenizer):
    two = call("echo", '{"a": 1}') + "\n" + call("fail")
    episode, engine = played(tokenizer, two, call("echo", '{"b": 2}'), "42")
    assert episode.verdict.reward == 1.0
    assert {name: part.reward for name, part in episode.verdict.parts.items()} == {"tool_calls": 3, "tool_errors": 1}
    asked = [tokenizer.decode(ids.tolist()) for ids, _ in engine.asked]
    assert "flood" in asked[0]  # the tools stand in the prompt
    assert '{"a": 1}' in asked[1]
    assert "error: no luck" in asked[1]
    assert len(episode.rollouts) == 1
    assert tokenizer.decode(episode.last.response_ids[episode.last.trained].tolist()).count(END) == 3


def test_a_server_that_dies_fails_the_episode_and_a_limit_cuts_it(tokenizer):
    dead, _ = played(tokenizer, call("die"))
    assert dead.verdict.reward is None
    assert "is gone" in dead.verdict.what
    cut, _ = played(tokenizer, call("echo"), call("echo"), max_turns=2, cut_reward=-0.5)
    assert cut.verdict.reward == -0.5


class Counted(ToolUse):
    """A reward of its own."""

    def reward(self, conversation, prompt):
        return float(len(conversation.messages))


def test_a_class_of_ones_own_has_its_own_reward(tokenizer):
    episode, _ = played(tokenizer, "no", function=f"{__name__}:Counted")
    assert episode.verdict.reward == 2


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"servers": []}, "names no server"),
        ({"servers": [{"command": ["cat"]}], "call_timeout_s": -1}, "call_timeout_s=-1 is no number above 0"),
        ({"servers": [{"command": ["cat"]}], "max_result_chars": True}, "max_result_chars=True is no number"),
        ({"servers": [{"comand": ["x"]}]}, "comand"),
        ({"servers": [{"command": [sys.executable, "-c", "raise SystemExit('bad luck')"]}]}, "bad luck"),
    ],
)
def test_what_is_wrong_with_servers_is_known_before_anything_starts(options, why):
    with pytest.raises(SamerouteError, match=why) as found:
        environment_of(EnvironmentConfig(function=TOOL_USE, options=options))
    assert found.value.exit_code == 2
    with pytest.raises(LoadingError, match="servers"):
        environment_of(EnvironmentConfig(function=TOOL_USE))


def test_without_a_parser_of_calls_the_episode_says_what_to_set(tokenizer):
    episode, _ = played(tokenizer, "42", tool_parser=None)
    assert "environment.tool_parser" in episode.verdict.what
