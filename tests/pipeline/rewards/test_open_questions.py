"""A grader that is asked one question at a time while others are graded: a real one, and one of made-up deaths."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time

import pytest

from pipeline.rewards import Asking, Grader, Limits, RewardError, Verdict, VerifierError
from tests.support.hostile import question

LIMITS = Limits(timeout_s=1.0, grace_s=0.2)


@pytest.fixture(scope="module")
def grader():
    with Grader("tests.support.hostile:verify", workers=2, limits=LIMITS) as made:
        made.wait_ready()
        yield made


def test_a_quick_answer_does_not_wait_for_a_slow_one(grader):
    async def both():
        async with Asking(grader) as asking:
            slow = asyncio.create_task(asking.ask(question("hang")))
            await asyncio.sleep(0.05)
            began = time.monotonic()
            quick = await asking.ask(question())
            took = time.monotonic() - began
            return quick, took, await slow

    quick, took, slow = asyncio.run(both())
    assert quick.reward == 1.0
    assert took < 0.5
    assert slow.kind == "timeout"


def test_many_at_once_each_get_their_own_verdict(grader):
    async def many():
        async with Asking(grader) as asking:
            kinds = ["right", "raise"] * 100
            return await asyncio.gather(*(asking.ask(question(do)) for do in kinds))

    verdicts = asyncio.run(many())
    assert [v.kind for v in verdicts] == [None, "raised"] * 100


def test_a_supervisor_that_dies_is_replaced_and_asked_again(grader):
    async def killed():
        async with Asking(grader) as asking:
            asked = [asyncio.create_task(asking.ask(question(do))) for do in ("slow", "hang")]
            await asyncio.sleep(0.05)
            os.kill(grader._process.pid, signal.SIGKILL)
            return await asyncio.gather(*asked)

    slow, hangs = asyncio.run(killed())
    assert (slow.reward, hangs.kind) == (1.0, "timeout")


def test_one_that_dies_again_and_again_is_an_error_for_all_that_are_open(grader):
    async def killed():
        async with Asking(grader) as asking:
            asked = [asyncio.create_task(asking.ask(question("hang"))) for _ in range(2)]
            for _ in range(3):
                await asyncio.sleep(0.2)
                os.kill(grader._process.pid, signal.SIGKILL)
            return await asyncio.gather(*asked, return_exceptions=True)

    errors = asyncio.run(killed())
    assert [type(error) for error in errors] == [RewardError, RewardError]
    assert "killed" in str(errors[0]) or "ended" in str(errors[0])
    grader.close()
    grader._start()


def test_a_verifier_that_cannot_be_loaded_is_an_error():
    async def ask():
        with Grader("tests.support.hostile:absent") as grader:
            async with Asking(grader) as asking:
                await asking.ask(question())

    with pytest.raises(VerifierError, match="has no function 'absent'"):
        asyncio.run(ask())


@pytest.mark.parametrize("error", [RuntimeError("no verdict"), OSError(12, "Cannot allocate memory")])
def test_whatever_goes_wrong_between_run_and_supervisor_is_raised_to_who_asked(grader, monkeypatch, error):
    def fail(_):
        raise error

    async def ask():
        async with Asking(grader) as asking:
            monkeypatch.setattr(grader, "exchange", fail)
            with pytest.raises(type(error)):
                await asyncio.wait_for(asking.ask(question()), 10)

    asyncio.run(ask())


def test_who_gives_up_leaves_the_others_their_verdicts(grader):
    async def give_up():
        async with Asking(grader) as asking:
            gone = asyncio.create_task(asking.ask(question("hang")))
            stays = asyncio.create_task(asking.ask(question("hang")))
            await asyncio.sleep(0.02)
            gone.cancel()
            return await stays, await asking.ask(question())

    slow, quick = asyncio.run(give_up())
    assert (slow.kind, quick.reward) == ("timeout", 1.0)


class Mortal:
    """A grader whose supervisor dies at each question's first exchange, and answers after its restart."""

    def __init__(self):
        self.ends = socket.socketpair()
        self.asked, self.restarts, self.sent, self.dead = 0, [], [], False

    def parts(self, asked):
        self.asked, self.dead = self.asked + 1, True
        return {self.asked: f"<{self.asked}>".encode()}

    def together(self, question, verdicts):
        return verdicts[0]

    def fileno(self):
        return self.ends[0].fileno()

    def exchange(self, outbox):
        if self.dead:
            return None
        if not outbox:
            return []
        self.sent.append(bytes(outbox))
        outbox.clear()
        return [(self.asked, Verdict(reward=float(self.asked)))]

    def restart(self, times):
        self.restarts.append(times)
        self.dead = False


def test_a_death_long_after_another_is_a_first_one_and_asks_nothing_again_that_was_answered():
    mortal = Mortal()

    async def in_turn():
        async with Asking(mortal) as asking:
            return [await asyncio.wait_for(asking.ask("a question"), 10) for _ in range(4)]

    assert [verdict.reward for verdict in asyncio.run(in_turn())] == [1, 2, 3, 4]
    assert mortal.restarts == [1] * 4
    assert mortal.sent == [b"<1>", b"<2>", b"<3>", b"<4>"]
    for end in mortal.ends:
        end.close()


def test_what_is_asked_at_one_moment_goes_out_in_one_write(grader, monkeypatch):
    sent, exchange = [], grader.exchange
    monkeypatch.setattr(grader, "exchange", lambda outbox: sent.append(len(outbox)) or exchange(outbox))

    async def many():
        async with Asking(grader) as asking:
            return await asyncio.gather(*(asking.ask(question()) for _ in range(50)))

    assert [v.reward for v in asyncio.run(many())] == [1.0] * 50
    assert len([size for size in sent if size]) == 1
