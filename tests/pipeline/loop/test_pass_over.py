"""A rollback does not meet the prompts again that led to it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from pipeline.checkpoints.resume import Start
from pipeline.config import load_config
from pipeline.loop.open_loop import _prepare_trainers
from pipeline.observe.long_phase import LongPhases


def prompts_taken(start):
    """What of the source is asked for while trainers go on from a checkpoint."""
    asked = []

    def nothing(*_, **__):
        pass

    trainers = SimpleNamespace(build=nothing, restart_optimizer=nothing, resume=nothing, progress=nothing)
    source = SimpleNamespace(restore=lambda cursor: asked.append(cursor), take=asked.append)
    config = load_config("configs/quickstart.yaml", ["rollout.prompts_per_step=4"])
    _prepare_trainers(config, Path("model"), None, trainers, source, start, nothing, nothing, LongPhases())
    return asked


def test_the_prompts_from_the_checkpoint_to_the_bad_step_are_passed_over():
    start = Start(Path("step_6"), SimpleNamespace(step=6, cursor="at 24", supervised=0), [])
    assert prompts_taken(start) == ["at 24"]
    assert prompts_taken(start.past(9)) == ["at 24", 12]
    assert start.past(0).pass_over == start.past(6).pass_over == 0
