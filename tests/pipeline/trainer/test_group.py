"""A group whose Ray has died asks it for nothing: Ray would end the process before it could remove anything."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError, RayTaskError

from megatron_ext.parts import NotFinite
from pipeline.cluster.colocation import Apart
from pipeline.trainer import waits
from pipeline.trainer.group import TrainerGroup
from pipeline.trainer.waits import TrainerError
from pipeline.weights import WeightTransferError


@pytest.mark.parametrize("call", [lambda it: it.load([]), lambda it: it.send_weights(1), lambda it: it.where()])
def test_no_call_is_made_of_a_ray_that_is_gone(monkeypatch, call):
    made = TrainerGroup.__new__(TrainerGroup)
    made.ranks, made.weights_timeout_s, made._sending = [object()], 1.0, threading.RLock()  # nothing can be asked of it
    monkeypatch.setattr(waits, "ended", lambda: "Ray's process the raylet was killed by SIGKILL")
    with pytest.raises(TrainerError, match="raylet was killed by SIGKILL"):
        call(made)


def test_of_ranks_that_were_asked_alone_the_one_that_died_is_named(monkeypatch, tmp_path):
    def get(answer):
        raise RayActorError

    monkeypatch.setattr(waits, "ended", lambda: "")
    monkeypatch.setattr(waits, "what_died", lambda: "")
    monkeypatch.setattr(waits, "ray", SimpleNamespace(wait=lambda pending, **_: (pending, []), get=get))
    ranks = waits.Ranks([None] * 4, tmp_path, 1.0, lambda: None)
    with pytest.raises(waits.RankDiedError, match=r"trainer rank 3 died during end_profile; its log: .*rank3\.log"):
        ranks._wait(["answer"], "end_profile", ranks=[3])


class CauseError(Exception):
    """What a rank raised."""


def a_rank_failed(method: str, why: Exception | None = None) -> RayTaskError:
    return RayTaskError(method, "", why or CauseError("no experts"))


@pytest.mark.parametrize(
    ("method", "error", "kind"),
    [("measure", a_rank_failed("measure"), TrainerError), ("connect", RayActorError(), waits.RankDiedError)],
    ids=["in a collective", "a death"],
)
def test_a_failure_ends_what_another_thread_waits_for(monkeypatch, tmp_path, method, error, kind):
    """A server that came back is sent weights meanwhile: the ranks that still live never answer that."""
    ranks, asked = ranks_whose_calls(monkeypatch, tmp_path, fails={"this": error})
    beside = Beside(lambda: ranks._wait(["no answer"], "send_weights"))
    asked.wait()
    with pytest.raises(kind):
        ranks._wait(["this"], method)
    assert type(beside.error()) is kind
    assert beside.error().args == ranks._failure.args
    with pytest.raises(kind):  # nor is any later call answered
        ranks._wait(["no answer"], "connect")


def test_a_failure_of_what_ranks_do_apart_ends_nothing_else(monkeypatch, tmp_path):
    """Such as a save on a disk that is full, or a server that does not take weights."""
    ranks, asked = ranks_whose_calls(monkeypatch, tmp_path, fails={"this": a_rank_failed("begin_save")})
    beside = Beside(lambda: ranks._wait(["some answer"], "send_weights"))
    asked.wait()
    with pytest.raises(TrainerError, match="no experts"):
        ranks._wait(["this"], "begin_save")
    answered.set()
    assert beside.error() is None


def test_what_threads_wait_for_ends_with_the_run_but_not_a_save(monkeypatch, tmp_path):
    ranks, asked = ranks_whose_calls(monkeypatch, tmp_path, fails={})
    beside = Beside(lambda: ranks._wait(["no answer"], "send_weights"))
    saving = Beside(lambda: ranks._wait(["some answer"], "describe_save", watched=False))
    asked.wait()
    ranks.give_up(ValueError("a reward is missing"))
    assert str(beside.error()) == "the run has ended: a reward is missing"
    answered.set()
    assert saving.error() is None


def test_a_save_is_described_however_long_that_takes_where_the_ranks_have_failed(monkeypatch, tmp_path):
    """A checkpoint that is whole counts, whatever the ranks do meanwhile: they are in a collective, and save beside."""
    ranks, _ = ranks_whose_calls(monkeypatch, tmp_path, fails={"this": a_rank_failed("measure")})
    with pytest.raises(TrainerError):
        ranks._wait(["this"], "measure")
    assert ranks._wait(["third look"], "describe_save", watched=False) == ["third look"]


@pytest.mark.parametrize("busy", [True, False])
def test_weights_that_wait_for_what_the_ranks_do_before_have_their_time_afterwards(monkeypatch, tmp_path, busy):
    """A server that comes back gets them beside a long pass over log-probs."""
    ranks, asked = ranks_whose_calls(monkeypatch, tmp_path, fails={})
    seconds = itertools.count(0, 10)  # a look at the clock takes ten
    monkeypatch.setattr(waits, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    monkeypatch.setattr(ranks, "_positions", lambda of, *_: dict.fromkeys(of, 0))
    measuring = Beside(lambda: ranks._wait(["some answer"], "measure", 1e9)) if busy else None
    if busy:
        asked.wait()
    with contextlib.nullcontext() if busy else pytest.raises(TrainerError, match="did not finish send_weights in 1 s"):
        ranks._wait(["third look"], "send_weights", 1.0, restart=True)
    answered.set()
    assert measuring is None or measuring.error() is None


@pytest.mark.parametrize(
    "fails",
    [{"0": a_rank_failed("begin_save")}, {"0": a_rank_failed("begin_save"), "1": RayActorError()}],
    ids=["not known yet", "known"],
)
def test_a_rank_that_fails_in_a_collective_because_another_died_has_not_failed(monkeypatch, tmp_path, fails):
    """A run begins again after a death, also where it was to save; what makes a save fail is met again."""
    ranks, _ = ranks_whose_calls(monkeypatch, tmp_path, fails=fails | {"of a dead rank": RayActorError()})
    monkeypatch.setattr(ranks, "_positions", functools.partial(waits.Ranks._positions, ranks))
    monkeypatch.setattr(ranks, "_ask", lambda asked, *_: ["of a dead rank"] * len(asked))
    ranks.ranks = [None, None]
    with pytest.raises(waits.RankDiedError, match=r"^trainer rank 1 died during begin_save; its log: .*rank1\.log$"):
        ranks._wait(["0", "1"], "begin_save")


def test_where_a_rank_died_in_a_transfer_its_servers_have_not_failed():
    def died():
        raise waits.RankDiedError("trainer rank 1 died") from a_rank_failed("send_weights", WeightTransferError("left"))

    with pytest.raises(waits.RankDiedError):
        TrainerGroup._of_servers(died)


def test_rank_0_may_die_as_it_is_asked_whom_it_waits_for(monkeypatch, tmp_path):
    ranks, _ = ranks_whose_calls(monkeypatch, tmp_path, fails={"servers": RayActorError()})
    monkeypatch.setattr(ranks, "_ask", lambda *_: ["servers"])
    assert ranks._servers_awaited() == []


answered = threading.Event()


def ranks_whose_calls(monkeypatch, tmp_path, fails) -> tuple[waits.Ranks, threading.Event]:
    """Ranks of whose calls "no answer" is never answered, "some answer" once `answered` is set, "third look" when it is
    looked for thrice, and `fails` fail; and an event: one is waited for."""
    asked, looks = threading.Event(), Counter()
    answered.clear()

    def is_there(call):
        looks[call] += 1
        if call == "third look":
            return looks[call] == 3
        return call in fails or (call == "some answer" and answered.wait(0.01))

    def wait(pending, **_):
        asked.set()
        done = list(filter(is_there, pending))
        return done, [call for call in pending if call not in done]

    def get(call):
        if call in fails:
            raise fails[call]
        return call

    monkeypatch.setattr(waits, "ended", lambda: "")
    monkeypatch.setattr(waits, "what_died", lambda: "")
    monkeypatch.setattr(waits, "ray", SimpleNamespace(wait=wait, get=get))
    ranks = waits.Ranks([], tmp_path, 60.0, lambda: None)
    monkeypatch.setattr(ranks, "_positions", lambda of, *_: {})
    return ranks, asked


class Beside:
    """A call in a thread of its own."""

    def __init__(self, call):
        self._error, self._call = None, call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        try:
            self._call()
        except TrainerError as error:
            self._error = error

    def error(self) -> TrainerError | None:
        """What it ended with; it must have ended within a minute."""
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self._error


def test_samples_are_waited_for_by_the_call_that_follows_and_once(monkeypatch, tmp_path):
    monkeypatch.setattr(TrainerGroup, "_put", lambda self, value: value)
    monkeypatch.setattr(TrainerGroup, "_ask", lambda self, ranks, method, *args, **how: [f"answer to {method}"])
    waited = []
    monkeypatch.setattr(TrainerGroup, "_wait", lambda self, answers, method: waited.append((method, answers)))
    group = TrainerGroup.__new__(TrainerGroup)
    group.ranks, group.turns, group._loading = [object()], Apart(), []
    group._sending = threading.RLock()
    group.load([])
    assert waited == []
    group._call("measure")
    group._call("where")
    assert waited == [(name, [f"answer to {name}"]) for name in ("load", "measure", "where")]


def test_weights_that_are_not_finite_are_told_by_rank_and_of_those_that_answer(monkeypatch):
    wrong = [NotFinite("weight", f"w{i}", 0, None, 1, 9) for i in range(7)]
    answers = {"sound": [], "wrong": wrong, "died": RayActorError()}

    def get(answer):
        if isinstance(answers[answer], Exception):
            raise answers[answer]
        return answers[answer]

    monkeypatch.setattr(TrainerGroup, "_ask", lambda self, ranks, method: list(ranks))
    fake = SimpleNamespace(wait=lambda asked, **_: ([a for a in asked if a in answers], []), get=get)
    monkeypatch.setattr("pipeline.trainer.group.ray", fake)
    group = TrainerGroup.__new__(TrainerGroup)
    group.ranks = ["sound", "died", "hangs", "wrong"]
    (said,) = group.weights_not_finite()
    assert said.startswith("weights of trainer rank 3 are not finite: w0 (1 of 9 numbers), w1 (1 of 9 numbers), ")
    assert said.endswith("w4 (1 of 9 numbers) and 2 more")
