import asyncio
import functools
import threading
import time

import numpy as np
import pytest

from pipeline.config.rewards.conversations import EnvironmentConfig
from pipeline.engine.sampling import Sampling
from pipeline.engine.server import ServerError
from pipeline.environments import Misuse, Reward
from pipeline.environments.loading import LoadingError, environment_of
from pipeline.environments.reward import reward_of
from pipeline.environments.running import Environments
from pipeline.environments.templates import TemplateWriter
from pipeline.rollout.sampler import sample_groups
from pipeline.types import Opening, Prompt, Sampled
from pipeline.waiting import Waiting
from tests.support.templates import SMOLLM2, tokenizer_of

ASKED = ({"role": "user", "content": "question"},)
MORE = [{"role": "user", "content": "more"}]


class Says:
    """An engine that says "an" and stops. ticks: when its event loop got to it."""

    def __init__(self, tokenizer, error=None):
        self.ids = np.array([*tokenizer("an")["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")], np.int32)
        self.error, self.at_once, self.most = error, 0, 0

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def sample(self, token_ids, sampling, *, routes_from=0, group=None, on_tokens=None):
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(0.002)
        self.at_once -= 1
        if self.error is not None:
            raise self.error
        n = len(self.ids)
        return Sampled(self.ids, np.full(n, -1.0, np.float32), None, np.zeros(n, np.int32), "stop")


class Led:
    """An environment of one function."""

    def __init__(self, run):
        self.run = run


def played(run, tmp_path, *, n=2, error=None, beside=None, **config):
    """(episodes, metrics, engine) of n attempts that `run` leads. beside: runs on the loop of the servers."""
    tokenizer = tokenizer_of(SMOLLM2, tmp_path)
    stops = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    engine, settings = Says(tokenizer, error), EnvironmentConfig(function="m:f", **{"threads": 2} | config)
    text = TemplateWriter(tokenizer, Opening(ASKED), stops).render(ASKED)
    prompt = Prompt(np.array([1, 2], np.int32), text, {"answer": "an"}, 3, "s:3", Opening(ASKED))

    async def main(environments):
        work = sample_groups(engine, [prompt], n, Sampling(9, 1.0), attempts=environments)
        groups, *_ = await asyncio.gather(work, *([] if beside is None else [beside()]))
        return groups

    with Environments(settings, lambda: Led(run), tokenizer, stops) as environments:
        (group,) = asyncio.run(main(environments))
        return group.episodes, environments.metrics(), engine


async def one_turn(conversation, prompt):
    turn = await conversation.sample()
    return float(turn.text == prompt.metadata["answer"])


def test_an_environment_gives_the_reward_of_its_conversation(tmp_path):
    async def run(conversation, prompt):
        await conversation.sample()
        conversation.append(MORE)
        await conversation.sample()
        return Reward(parts={"a": 1.0, "b": 2.0}, turns=[1.0, 0.5], note="well done")

    (first, _), metrics, _ = played(run, tmp_path)
    assert first.verdict.reward == 1.5
    assert {name: part.reward for name, part in first.verdict.parts.items()} == {"a": 1, "b": 2}
    assert (first.turn_rewards, first.note) == ((1.0, 0.5), "well done")
    assert (metrics["environment/conversations"], metrics["environment/turns_mean"]) == (2, 2)
    assert first.trained_tokens == 4


def test_where_the_value_is_more_than_the_turns_earned_the_last_turn_has_the_rest(tmp_path):
    async def run(conversation, prompt):
        await conversation.sample()
        conversation.append(MORE)
        await conversation.sample()
        return Reward(2.0, turns=[0.5, -0.25])

    (first, _), _, _ = played(run, tmp_path)
    assert (first.verdict.reward, first.turn_rewards) == (2.0, (0.5, 1.5))


async def raises(conversation, prompt):
    await conversation.sample()
    raise RuntimeError("the tool is broken")


async def leaves(conversation, prompt):
    await conversation.sample()
    raise SystemExit(3)


async def says_nothing(conversation, prompt):
    await conversation.sample()


async def not_finite(conversation, prompt):
    await conversation.sample()
    return float("nan")


async def samples_nothing(conversation, prompt):
    return 1.0


async def too_many_turns(conversation, prompt):
    await conversation.sample()
    return Reward(turns=[1, 2])


async def is_cancelled(conversation, prompt):
    await conversation.sample()
    task = asyncio.ensure_future(asyncio.sleep(60))
    task.cancel()
    await task


async def two_at_once(conversation, prompt):
    await asyncio.gather(conversation.sample(), conversation.sample())
    return 1.0


