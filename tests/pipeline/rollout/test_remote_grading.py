"""A grader process beside the servers says what a grader of the controller says; nothing of it outlives the run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from ray.exceptions import RayActorError

from pipeline.cluster.ray_session import ray_session
from pipeline.config.rewards import ExactMatchReward, FunctionReward, GradingConfig
from pipeline.config.run import ClusterConfig
from pipeline.data.tokenizer import load_tokenizer, write_character_tokenizer
from pipeline.rewards import RewardError, Verdict, VerifierError, grade
from pipeline.rewards.processes import below, parents
from pipeline.rollout.grader_process import _Open, pack_answer
from pipeline.rollout.grading import OwnGraders
from pipeline.rollout.remote_grading import _Line, remote_graders
from pipeline.types import Episode, Group, Prompt
from tests.support.episodes import plain_rollout
from tests.support.hostile import TAG

HOSTILE = FunctionReward(function="tests.support.hostile:verify")
GRADING = GradingConfig(workers=2, timeout_s=1.0)
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def ray_up():
    with ray_session(ClusterConfig(object_store_gb=0.1), cpus=1):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_character_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model)


@pytest.fixture(scope="module")
def graders(ray_up, model):
    """Of two hosts."""
    with remote_graders([None, None], model, False) as made:
        yield made


@pytest.fixture(scope="module")
def answer(tokenizer):
    """Makes a prompt and an answer to it."""

    def make(do="right", text="12", origin="", **metadata):
        ids = tokenizer.encode(f"{text}<|eos|>", add_special_tokens=False)
        prompt = Prompt(np.arange(4, dtype=np.int32), "a question", {"do": do, **metadata}, 3, origin)
        return prompt, Episode((plain_rollout(ids, np.zeros(len(ids))),))

    return make


def process_of(host) -> int:
    return ray.get(host.actor.__ray_call__.remote(lambda _: os.getpid()))


def left_behind() -> list[int]:
    """What a hostile verifier had started, and that runs."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                found += [int(entry)] if TAG.encode() in Path(f"/proc/{entry}/cmdline").read_bytes() else []
            except OSError:
                continue
    return found


