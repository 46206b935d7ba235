"""How often a failed run begins again, and from where."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from pipeline.checkpoints.store import CheckpointError, CheckpointStore
from pipeline.cluster.placement import PlacementError
from pipeline.cluster.ray_session import RayError
from pipeline.config import load_config
from pipeline.engine.server import ServerError
from pipeline.loop import run as loop_run
from pipeline.loop.compare import DisagreementError
from pipeline.loop.restarts import RestartLimitError, Restarts
from pipeline.loop.stop import StopRequest
from pipeline.stored import StoredRoutesLostError
from pipeline.trainer.spikes import SpikesError
from pipeline.trainer.waits import RankDiedError, TrainerError

DIED = TrainerError("trainer rank 0 died")


def test_restarts_are_counted_within_the_window_and_over_the_run():
    now = 0.0
    restarts = Restarts(2, 600.0, lambda: now)
    assert restarts.again(DIED) == "restart 1 of 2 within 10 minutes"
    now = 599.0
    assert restarts.again(DIED) == "restart 2 of 2 within 10 minutes"
    with pytest.raises(RestartLimitError, match=r"begun again 2 times within 10 minutes .*rank 0 died"):
        restarts.again(DIED)
    now = 601.0  # the first is forgotten, the second is not
    assert restarts.again(DIED) == "restart 2 of 2 within 10 minutes"
    assert restarts.count == 3


def test_without_restarts_the_failure_is_what_the_user_sees():
    with pytest.raises(TrainerError) as raised:
        Restarts(0, 600.0).again(DIED)
    assert raised.value is DIED


@pytest.fixture
def attempts(tmp_path, monkeypatch):
    """Runs whose attempts end as a list says, from checkpoints that are there from the first on."""

    class Attempts:
        resumed: list[bool]
        spoiled: list[int]

        def run(self, *ends: Exception, restarts: int = 3, checkpoint: bool = True, stop=None) -> Path:
            self.resumed, self.spoiled, left = [], [], list(ends)

            def attempt(*_, resume, spoiled, **__):
                self.resumed.append(resume)
                self.spoiled.append(spoiled)
                if left:
                    raise left.pop(0)
                return tmp_path

            monkeypatch.setattr(loop_run, "_claimed", attempt)
            monkeypatch.setattr(CheckpointStore, "latest", lambda _: tmp_path / "step_4" if checkpoint else None)
            settings = [f"run.directory={tmp_path / 'run'}", f"run.max_restarts={restarts}"]
            return loop_run.train(load_config("configs/quickstart.yaml", settings), stop=stop)

    return Attempts()


def test_a_run_whose_engine_failed_is_resumed(attempts, capsys, tmp_path):
    attempts.run(DIED, ServerError("the SGLang server died"))
    assert attempts.resumed == [False, True, True]
    said = capsys.readouterr().err
    assert f"trainer rank 0 died\nrestart 1 of 3 within 60 minutes, from {tmp_path / 'step_4'}" in said
    assert "the SGLang server died\nrestart 2 of 3" in said


@pytest.mark.parametrize(
    "failure", [PlacementError("3 GPUs are missing"), RayError("Ray did not start"), StoredRoutesLostError("a node")]
)
def test_a_run_whose_cluster_failed_is_resumed(attempts, failure):
    attempts.run(failure)
    assert attempts.resumed == [False, True]


def test_skipped_updates_in_a_row_go_back_and_the_prompts_up_to_them_are_passed_over(attempts):
    attempts.run(SpikesError("3 steps in a row", 9), DIED)
    assert attempts.resumed == [False, True, True]
    assert attempts.spoiled == [0, 9, 0]


@pytest.mark.parametrize(("cause", "resumed"), [(RankDiedError("rank 0 died"), True), (OSError("disk full"), False)])
def test_a_checkpoint_that_a_dead_rank_did_not_write_is_no_end(attempts, cause, resumed):
    failure = CheckpointError("checkpoint step_6 was not written")
    failure.__cause__ = cause
    with contextlib.nullcontext() if resumed else pytest.raises(CheckpointError):
        attempts.run(failure)
    assert attempts.resumed == ([False, True] if resumed else [False])


@pytest.mark.parametrize(
    ("end", "settings"),
    [
        (DisagreementError("the engines disagree"), {}),  # the next attempt would find the same
        (DIED, {"checkpoint": False}),
        (DIED, {"restarts": 0}),
    ],
)
def test_what_another_attempt_would_not_mend_ends_the_run(attempts, end, settings):
    with pytest.raises(type(end), match=str(end)):
        attempts.run(end, **settings)
    assert attempts.resumed == [False]


def test_a_run_that_was_asked_to_end_is_not_begun_again(attempts):
    stop = StopRequest(None)
    stop.signal_name = "SIGTERM"
    with pytest.raises(TrainerError):
        attempts.run(DIED, stop=stop)
    assert attempts.resumed == [False]
