"""The process that runs environments of `verifiers`: what it says, and what becomes of one that fails, hangs or dies.

The package itself is in tests/end_to_end/test_connectors.py."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from pipeline.config.rewards.conversations import EnvironmentConfig
from pipeline.engine.sampling import Sampling
from pipeline.environments.connectors.peer import Child, ConnectorError, Peer
from pipeline.environments.connectors.verifiers import Verifiers, main
from pipeline.environments.loading import environment_of
from pipeline.environments.running import Environments
from tests.support.scripted import Scripted
from tests.support.served import END, prompt_of

STAND_IN = str(Path(__file__).parent / "stand_in")
FUNCTION = "pipeline.environments.connectors.verifiers:Verifiers"


def played(tokenizer, *todo, **settings):
    """An episode for each row."""
    options = {"environment": "talker", "directory": STAND_IN, "arguments": {"greeting": "more"}}
    config = EnvironmentConfig(function=FUNCTION, options=options, threads=1, **settings)
    engine = Scripted(tokenizer, [f"one{END}"] * 9)

    async def run(environments, do):
        row = {"prompt": [{"role": "user", "content": "question"}], "do": do}
        prompt, _ = prompt_of(tokenizer, metadata={} if do is None else {"verifiers": row})
        return await environments.begin(engine, prompt, Sampling(400, 1.0), None).play()

    with Environments(
        config, environment_of(config), tokenizer, [tokenizer.convert_tokens_to_ids(END)]
    ) as environments:
        return [asyncio.run(run(environments, do)) for do in todo]


def test_an_environment_leads_conversations_in_a_process_of_its_own_and_gives_their_reward(tokenizer):
    for episode in played(tokenizer, "talk", "print"):
        assert (episode.verdict.reward, episode.note) == (0.5, "enough")
        assert {name: part.reward for name, part in episode.verdict.parts.items()} == {"turns": 2.0}
        assert len(episode.rollouts) == 1
        text = tokenizer.decode(episode.last.token_ids.tolist())
        assert text.count("one") == 2
        assert "more" in text


def test_what_goes_wrong_in_a_rollout_is_the_episodes_reason_and_a_dead_process_is_started_again(tokenizer):
    failed = played(tokenizer, "raise", "error", "nothing", "die", "talk", None, timeout_s=30)
    whys = [episode.verdict.what for episode in failed]
    assert "RuntimeError: no luck" in whys[0]
    assert "ToolError: it broke" in whys[1]
    assert "gave no reward" in whys[2]
    assert "ended with code 3" in whys[3]
    assert "a last word" in whys[3]
    assert failed[4].verdict.reward == 0.5
    assert "no column 'verifiers'" in whys[5]


def test_a_rollout_that_hangs_ends_with_its_conversations_time_and_a_limit_cuts_it(tokenizer):
    (hung,) = played(tokenizer, "hang", timeout_s=0.5)
    assert hung.verdict.kind == "timeout"
    (cut,) = played(tokenizer, "talk", max_turns=1, cut_reward=-0.5)
    assert cut.verdict.reward == -0.5


def test_an_answer_without_a_character_is_the_policys_doing_and_has_its_own_reward(tokenizer):
    (empty,) = played(tokenizer, "empty")
    assert (empty.verdict.reward, empty.note) == (0.0, "the policy said nothing")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"environment": "nobody"}, r"cannot load 'nobody'.*there is no environment nobody"),
        ({"environment": "talker", "arguments": {"size": 3}}, "size"),
        ({"environment": "talker", "start_timeout_s": 0}, "start_timeout_s=0 is no number above 0"),
        ({"environment": "talker", "directory": None}, "has no verifiers"),
        ({"environment": "talker", "python": "/nowhere/python"}, "there is no Python /nowhere/python"),
        ({"environment": "talker", "python": "/bin/false"}, "ended with code 1"),
        ({"environment": "slow", "start_timeout_s": 1.0}, "not ready within 1 s"),
    ],
)
def test_what_cannot_be_loaded_is_refused_within_seconds_and_says_why(options, why):
    with pytest.raises(ConnectorError, match=why) as found:
        Verifiers(**({"directory": STAND_IN} | options))
    assert found.value.exit_code == 2


def test_prompts_are_written_with_the_rows_that_they_were_made_of(tmp_path, capsys):
    out = tmp_path / "new" / "prompts.jsonl"
    main(["talker", str(out), "--directory", STAND_IN, "--limit", "2"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == ["talk", "print"]
    assert rows[0]["verifiers"]["do"] == "talk"
    assert rows[0]["answer"] == "12"
    assert "2 prompts of talker" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nobody"):
        main(["nobody", str(out), "--directory", STAND_IN])


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("print('hello')", "wrote what is no answer: 'hello'"),
        ("import sys; sys.exit('no luck')", "ended with code 1: no luck"),
        ("print('{\"ready\": 1}'); print('[1]', flush=True); input()", "wrote what is no answer: '\\[1\\]'"),
    ],
)
def test_a_process_that_says_what_nobody_understands_is_ended(code, why):
    async def ask(peer):
        await peer.ask(rows={})

    child = Child([sys.executable, "-c", code], "it")
    with pytest.raises(ConnectorError, match=why):
        asyncio.run(ask(Peer(child, within_s=20)))
    assert child.process.poll() is not None
