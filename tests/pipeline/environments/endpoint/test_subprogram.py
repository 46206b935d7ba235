"""Agents in processes of their own."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from pipeline.config.rewards.conversations import EnvironmentConfig
from pipeline.engine.sampling import Sampling
from pipeline.environments.endpoint.listener import Address, endpoint_metrics
from pipeline.environments.endpoint.subprogram import ProgramError, reward_in, run_program, which
from pipeline.environments.loading import LoadingError, environment_of
from pipeline.environments.reward import Reward
from pipeline.environments.running import Environments
from tests.support.scripted import Scripted
from tests.support.served import END, prompt_of

AGENT = Path(__file__).parents[4] / "examples" / "agent" / "tool_agent.py"
HEAD = """
import json, os, sys, urllib.request
prompt = json.loads(sys.stdin.readline())
def ask(messages):
    data = json.dumps({"model": os.environ["OPENAI_MODEL"], "messages": messages}).encode()
    headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", data, headers)
    return json.load(urllib.request.urlopen(request))["choices"][0]["message"]
"""


def played(tokenizer, code, said=(f"one{END}",) * 3, **settings):
    """The episode of an agent whose source this is, or whose file."""
    command = [sys.executable, *((str(code),) if isinstance(code, Path) else ("-c", HEAD + code))]
    config = EnvironmentConfig(command=command, threads=1, **settings)
    prompt, _ = prompt_of(tokenizer, metadata={"answer": "144"})
    engine = Scripted(tokenizer, said)

    async def run(environments):
        return await environments.begin(engine, prompt, Sampling(400, 1.0), None).play()

    stops = [tokenizer.convert_tokens_to_ids(END)]
    endpoint_metrics()
    with Environments(config, environment_of(config), tokenizer, stops) as environments:
        return asyncio.run(run(environments)), environments.metrics()


def test_an_agent_that_knows_an_address_leads_a_conversation_and_says_what_it_was_worth(tokenizer):
    code = """
messages = prompt["messages"]
for text in ("more", None):
    messages.append(ask(messages))
    if text: messages.append({"role": "user", "content": text})
print("thinking aloud")
print(json.dumps({"reward": 0.5, "parts": {"words": len(messages)}, "note": prompt["metadata"]["answer"]}))
"""
    episode, metrics = played(tokenizer, code)
    assert (episode.verdict.reward, episode.note) == (0.5, "144")
    assert episode.verdict.parts["words"].reward == 4
    assert len(episode.rollouts) == 1
    assert metrics["environment/turns_mean"] == 2
    assert metrics["endpoint/requests"] == 2


def test_an_agent_of_the_other_kind_of_clients_finds_its_address_too(tokenizer):
    code = """
url, key, model = (os.environ["ANTHROPIC_" + name] for name in ("BASE_URL", "API_KEY", "MODEL"))
data = json.dumps({"model": model, "messages": prompt["messages"], "max_tokens": 99}).encode()
request = urllib.request.Request(url + "/v1/messages", data, {"x-api-key": key})
print(json.dumps({"reward": 1, "note": json.load(urllib.request.urlopen(request))["content"][0]["text"]}))
"""
    episode, _ = played(tokenizer, code)
    assert (episode.verdict.reward, episode.note) == (1.0, "one")


def test_the_example_calls_its_tool(tokenizer):
    call = '<tool_call>\n{"name": "multiply", "arguments": {"a": 12, "b": 12}}\n</tool_call>'
    episode, _ = played(tokenizer, AGENT, (call + END, f"144{END}"), tool_parser="qwen25", max_tokens=3000)
    assert episode.verdict.reward == 1.0
    assert episode.note == "1 calls"
    assert "144" in tokenizer.decode(episode.last.response_ids[~episode.last.trained].tolist())


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("ask(prompt['messages']); sys.exit('no luck')", "ended with code 1: no luck"),
        ("ask(prompt['messages'])", "last line was ''"),
        ("ask(prompt['messages']); print('well done')", "last line was 'well done'"),
        ("os.kill(os.getpid(), 9)", "ended by signal 9"),
    ],
)
def test_an_agent_that_ends_badly_or_says_no_reward_has_failed_and_says_why(code, why, tokenizer):
    episode, metrics = played(tokenizer, code)
    assert episode.verdict.reward is None
    assert why in episode.verdict.what
    assert metrics["environment/failed"] == 1


def test_an_agent_that_a_limit_ends_has_the_reward_of_a_cut_conversation(tokenizer):
    code = "[ask([*prompt['messages'], {'role': 'user', 'content': str(i)}]) for i in range(5)]"
    episode, metrics = played(tokenizer, code, max_turns=2, cut_reward=-0.5)
    assert episode.verdict.reward == -0.5
    assert metrics["environment/cut_turns"] == 1


def test_an_agent_gets_no_secret_but_those_that_are_named(tokenizer, monkeypatch):
    for name in ("A_TOKEN", "B_TOKEN", "C"):
        monkeypatch.setenv(name, "1")
    code = """