def ended(processes, within_s=10.0):
    deadline = time.monotonic() + within_s
    while (left := set(processes) & parents().keys()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not left


def test_an_answer_that_cannot_be_read_there_is_an_error_here(answer):
    """And none that nobody hears of, for which the run waits."""

    async def said():
        grader = _Open(None, SimpleNamespace(decode=lambda *_, **__: 1 / 0))
        grader.grade(pack_answer(7, *answer()))
        return await asyncio.wait_for(grader.said(), 10)

    ((number, error),) = asyncio.run(said())
    assert (number, type(error)) == (7, RewardError)
    assert "an answer to prompt 3 cannot be graded beside the servers: ZeroDivisionError" in str(error)


class Actor:
    """Of a grader process. verdict: of every answer; None: it hangs, until it is killed."""

    def __init__(self, verdict):
        loop = asyncio.get_running_loop()
        self.said, self.signs = loop.create_future(), loop.create_future()
        self.exchange = SimpleNamespace(remote=lambda key, packed: self.said)
        self.lives = SimpleNamespace(remote=lambda: self.signs)
        if verdict is not None:
            self.said.set_result([(7, verdict)])

    def kill(self):
        for future in (self.said, self.signs):
            future.set_exception(RayActorError())


def test_a_grader_process_that_hangs_is_ended_and_another_grades_what_it_had(monkeypatch):
    monkeypatch.setattr("pipeline.rollout.remote_grading._HANGS_S", 0.01)
    monkeypatch.setattr("pipeline.rollout.remote_grading.ray", SimpleNamespace(kill=Actor.kill))

    async def ask():
        host = SimpleNamespace(actor=Actor(None), died=lambda actor, _: setattr(host, "actor", Actor(verdict)))
        return await asyncio.wait_for(_Line(host, 0).ask(7, b"an answer"), 10)

    verdict = Verdict(reward=1.0)
    assert asyncio.run(ask()) is verdict


def test_a_grader_process_that_lives_may_take_its_time(monkeypatch):
    monkeypatch.setattr("pipeline.rollout.remote_grading._HANGS_S", 0.01)
    monkeypatch.setattr("pipeline.rollout.remote_grading.ray", SimpleNamespace(kill=pytest.fail))

    async def ask():
        actor = Actor(None)
        signs = iter([*[None] * 2, [(7, verdict)]])

        def lives():
            if (said := next(signs)) is not None:
                actor.said.set_result(said)
            (sign := asyncio.get_running_loop().create_future()).set_result(None)
            return sign

        actor.lives.remote = lives
        return await asyncio.wait_for(_Line(SimpleNamespace(actor=actor), 0).ask(7, b"an answer"), 10)

    verdict = Verdict(reward=1.0)
    assert asyncio.run(ask()) is verdict


def test_rewards_parts_failures_and_texts_are_those_of_a_grader_of_this_process(graders, tokenizer, answer):
    rewards = (
        FunctionReward(function="tests.support.hostile:verify", name="hostile", weight=0.3),
        ExactMatchReward(name="exact", weight=0.7, sources=("sums",)),
    )
    wanted = [("right", "12"), ("raise", "12"), ("exit", "7"), ("value", "12"), ("hang", "1"), ("nan", "12")]
    groups = []
    for origin in ("sums:1", "other:1"):
        pairs = [answer(do, text, origin, answer="12", value=0.1) for do, text in wanted]
        groups += [Group(prompt, (episode, episode)) for prompt, episode in pairs]
    found = []
    for where in (OwnGraders(tokenizer), graders):
        with where.open(rewards, GRADING) as grading:
            found.append(grade(groups, grading, least=2))
    (here, failed_here), (there, failed_there) = found
    assert failed_here == failed_there
    assert failed_here.by_kind.total() == 16
    for one, other in zip(here, there, strict=True):
        for own, far in zip(one.episodes, other.episodes, strict=True):
            assert None not in (own.grade_s, far.grade_s)
            assert replace(own, grade_s=None) == replace(far, grade_s=None)
    assert here[0].episodes[0].parts == {"hostile": 1.0, "exact": 1.0}
    assert there[6].episodes[0].parts == {"hostile": 1.0}
    assert there[0].episodes[0].answer == "12"


def test_answers_are_shared_by_the_hosts_and_a_quick_one_does_not_wait_for_a_slow_one(graders, answer):
    async def run(grading):
        async with grading.judge() as judge:
            slow = [asyncio.create_task(judge.ask(*answer("hang"))) for _ in range(2)]
            await asyncio.sleep(0)
            open_ = [len(line.open) for line in judge._lines]
            quick = await asyncio.gather(*(judge.ask(*answer("value", value=float(i))) for i in range(20)))
            return open_, [task.done() for task in slow], quick, await asyncio.gather(*slow)

    with graders.open((HOSTILE,), GRADING.model_copy(update={"timeout_s": 3.0})) as grading:
        open_, done, quick, slow = asyncio.run(run(grading))
    assert open_ == [1, 1]
    assert done == [False, False]
    assert [verdict.reward for verdict in quick] == list(map(float, range(20)))
    assert [verdict.kind for verdict in slow] == ["timeout", "timeout"]


def test_the_verdict_on_an_answer_that_was_given_up_is_nobody_elses(graders, answer):
    async def give_up(grading):
        async with grading.judge() as judge:
            tasks = [asyncio.create_task(judge.ask(*answer("slow", text="1"))) for _ in range(4)]
            await asyncio.sleep(0.2)
        return await asyncio.gather(*tasks, return_exceptions=True)

    with graders.open((HOSTILE,), GRADING) as grading:
        given_up = asyncio.run(give_up(grading))
        verdicts = grading.ask([answer("value", text="2", value=float(i)) for i in range(8)])
    assert all(isinstance(error, asyncio.CancelledError) for error in given_up)
    assert [(verdict.reward, verdict.response) for verdict in verdicts] == [(float(i), "2") for i in range(8)]


def test_variables_and_modules_are_found_as_this_process_would(graders, answer, tmp_path, monkeypatch):
    (tmp_path / "only_here_verifier.py").write_text(
        "import os\ndef verify(prompt, *_):\n    return float(os.environ.get(prompt.metadata['name']) == 'here')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("JUDGE_KEY", "OTHER_KEY", "A_SETTING"):
        monkeypatch.setenv(name, "here")
    own = FunctionReward(function="only_here_verifier:verify")
    with graders.open((own,), GRADING.model_copy(update={"environment": ("JUDGE_KEY",)})) as grading:
        verdicts = grading.ask([answer(name=name) for name in ("JUDGE_KEY", "OTHER_KEY", "A_SETTING")])
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 1.0]


def test_a_folder_that_the_node_does_not_have_is_an_error_with_words(graders, answer, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setattr(os, "getcwd", lambda: str(tmp_path / "gone"))
    with graders.open((HOSTILE,), GRADING) as grading, pytest.raises(VerifierError, match="gone, where the run was"):
        grading.ask([answer()])


def test_what_cannot_be_loaded_or_is_graded_by_nobody_is_the_same_error(graders, answer):
    missing, sums = FunctionReward(function="no_such_module:verify"), ExactMatchReward(sources=("sums",))
    with graders.open((missing,), GRADING) as grading, pytest.raises(VerifierError, match="no_such_module"):
        grading.ask([answer(), answer()])
    with graders.open((sums,), GRADING) as grading, pytest.raises(RewardError, match="no verifier grades the source"):
        grading.ask([answer(origin="other:1")])


def test_what_a_killed_process_had_open_is_graded_again_and_its_verifiers_end(ray_up, model, answer, capfd):
    async def run(graders, grading):
        async with grading.judge() as judge:
            tasks = [asyncio.create_task(judge.ask(*answer(do))) for do in ("deaf_grandchild_and_hang", "right")]
            await tasks[1]
            while not left_behind():
                await asyncio.sleep(0.05)
            process = process_of(graders._hosts[0])
            verifiers = [process, *below(process, parents()), *left_behind()]
            os.kill(process, signal.SIGKILL)
            return verifiers, await asyncio.gather(*tasks, judge.ask(*answer("value", value=2.0)))

    with remote_graders([None], model, False) as graders, graders.open((HOSTILE,), GRADING) as grading:
        verifiers, verdicts = asyncio.run(run(graders, grading))
        assert [(verdict.reward, verdict.kind) for verdict in verdicts] == [(None, "timeout"), (1.0, None), (2.0, None)]
        assert ended(verifiers)
        again = process_of(graders._hosts[0])
    assert "a grader process died" in capfd.readouterr().err
    assert ended([again])
    assert left_behind() == []


@pytest.mark.proof
def test_one_that_dies_again_and_again_is_an_error_for_all_that_are_open(ray_up, model, answer, capfd):
    async def run(graders, grading):
        async with grading.judge() as judge:
            tasks = [asyncio.create_task(judge.ask(*answer("hang"))) for _ in range(2)]
            await asyncio.sleep(0.1)
            killed = set()
            while not all(task.done() for task in tasks):
                with contextlib.suppress(RayActorError):  # it was killed, and nobody has seen that yet
                    process = await asyncio.to_thread(process_of, graders._hosts[0])
                    if process not in killed:
                        killed.add(process)
                        os.kill(process, signal.SIGKILL)
                await asyncio.sleep(0.05)
            return await asyncio.gather(*tasks, return_exceptions=True)

    patient = GRADING.model_copy(update={"timeout_s": 60.0})
    with remote_graders([None], model, False) as graders, graders.open((HOSTILE,), patient) as grading:
        errors = asyncio.run(run(graders, grading))
    assert [type(error) for error in errors] == [RewardError, RewardError]
    assert "died 3 times for the same answers" in str(errors[0])


@pytest.mark.proof
def test_nothing_outlives_a_controller_that_is_killed(model):
    script = f"""
import asyncio, json, os, sys
from pathlib import Path
from pipeline.cluster.ray_session import ray_session
from pipeline.config.run import ClusterConfig
from pipeline.rewards.processes import below, parents
from pipeline.rollout.remote_grading import _Line, remote_graders
from tests.pipeline.rollout.test_remote_grading import *

async def run(graders, grading, answer):
    async with grading.judge() as judge:
        tasks = [asyncio.create_task(judge.ask(*answer(do))) for do in ("hang_deaf", "deaf_grandchild_and_hang")]
        process = await asyncio.to_thread(process_of, graders._hosts[0])
        while not left_behind() or len(below(process, parents())) < 4:  # guard, supervisor, two workers
            await asyncio.sleep(0.05)
        print(json.dumps([process, *below(process, parents()), *left_behind()]), flush=True)
        await asyncio.sleep(1000)

patient = GRADING.model_copy(update={{"timeout_s": 60.0}})
with ray_session(ClusterConfig(object_store_gb=0.1), cpus=1):
    with remote_graders([None], Path({str(model)!r}), False) as graders, graders.open((HOSTILE,), patient) as grading:
        asyncio.run(run(graders, grading, answer.__wrapped__(load_tokenizer({str(model)!r}))))
"""
    controller = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    processes = json.loads(controller.stdout.readline())
    assert len(processes) >= 6
    controller.kill()
    assert controller.wait(60) == -signal.SIGKILL
    assert ended(processes, 60.0)
    assert left_behind() == []
    controller.stdout.close()
