import asyncio
import threading

import numpy as np
import pytest

from pipeline.engine.sampling import Sampling
from pipeline.environments.conversation import Conversation, LimitReached, Misuse
from pipeline.environments.templates import HistoryError, TemplateWriter
from pipeline.types import Opening, Prompt
from tests.support.scripted import Scripted
from tests.support.templates import FAMILIES, tokenizer_of

ASKED = ({"role": "user", "content": "question"},)
SAMPLING = Sampling(max_new_tokens=40, temperature=1.0)


def conversation(name, tmp_path, said, *, cut=10**6, wrap=lambda writer: writer, sampling=SAMPLING, **limits):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family, tmp_path)
    writer = TemplateWriter(tokenizer, Opening(ASKED), [tokenizer.convert_tokens_to_ids(s) for s in family.stops])
    text = writer.render(ASKED)
    prompt = Prompt(writer.ids(text), text, opening=writer.opening)
    engine = Scripted(tokenizer, said, cut)
    made = Conversation(engine, prompt, wrap(writer), sampling, **{"max_turns": 9, "max_tokens": 900} | limits)
    return made, engine, tokenizer


def five_turns(name, tmp_path, **options):
    """(conversation, engine, tokenizer) after five turns with a tool's reply between them."""

    async def run():
        said = [f"answer 12{i}<|im_end|>" for i in range(5)]
        made, engine, tokenizer = conversation(name, tmp_path, said, **options)
        for i in range(5):
            turn = await made.sample()
            assert turn.text == f"answer 12{i}"
            assert turn.finish_reason == "stop"
            made.append([{"role": "tool", "content": f"answer {i}", "tool_call_id": "f:0"}])
        return made, engine, tokenizer

    return asyncio.run(run())


@pytest.mark.parametrize("name", ["smollm2", "kimi-k2"])
def test_every_request_goes_on_exactly_where_the_last_answer_ended(name, tmp_path):
    made, engine, tokenizer = five_turns(name, tmp_path)
    (rollout,) = made.rollouts
    for (asked, _), (then, start) in zip(engine.asked, engine.asked[1:], strict=False):
        assert np.array_equal(then[: len(asked)], asked)
        assert start < len(then)
    last = engine.asked[-1][0]
    assert np.array_equal(rollout.token_ids[: len(last)], last)
    text = tokenizer.decode(rollout.token_ids.tolist())
    assert text + ("\n" if name == "smollm2" else "") == made.writer.render(made.messages, to_answer=False)


@pytest.mark.parametrize("name", ["smollm2", "kimi-k2"])
def test_what_was_sampled_is_trained_on_and_what_others_said_is_not(name, tmp_path):
    made, engine, _ = five_turns(name, tmp_path)
    (rollout,) = made.rollouts
    sampled = np.concatenate([engine.ids(f"answer 12{i}<|im_end|>") for i in range(5)])
    assert np.array_equal(rollout.response_ids[rollout.trained], sampled)
    assert (np.diff(rollout.trained.astype(int)) == -1).sum() == 4
    assert np.array_equal(rollout.routes[:, 0, 0], np.arange(len(rollout.token_ids) - 1) % 8)


class Remakes(TemplateWriter):
    """What a conversation must not do: the answer becomes tokens again, from its text."""

    conversation = None

    def suffix(self, before, spoken, stop, history, new):
        self.conversation._session._prompt = self.ids(before + spoken + stop)
        self.conversation._session.rollout = None
        return super().suffix(before, spoken, stop, history, new)


@pytest.mark.parametrize("kind", [TemplateWriter, Remakes])
def test_tokens_that_the_tokenizer_would_not_have_made_stay_as_they_were_sampled(kind, tmp_path):
    """The comparison finds the fault: of the kind that makes one answer again, it is not true."""

    async def run():
        made, engine, _ = conversation("smollm2", tmp_path, ["answer 12<|im_end|>"] * 2)
        made.writer.__class__, made.writer.conversation = kind, made
        await made.sample()
        made.append([{"role": "user", "content": "more"}])
        await made.sample()
        return engine

    engine = asyncio.run(run())
    kept = np.concatenate([engine.asked[0][0], engine.ids("answer 12<|im_end|>")])
    assert np.array_equal(engine.asked[1][0][: len(kept)], kept) == (kind is TemplateWriter)