ask(prompt["messages"])
print(json.dumps({"reward": 0, "note": str([name in os.environ for name in ("A_TOKEN", "B_TOKEN", "C")])}))
"""
    episode, _ = played(tokenizer, code, variables=["B_TOKEN"])
    assert episode.note == "[False, True, True]"


def test_an_agent_that_takes_too_long_has_failed(tokenizer):
    episode, _ = played(tokenizer, "import time; time.sleep(60)", timeout_s=0.3)
    assert episode.verdict.kind == "timeout"


def test_with_an_agent_ends_all_it_has_started(tokenizer, tmp_path):
    mark = tmp_path / "child"
    child = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid()) + ' '); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    prompt, _ = prompt_of(tokenizer)

    async def started():
        while not mark.exists() or not mark.read_text().endswith(" "):
            await asyncio.sleep(0.01)

    async def run():
        address = Address("http://127.0.0.1:1/v1", "sk-0", "policy")
        program = asyncio.ensure_future(run_program([sys.executable, "-c", code], address, prompt))
        await asyncio.wait_for(started(), 30)
        program.cancel()
        await asyncio.wait({program})
        ended = Path("/proc", mark.read_text().strip(), "stat")
        while ended.exists() and ended.read_text().split()[2] != "Z":  # nobody may be there to take it away
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 40))


@pytest.mark.parametrize("session", [False, True])
def test_an_agent_has_ended_though_what_it_started_still_holds_its_output(session, tokenizer, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    left = f"open({str(pipe)!r}).read()"  # waits for a writer: the test, or nobody
    code = f"""
import subprocess
ask(prompt["messages"])
subprocess.Popen([sys.executable, "-c", {left!r}], start_new_session={session})
print(0.5)
"""
    episode, _ = played(tokenizer, code, timeout_s=60.0)
    assert episode.verdict.reward == 0.5
    if session:  # it is none of the program's session, and goes on until it is told
        pipe.write_text("end")


@pytest.mark.parametrize(
    ("line", "reward"),
    [
        ("0.5", Reward(0.5)),
        ("aloud\n1\n\n", Reward(1.0)),
        ('{"parts": {"a": 1}}', Reward(None, {"a": 1})),
        ('{"turns": [0, 1], "note": "n"}', Reward(None, {}, [0, 1], "n")),
    ],
)
def test_the_last_line_is_a_number_or_a_reward(line, reward):
    assert reward_in(line) == reward


@pytest.mark.parametrize("line", ["", "true", "[1]", "[" * 9999, '{"rewards": 1}', "null", "1 point"])
def test_a_last_line_that_is_no_reward_is_refused(line):
    with pytest.raises(ProgramError, match="last line"):
        reward_in(line)


def test_a_command_that_is_not_there_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(LoadingError, match="no program nothing-of-this-name"):
        environment_of(EnvironmentConfig(command=["nothing-of-this-name"]))
    with pytest.raises(LoadingError, match="no folder"):
        environment_of(EnvironmentConfig(command=["python"], directory=tmp_path / "none"))


@pytest.mark.parametrize("fields", [{}, {"function": "a:b", "command": ["c"]}, {"command": ["c"], "options": {"d": 1}}])
def test_an_environment_is_a_function_or_a_command(fields):
    with pytest.raises(ValueError, match=r"an environment has|options are"):
        EnvironmentConfig(**fields)


def test_the_python_of_a_virtual_environment_is_started_by_its_own_name(tmp_path):
    (tmp_path / "bin").mkdir()
    own = tmp_path / "bin" / "python"  # what lies beside it says which packages it has
    own.symlink_to(sys.executable)
    assert which("bin/python", tmp_path) == which(str(own), None) == str(own)
    assert which("bin/nothing", tmp_path) is None