async def half_of_a_character(conversation, prompt):
    await conversation.sample()
    conversation.append([{"role": "user", "content": "\ud83d"}])
    await conversation.sample()
    return 1.0


def returns(what):
    async def run(conversation, prompt):
        await conversation.sample()
        return what

    return run


class NoNumber:
    def __float__(self):
        raise RuntimeError("it has two values")


async def misuses(conversation, prompt):
    await conversation.sample()
    await conversation.sample()
    return 1.0


@pytest.mark.parametrize(
    ("run", "kind", "says"),
    [
        (raises, "raised", "RuntimeError: the tool is broken"),
        (leaves, "raised", "SystemExit"),
        (says_nothing, "not_a_number", "None, and not a number"),
        (not_finite, "not_a_number", "not finite"),
        (samples_nothing, "not_a_number", "without having sampled"),
        (too_many_turns, "not_a_number", "2 rewards of turns for 1 turns"),
        (misuses, "raised", Misuse.__name__),
        (two_at_once, "raised", "the policy is speaking"),
        (half_of_a_character, "raised", "half of a character"),
        (is_cancelled, "raised", "CancelledError"),
        (returns(10**400), "not_a_number", "where a number belongs"),
        (returns(Reward("1")), "not_a_number", "gave '1' where a number belongs"),
        (returns(Reward(1.0, parts={"a": "b"})), "not_a_number", "gave 'b' where a number belongs"),
        (returns(Reward(1.0, turns=3)), "not_a_number", "turns that are no list"),
        (returns(1e39), "not_a_number", "not finite as float32"),
        (returns(NoNumber()), "not_a_number", "where a number belongs"),
        (returns(Reward(1.0, parts=[1.0])), "not_a_number", "no mapping of names to numbers"),
        (returns(Reward(1.0, parts={"a": -1e39})), "not_a_number", "not finite as float32"),
        (returns(Reward(1.0, parts={"mean": 1.0})), "not_a_number", "named 'mean'"),
        (returns(Reward(1.0, parts={"failures_raised": 1.0})), "not_a_number", "named 'failures_raised'"),
        (returns(Reward(1.0, parts={5: 1.0})), "not_a_number", "named 5"),
    ],
)
def test_what_an_environment_does_wrong_is_a_value_with_its_reason(run, kind, says, tmp_path):
    episodes, metrics, _ = played(run, tmp_path)
    assert {e.verdict.kind for e in episodes} == {kind}
    assert says in episodes[0].verdict.what
    assert metrics["environment/failed"] == 2


def test_what_an_environment_changes_of_its_prompt_no_other_attempt_sees(tmp_path):
    seen = []

    async def run(conversation, prompt):
        seen.append((prompt.metadata["answer"], conversation.messages[0]["content"]))
        prompt.metadata["answer"] = conversation.messages[0]["content"] = "changed"
        await conversation.sample()
        return Reward(1.0, note=7)

    episodes, _, _ = played(run, tmp_path, n=3, threads=1, at_once=1)
    assert seen == [("an", "question")] * 3
    assert {e.note for e in episodes} == {"7"}


def test_tokens_that_are_trained_on_cannot_be_changed_through_a_turn(tmp_path):
    async def run(conversation, prompt):
        (await conversation.sample()).token_ids[:] = 1
        return 1.0

    episodes, _, _ = played(run, tmp_path)
    assert "read-only" in episodes[0].verdict.what


def test_what_a_server_does_wrong_is_raised_whatever_the_environment_makes_of_it(tmp_path):
    async def run(conversation, prompt):
        try:
            await conversation.sample()
        except Exception:
            return 1.0

    with pytest.raises(ServerError, match="gone"):
        played(run, tmp_path, error=ServerError("gone"))


def test_a_limit_that_nobody_catches_gives_the_reward_of_cut_conversations_and_says_so(tmp_path):
    async def run(conversation, prompt):
        while True:
            await conversation.sample()
            conversation.append(MORE)

    episodes, metrics, _ = played(run, tmp_path, max_turns=3, cut_reward=-0.5)
    assert {e.verdict.reward for e in episodes} == {-0.5}
    assert episodes[0].note == "cut: it had its turns"
    assert metrics["environment/cut_turns"] == 2


def test_more_conversations_than_places_wait_for_one_to_end(tmp_path):
    _, _, engine = played(one_turn, tmp_path, n=12, at_once=3)
    assert engine.most == 3