@pytest.mark.parametrize("cut", [1, 2, 3, 7])
def test_a_conversation_is_the_same_however_its_turns_were_cut_into_requests(cut, tmp_path):
    (whole,), (parts,) = (five_turns("smollm2", tmp_path, cut=c)[0].rollouts for c in (10**6, cut))
    for name in ("prompt_ids", "response_ids", "rollout_logprobs", "routes", "weight_versions", "trained"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name)), name


def test_what_a_template_drops_is_refused_or_begins_another_rollout_and_each_token_is_trained_on_once(tmp_path):
    said = [f"<think>\nhm {i}\n</think>\n\nanswer {i}<|im_end|>" for i in range(3)]

    async def run(history):
        made, engine, tokenizer = conversation("qwen3", tmp_path, said, history=history)
        for i in range(3):
            await made.sample()
            if i < 2:
                made.append([{"role": "user", "content": f"more {i}"}])
        return made, engine, tokenizer

    with pytest.raises(HistoryError, match="changes what stands"):
        asyncio.run(run("refuse"))
    made, engine, tokenizer = asyncio.run(run("split"))
    assert len(made.rollouts) == 3
    trained = np.concatenate([r.response_ids[r.trained] for r in made.rollouts])
    assert np.array_equal(trained, np.concatenate([engine.ids(text) for text in said]))
    assert "hm 0" not in tokenizer.decode(made.rollouts[1].prompt_ids.tolist())
    assert "answer 0" in tokenizer.decode(made.rollouts[1].prompt_ids.tolist())


def test_splitting_leaves_whole_what_the_template_only_adds_to(tmp_path):
    async def run():
        made, _, _ = conversation("qwen3", tmp_path, ["<think>\nhm\n</think>\n\ncall<|im_end|>"] * 2, history="split")
        await made.sample()
        made.append([{"role": "tool", "content": "12"}])
        await made.sample()
        return made

    assert len(asyncio.run(run()).rollouts) == 1


def test_limits_say_which_they_are_and_what_is_there_stays(tmp_path):
    async def run(**limits):
        made, _, _ = conversation("smollm2", tmp_path, ["answer<|im_end|>"] * 9, **limits)
        try:
            for _ in range(9):
                await made.sample()
                made.append([{"role": "user", "content": "more"}])
        except LimitReached as error:
            return made, str(error)
        pytest.fail("no limit was reached")

    made, why = asyncio.run(run(max_turns=3))
    assert (made.cut, made.turns) == ("turns", 3)
    assert "environment.max_turns" in why
    made, why = asyncio.run(run(max_tokens=100))
    assert made.cut == "tokens"
    assert "environment.max_tokens" in why
    assert all(len(r) <= 100 for r in made.rollouts)


def test_a_turn_that_was_cut_goes_on_as_the_same_turn_and_an_ended_one_wants_something_to_answer(tmp_path):
    async def run():
        made, _, _ = conversation("smollm2", tmp_path, ["ans"], sampling=Sampling(2, 1.0))
        first = await made.sample()
        assert (first.text, first.finish_reason) == ("an", "length")
        made._engine.said = ["swer<|im_end|>"]
        await made.sample(max_new_tokens=9)
        assert made.turns == 1
        assert made.messages[-1] == {"role": "assistant", "content": "answer"}
        with pytest.raises(Misuse, match="append what others say"):
            await made.sample()

    asyncio.run(run())


