"""What a run does about servers that are to join or leave, and what it refuses, with doubles of servers and trainer."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

from pipeline.config import load_config
from pipeline.engine.control import HeldWeights
from pipeline.engine.fleet import ServerState
from pipeline.engine.joining.server_requests import answered, ask, read_now, write_keys
from pipeline.engine.keys import ServerKeys
from pipeline.engine.server import ServerError
from pipeline.loop.compare import DisagreementError
from pipeline.loop.evaluations import on_own_loop
from pipeline.loop.joining import changes as module
from pipeline.loop.joining.changes import ServerChanges
from tests.support.episodes import plain_rollout
from tests.support.fake_servers import Server, Trainers, fleet_of

NEW = "http://new:1"
RIGHT = ServerKeys("right", "right")
INFO = {"context_length": 4096, "dtype": "float32"}
ROLLOUTS = [plain_rollout([1, 2, 3], np.zeros(3)) for _ in range(9)]


class Control:
    """Of a server: the new one says what a case wants."""

    new: ClassVar[dict] = {}

    def __init__(self, url, *, keys, timeout_s):
        self.url, self.keys = url, keys

    def server_info(self):
        if self.url == NEW and self.new.get("gone"):
            raise ServerError(f"{NEW}/server_info cannot be reached: refused")
        if self.url == NEW and self.keys != RIGHT:
            raise ServerError(f"{NEW}/server_info answered 401: Unauthorized")
        return INFO | (self.new.get("info", {}) if self.url == NEW else {})

    def held_weights(self, tensors):
        more = self.new.get("parameters", []) if self.url == NEW else []
        return [HeldWeights({}, ["layers.0", "layers.1", *more])]


class Ranks(Trainers):
    """differs: tensors that the new server holds otherwise."""

    differs = ()

    def weight_differences(self):
        return list(self.differs)


class Scoring(Server):
    """The new server's client."""

    async def score(self, ids):
        self.asked.append((len(ids), self.version))
        return np.zeros(len(ids) - 1, np.float32), None


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of two servers after a step, whose changes are made by `after`."""
    monkeypatch.setattr(module, "SGLangControl", Control)
    monkeypatch.setattr(Control, "new", {})
    monkeypatch.setattr(module.FleetServer, "answers", lambda *_: True)

    class Loop:
        config, shape = load_config("configs/quickstart.yaml"), None
        fleet, trainers, on_servers = fleet_of(Server("a"), Server("b")), Ranks(), staticmethod(on_own_loop)
        replay = config.replay

        def compare_scored(self, scored):
            self.scored = scored
            if self.trainers.bad:
                raise DisagreementError("the log-probs differ by 1.0 nats on average")
            return {"mismatch/abs_logprob": 1e-7, "staleness/scored_tokens": 3.0 * len(scored)}

    loop, said = Loop(), []
    loop.new = Scoring("new:1")
    monkeypatch.setattr(module, "client_of", lambda *_, **__: loop.new)
    loop.fleet.transfer(loop.trainers)
    loop.trainers.sent.clear()
    write_keys(tmp_path / "keys", RIGHT)
    write_keys(tmp_path / "wrong", ServerKeys("wrong", "wrong"))

    def after(action, url, keys="keys"):
        request = ask(tmp_path, action, url, None if keys is None else tmp_path / keys, None)
        with ServerChanges(loop, tmp_path, said.append) as changes:
            changes.after(ROLLOUTS)
        told = answered(tmp_path, request)
        assert said[-1] == told.words
        return told

    after.loop, after.path = loop, tmp_path
    return after


def states(run):
    return [server.state.value for server in run.loop.fleet.servers]


def test_no_server_joins_where_engines_take_turns(run):
    config = run.loop.config
    run.loop.config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"colocated": True})})
    told = run("add", NEW)
    assert told.refused
    assert "take turns on their GPUs (cluster.colocated)" in told.words
    assert states(run) == ["serving", "serving"]


def test_a_server_joins_once_it_holds_the_weights_and_scores_as_the_trainer_does(run):
    told = run("add", NEW)
    loop = run.loop
    assert not told.refused
    assert "has joined as server 2, with weights 1" in told.words
    assert states(run) == ["serving"] * 3
    assert loop.trainers.sent == [(1, [NEW], True)], "to it alone"
    assert loop.new.asked == [(4, 1)] * loop.config.checks.scored_rollouts
    assert [rollout for rollout, *_ in loop.scored] == ROLLOUTS[: loop.config.checks.scored_rollouts]
    loop.fleet.transfer(loop.trainers)
    assert loop.trainers.sent[-1] == (2, ["http://a", "http://b", NEW], True)
    assert [row["url"] for row in read_now(run.path)] == ["http://a", "http://b", NEW]
    assert run("add", NEW).words.endswith("it is a server of the run already, and serving")


@pytest.mark.parametrize(
    ("new", "keys", "words"),
    [
        ({"gone": True}, "keys", "cannot be reached"),
        ({}, "wrong", "these keys do not open it"),
        ({}, None, "its keys are missing; give --keys FILE"),
        ({"info": {"dtype": "bfloat16"}}, "keys", "it runs with dtype=bfloat16, the others with float32"),
        ({"parameters": ["layers.2"]}, "keys", "it serves another model: layers.2 is only there"),
        ({"refuses": True}, "keys", "unlucky"),
        ({"late": True}, "keys", "ask again after a step"),
        ({"differs": ["layers.0 is otherwise"]}, "keys", "it does not hold the weights that were sent: layers.0"),
        ({"disagrees": True}, "keys", "the log-probs differ"),
    ],
)
def test_what_is_not_as_the_others_does_not_join_and_the_run_goes_on(run, monkeypatch, new, keys, words):
    monkeypatch.setattr(Control, "new", new)
    trainers = run.loop.trainers
    trainers.differs, trainers.current = new.get("differs", ()), not new.get("late")
    trainers.bad = [1] if new.get("refuses") else [7] if new.get("disagrees") else []
    told = run("add", NEW, keys)
    assert told.refused
    assert told.words.startswith(f"{NEW} is not added: ")
    assert words in told.words
    assert states(run) == ["serving"] * 2


def test_a_server_leaves_its_process_ends_and_the_last_one_stays(run):
    told = run("remove", "http://a", None)
    assert told.words == "http://a has left; its open answers go on elsewhere"
    assert states(run) == ["left", "serving"]
    assert not run.loop.fleet.servers[0].process.living
    run.loop.fleet.transfer(run.loop.trainers)
    assert run.loop.trainers.sent == [(2, ["http://b"], True)]
    last = run("remove", "http://b", None)
    assert last.refused
    assert "is the last server that takes requests, and cannot leave; add another first" in last.words
    unknown = run("remove", "http://a", None)
    assert unknown.words == "http://a is not removed: the run has no server at http://a; it has http://b"


def test_one_of_the_runs_own_that_left_can_be_added_without_keys(run):
    run("remove", "http://a", None)
    assert "is started again" in run("add", "http://a", None).words
    assert run.loop.fleet.servers[0].state is not ServerState.LEFT