def test_a_tool_that_blocks_holds_up_neither_the_servers_connections_nor_other_threads(tmp_path):
    """All four block until the last of them does, and until the servers' event loop has gone on meanwhile."""
    blocked, began, gone_on = threading.Barrier(4), threading.Event(), threading.Event()

    async def run(conversation, prompt):
        turn = await conversation.sample()
        began.set()
        blocked.wait(20)  # what a tool must not do, and does
        return float(gone_on.wait(20) and turn.text == "an")

    async def beside():
        while not began.is_set():
            await asyncio.sleep(0.01)
        for _ in range(30):
            await asyncio.sleep(0)
        gone_on.set()

    episodes, _, _ = played(run, tmp_path, n=4, threads=4, beside=beside)
    assert [e.verdict.reward for e in episodes] == [1.0] * 4


def test_a_conversation_that_takes_too_long_has_failed_also_where_its_thread_does_not_listen(tmp_path):
    blocks = iter([True, False])

    async def run(conversation, prompt):
        turn = await conversation.sample()
        if next(blocks):
            time.sleep(2.0)
        await asyncio.sleep(9.0 if turn.text != "an" else 0.0)
        return 1.0

    episodes, metrics, _ = played(run, tmp_path, timeout_s=0.3)
    assert sorted(str(e.verdict.kind) for e in episodes) == ["None", "timeout"]
    failed = next(e for e in episodes if e.verdict.kind)
    assert "more than 0.3 s (environment.timeout_s), in turn 1" in failed.verdict.what
    assert failed.trained_tokens == 2
    assert (metrics["environment/timeouts"], metrics["environment/blocked_threads"]) == (1, 1)


def test_a_blocked_thread_counts_once_however_many_conversations_it_holds_up(tmp_path):
    free = threading.Event()

    async def run(conversation, prompt):
        free.wait()

    try:
        _, metrics, _ = played(run, tmp_path, n=3, threads=1, timeout_s=1.0)
    finally:
        free.set()
    assert (metrics["environment/timeouts"], metrics["environment/blocked_threads"]) == (3, 1)


def test_a_reward_is_its_value_or_the_sum_of_its_turns_or_of_its_parts():
    assert reward_of(2, 1).total() == 2
    assert reward_of(np.float32(0.5), 1).total() == 0.5
    assert Reward(turns=[1, 2], parts={"a": 9}).total() == 3
    assert Reward(parts={"a": 1, "b": 2}).total() == 3
    assert Reward(5, turns=[1]).total() == 5


MODULE = """
class Good:
    def __init__(self, size=1):
        self.size = size
    async def run(self, conversation, prompt):
        return self.size

async def plain(conversation, prompt, size=1):
    return size

def blocking(conversation, prompt):
    return 1

async def other(conversation):
    return 1
"""


def test_a_class_or_a_function_is_an_environment_and_what_is_none_is_refused_in_words(tmp_path):
    (tmp_path / "made_here.py").write_text(MODULE)

    def of(name, **options):
        return environment_of(EnvironmentConfig(function=f"made_here:{name}", directory=tmp_path, options=options))

    assert asyncio.run(of("Good", size=4)().run(None, None)) == 4
    assert asyncio.run(of("plain", size=5)().run(None, None)) == 5
    for name, options, says in [
        ("missing", {}, "has no 'missing'"),
        ("Good", {"colour": 1}, "colour"),
        ("blocking", {}, "async def run"),
        ("other", {}, "it takes"),
        ("plain", {"colour": 1}, "colour"),
    ]:
        with pytest.raises(LoadingError, match=says):
            of(name, **options)
    with pytest.raises(LoadingError, match="there is no module nowhere_at_all; write it beside the YAML file"):
        environment_of(EnvironmentConfig(function="nowhere_at_all:f"))


def test_a_module_that_does_not_come_to_its_end_is_named_meanwhile(tmp_path, monkeypatch):
    said, go_on = [], tmp_path / "go_on"

    def say(text):
        said.append(text)
        go_on.touch()

    waits = f"import time, pathlib\nwhile not pathlib.Path({str(go_on)!r}).exists(): time.sleep(0.01)\n"
    (tmp_path / "made_slowly.py").write_text(waits + MODULE)
    monkeypatch.setattr("pipeline.waiting.FIRST_S", 0.02)
    monkeypatch.setattr("pipeline.environments.loading.Waiting", functools.partial(Waiting, say))
    environment_of(EnvironmentConfig(function="made_slowly:plain", directory=tmp_path, options={"size": 1}))
    assert said[0].startswith("waiting for the environment made_slowly:plain in its import, for ")