def test_nothing_is_appended_before_the_first_turn_or_as_the_policy(tmp_path):
    async def run():
        made, _, _ = conversation("smollm2", tmp_path, ["answer<|im_end|>"])
        with pytest.raises(Misuse, match="belongs to the prompt"):
            made.append([{"role": "user", "content": "more"}])
        await made.sample()
        with pytest.raises(Misuse, match="only the policy"):
            made.append([{"role": "assistant", "content": "more"}])
        with pytest.raises(Misuse, match="a role and a content"):
            made.append(["more"])

    asyncio.run(run())


def test_a_conversation_may_be_led_from_another_event_loop(tmp_path):
    """Requests are made on the loop that it was made on, where the servers' connections are."""
    loops = []

    async def run():
        made, engine, _ = conversation("smollm2", tmp_path, ["answer<|im_end|>"])
        own = engine.sample

        async def sample(*args, **named):
            loops.append(asyncio.get_running_loop())
            return await own(*args, **named)

        engine.sample = sample
        thread = threading.Thread(target=lambda: texts.append(asyncio.run(made.sample()).text))
        texts = []
        thread.start()
        await asyncio.to_thread(thread.join)
        assert texts == ["answer"]
        assert loops == [asyncio.get_running_loop()]

    asyncio.run(run())


def cancelled(tmp_path, then):
    """A turn of which "ans" had come when it was cancelled; and then(conversation, engine)."""

    async def run():
        made, engine, _ = conversation("smollm2", tmp_path, ["answer<|im_end|>"], cut=3)
        own, part = engine.sample, asyncio.Event()

        async def sample(*args, **named):
            if engine.asked:
                part.set()
                await asyncio.sleep(60)
            return await own(*args, **named)

        engine.sample = sample
        work = asyncio.create_task(made.sample())
        await part.wait()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        engine.sample = own
        await then(made, engine)
        return made

    return asyncio.run(run())


def test_a_turn_that_was_cancelled_goes_on_as_the_same_turn(tmp_path):
    async def then(made, engine):
        assert (made.turns, made.messages[-1]["content"]) == (0, "ans")
        engine.cut = 99
        assert (await made.sample()).text == "wer"

    made = cancelled(tmp_path, then)
    assert made.messages == [*ASKED, {"role": "assistant", "content": "answer"}]
    assert (made.turns, made.turn_rewards([0.5])) == (1, (0.5,))
    assert [r.turns for r in made.rollouts] == [1]


def test_a_turn_that_nobody_saw_has_no_reward_and_counts_for_no_limit(tmp_path):
    async def then(made, engine):
        made.branch(made.messages[:1])
        engine.said, engine.rest, engine.cut = ["answer<|im_end|>"], [], 99
        await made.sample()

    made = cancelled(tmp_path, then)
    assert (made.turns, made.turn_rewards([0.5])) == (1, (0.0, 0.5))
    assert [r.turns for r in made.rollouts] == [1, 1]


@pytest.mark.parametrize(("first", "turns"), [(2, 1), (40, 0)])
def test_a_turn_whose_end_reached_nobody_was_seen_where_its_beginning_was(first, turns, tmp_path):
    async def run():
        made, engine, _ = conversation("smollm2", tmp_path, ["answer<|im_end|>"])
        await made.sample(max_new_tokens=first)
        if first < 40:
            engine.said = ["swer<|im_end|>"]
            await made.sample()
        made.unhear()
        made.unhear()
        return made

    made = asyncio.run(run())
    assert (made.turns, made.turn_rewards([0.5] * turns)) == (turns, (0.5,) if turns else (0.0,))


def test_two_turns_between_which_the_template_writes_nothing_are_refused(tmp_path):
    class Silent(TemplateWriter):
        def suffix(self, *_):
            return "", ""

    async def run():
        made, _, _ = conversation("smollm2", tmp_path, ["answer<|im_end|>"] * 2)
        made.writer.__class__ = Silent
        await made.sample()
        made.append([{"role": "user", "content": ""}])
        with pytest.raises(Misuse, match="two turns would be one"):
            await made.sample()

    asyncio.run(run())
