"""A group whose Ray has died asks it for nothing: Ray would end the process before it could remove anything."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from pipeline.trainer import waits
from pipeline.trainer.group import TrainerGroup
from pipeline.trainer.waits import TrainerError


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
