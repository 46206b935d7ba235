"""Groups that are made beside the training: what a step is given, and what becomes of errors, drops and limits."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import numpy as np
import pytest

from pipeline.engine.decoder import AnswerError
from pipeline.engine.sampling import Sampling
from pipeline.engine.server import ServerError
from pipeline.rewards import RewardError, Verdict
from pipeline.rollout.admission import Admission
from pipeline.rollout.maker import Maker, NothingToLearnError, Recipe
from pipeline.rollout.producer import Producer
from pipeline.rollout.saved import read_saved
from tests.support.fake_answers import FakeAnswers, FakeJudge, FakePrompts

B, N = 3, 2


def recipe(**changes):
    setting = {
        "samples": N,
        "sampling": Sampling(max_new_tokens=4, temperature=1.0),
        "informative": None,
        "on_failure": "exclude",
        "least": 1,
        "most_dropped": 12,
        "scored": 2,
        "limit_s": 60.0,
    }
    return Recipe(**setting | changes)


class Made:
    """A producer on made-up servers. steps: of the run, of which all are trained in `train`."""

    def __init__(
        self, answers=None, judge=None, *, staleness=2, ahead=1, order="finish", steps=6, saved=None, **changes
    ):
        self.answers, self.judge, self.prompts = answers or FakeAnswers(), judge or FakeJudge(), FakePrompts()
        first = self.answers.version
        self.admission = Admission(B, staleness, ahead, order=order, version=first, last=first + steps - 1)
        self.steps, self.saved, self.recipe = steps, saved, recipe(**changes)
        if saved is not None:
            self.prompts.cursor = saved.cursor["prompts"]
        self.producer = Producer(self.make)
        self.batches = []

    def make(self):
        self.maker = Maker(self.admission, self.prompts, self.answers, self.judge, self.recipe)
        if self.saved is not None:
            self.maker.restore(self.saved)
        return self.maker

    def __enter__(self):
        self.producer.__enter__()
        return self

    def __exit__(self, *details):
        self.producer.__exit__(*details)
        assert not self.answers.in_flight
        assert not [t for t in threading.enumerate() if t.name == "sameroute rollouts"]

    def step(self):
        taken = self.producer.take()
        version = self.answers.version
        for group in taken.groups:
            for rollout in group.rollouts:
                assert version - self.admission.staleness <= rollout.weight_versions.min()
                assert rollout.weight_versions.max() <= version
        assert len(taken.scored) == 2 or any(r.is_of(version) for group in taken.groups for r in group.rollouts)
        self.batches.append([group.prompt.index for group in taken.groups])
        self.producer.pause()
        self.answers.version += 1
        self.producer.resume(self.answers.version)
        return taken

    def train(self):
        return [self.step() for _ in range(self.steps)]

    @property
    def trained(self):
        return sorted(index for batch in self.batches for index in batch)


def heavy_tailed(prompt, number):
    return 0.001 * random.Random(f"{prompt} {number}").paretovariate(1.1)


@pytest.mark.parametrize("drain", [True, False])
@pytest.mark.parametrize(("staleness", "ahead", "order"), [(1, 1, "finish"), (4, 3, "finish"), (3, 3, "admission")])
def test_every_prompt_is_trained_on_once_and_nothing_is_left(staleness, ahead, order, drain):
    answers = FakeAnswers(heavy_tailed, drain=drain)
    with Made(answers, staleness=staleness, ahead=ahead, order=order) as made:
        made.train()
    assert made.trained == list(range(6 * B))
    assert set(answers.asked.values()) == {1}
    assert {count for _, count in answers.scored} <= {2}
    if order == "admission":
        assert made.batches == [list(range(B * i, B * i + B)) for i in range(6)]


def test_a_step_takes_what_has_finished_and_does_not_wait_for_the_longest_until_it_is_due():
    with Made(FakeAnswers(lambda prompt, number: 0.3 if prompt == 0 else 0.001, drain=False), steps=4) as made:
        made.train()
    assert made.batches[0] == [1, 2, 3]
    assert made.trained == list(range(4 * B))
    assert 0 in made.batches[2], "of version 1 and due at step 3"


def test_each_group_that_teaches_nothing_is_replaced_once():
    judge = FakeJudge(lambda prompt, number: Verdict(reward=float(number) if prompt % 3 else 1.0))
    with Made(judge=judge, informative=lambda group: np.ptp(group.rewards) > 0) as made:
        taken = made.train()
        left = made.producer.snapshot().ended
    assert made.trained == [index for index in range(40) if index % 3][: 6 * B]
    dropped = sum(t.metrics["rollout/groups_replaced"] for t in taken)
    assert made.admission.ended["uninformative"] == made.prompts.cursor - 6 * B
    assert sorted(made.prompts.graded) == list(range(made.prompts.cursor)), "the source learns of each"
    assert dropped <= made.prompts.cursor - 6 * B
    told = [one for t in taken for one in t.ended] + left
    assert sorted(one.group.prompt.index for one in told) == [i for i in range(made.prompts.cursor) if i % 3 == 0]
    assert {one.end for one in told} == {"uninformative"}


def test_too_many_in_a_row_that_teach_nothing_end_the_run():
    judge = FakeJudge(lambda prompt, number: Verdict(reward=1.0))
    made = Made(judge=judge, informative=lambda group: np.ptp(group.rewards) > 0)
    with made, pytest.raises(NothingToLearnError, match=r"12 groups in a row had no rewards that differ"):
        made.step()


FAILED = Verdict(kind="raised", what="raised ValueError", verifier="fake")


def test_a_group_that_cannot_be_graded_is_replaced_and_counted():
    judge = FakeJudge(
        lambda prompt, number: FAILED if prompt == 1 or (prompt, number) == (2, 0) else Verdict(reward=1.0)
    )
    with Made(judge=judge) as made:
        taken = made.train()
    assert made.trained == [0, *range(2, 6 * B + 1)]
    assert made.admission.ended["failed"] == 1
    assert sum(t.failures.by_kind["raised"] for t in taken) == 3
    assert sum(t.metrics["reward/groups_dropped"] for t in taken) == 1


def test_where_nothing_can_be_graded_the_run_ends():
    made = Made(judge=FakeJudge(lambda *_: FAILED))
    with made, pytest.raises(RewardError, match=r"nothing is left to train on.*raised ValueError"):
        made.step()


def test_a_failure_that_is_to_stop_the_run_does_so_before_its_group_is_complete():
    answers = FakeAnswers(lambda prompt, number: 60 if number else 0.001)
    made = Made(answers, FakeJudge(lambda *_: FAILED), on_failure="stop")
    with made, pytest.raises(RewardError, match="'fake' raised ValueError"):
        made.step()


@pytest.mark.parametrize("error", [ServerError("the server died"), AnswerError("no routes came back")])
def test_an_error_of_a_sample_is_raised_to_whoever_waits_and_to_whoever_looks(error):
    answers = FakeAnswers(lambda prompt, number: 0.001 if prompt == 2 else 60)
    answers.error, answers.error_at = error, 2
    with Made(answers) as made:
        began = time.monotonic()
        with pytest.raises(type(error), match=str(error)):
            made.step()
        with pytest.raises(type(error), match=str(error)):
            made.producer.check()
        assert time.monotonic() - began < 5


def test_what_cannot_begin_is_raised_where_it_is_begun():
    def refused():
        raise ValueError("8 open groups cannot be trained within 1 versions")

    with pytest.raises(ValueError, match="cannot be trained within 1"), Producer(refused):
        pass


def test_who_watches_ends_a_wait():
    def died():
        raise ServerError("the SGLang server died")

    with Made(FakeAnswers(lambda *_: 60)) as made:
        made.producer._watch = died
        with pytest.raises(ServerError, match="SGLang server died"):
            made.step()


class Leaving(FakeAnswers):
    """What a thread does for it lasts until it is left, or until `released`."""

    def __init__(self, *, when_left):
        super().__init__()
        self.when_left, self.released = when_left, threading.Event()

    async def __aenter__(self):
        asyncio.get_running_loop().run_in_executor(None, self.released.wait)
        return await super().__aenter__()

    async def __aexit__(self, *details):
        await super().__aexit__(*details)
        if self.when_left:
            self.released.set()


def test_what_a_thread_does_at_the_end_of_a_run_is_waited_for(monkeypatch):
    """Weights may be on their way to a server that came back."""
    monkeypatch.setattr("pipeline.rollout.producer._END_S", 0.0)
    with Made(Leaving(when_left=True)) as made:
        made.train()


def test_what_does_not_end_takes_no_place_of_the_error_that_ended_the_run(monkeypatch, capsys):
    monkeypatch.setattr("pipeline.rollout.producer._END_S", 0.0)
    made = Made(Leaving(when_left=False))
    with pytest.raises(ServerError, match="the SGLang server died"), made.producer:
        raise ServerError("the SGLang server died")
    assert "rollouts did not end in 0 s after the run had failed" in capsys.readouterr().err
    made.answers.released.set()
    made.producer._thread.join(10)
    assert not made.producer._thread.is_alive()


def test_answers_that_get_no_further_are_cut_and_graded_as_they_are():
    answers = FakeAnswers(lambda prompt, number: 60 if (prompt, number) == (1, 1) else 0.001)
    with Made(answers, limit_s=0.05, order="admission", steps=2) as made:
        first, _ = made.train()
    assert [r.finish_reason for g in first.groups for r in g.rollouts] == ["stop"] * 3 + ["time"] + ["stop"] * 2
    assert first.metrics["rollout/answers_cut"] == 1


def test_a_long_answer_of_which_tokens_come_is_not_cut():
    answers = FakeAnswers(lambda prompt, number: 0.2 if (prompt, number) == (1, 0) else 0.001)
    answers.moving = True
    with Made(answers, limit_s=0.05, order="admission", steps=2) as made:
        first, _ = made.train()
    assert [r.finish_reason for group in first.groups for r in group.rollouts] == ["stop"] * B * N
    assert first.metrics["rollout/answers_cut"] == 0


def test_an_answer_that_is_cut_before_its_first_token_is_no_part_of_its_group():
    answers = FakeAnswers(lambda prompt, number: 60 if prompt == 1 or (prompt, number) == (2, 1) else 0.001)
    answers.mute = True
    with Made(answers, limit_s=0.05, order="admission", steps=2) as made:
        first, _ = made.train()
    assert [len(group.episodes) for group in first.groups] == [2, 1, 2]
    assert made.batches[0] == [0, 2, 3]
    assert made.admission.ended["failed"] == 1


def test_a_group_without_a_token_at_a_transfer_is_as_young_as_the_weights_after_it():
    answers = FakeAnswers(lambda prompt, number: 60 if prompt > B else 0.001, drain=False)
    with Made(answers, steps=3) as made:
        made.producer.take()
        for answer in made.maker.making[B + 1].answers.values():
            answer.begun = False  # it waits in front of the servers
        made.producer.pause()
        answers.version = 2
        made.producer.resume(2)
        assert {index: made.admission.open[index].oldest for index in (B + 1, B + 2)} == {B + 1: 2, B + 2: 1}


def test_a_run_goes_on_from_what_was_saved_and_samples_nothing_again(tmp_path):
    slow = FakeAnswers(lambda prompt, number: 60 if number == 1 and prompt >= 6 else 0.001, drain=False)
    with Made(slow, staleness=4, ahead=3, steps=6) as made:
        made.step()
        deadline = time.monotonic() + 5
        while len(made.maker.finished) < 3 or any(not m.sampled for m in made.maker.making.values()):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        saved = made.producer.snapshot()
    assert saved.cursor == {"prompts": 15, "supervised": 0}
    saved.write(tmp_path)
    read = read_saved(tmp_path, saved.cursor)
    assert read.admission == saved.admission
    assert [prompt.origin for prompt, _ in read.open.values()] == [f"made:{index}" for index in range(6, 15)]
    assert list(read.finished) == list(saved.finished) == [3, 4, 5]
    assert {index: list(sampled) for index, (_, sampled) in read.open.items()} == {index: [0] for index in range(6, 15)}

    again = FakeAnswers(version=2)
    with Made(again, staleness=4, ahead=3, steps=5, saved=read) as resumed:
        resumed.train()
    assert sorted(made.trained + resumed.trained) == list(range(6 * B))
    assert {number for prompt, number in again.asked if 6 <= prompt < 15} == {1}
    assert not [prompt for prompt, _ in again.asked if prompt < 6]


def test_a_damaged_file_of_rollouts_is_named(tmp_path):
    with Made() as made:
        made.step()
        while not made.maker.finished:
            time.sleep(0.001)
        made.producer.snapshot().write(tmp_path)
    file = tmp_path / "rollouts" / "finished.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"finished\.safetensors is damaged"):
        read_saved(tmp_path, {})


def test_a_checkpoint_of_a_synchronous_run_has_no_rollouts(tmp_path):
    assert read_saved(tmp_path, {}) is None


def test_what_is_open_and_idle_is_measured():
    answers = FakeAnswers(lambda prompt, number: 60 if prompt == 4 else 0.001, drain=False)
    with Made(answers) as made:
        metrics = made.step().metrics
        assert 0 <= metrics["idle/servers"] <= 1
        assert metrics["rollout/open_groups"] >= 1
        assert metrics["throughput/rollout_tokens_per_s"] > 0
