"""A run whose engines take turns, each without its memory meanwhile, is the run whose engines do not, bit for bit.

On a CPU the trainer's storages really go and come back, and a server that gives its memory away forgets its weights.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.dumps.dump import dump_path, read_dump
from tests.support.command import SMALL

RUN = [*SMALL, "supervised.steps=0", "rewards=tests.support.verifiers:length", "debug.dump_rollouts=true",
       "server.deterministic=true", "train.steps=2", "checkpoint.every_steps=1",
       "evaluate=[{name: held-out, prompts: 4, every_steps: 1}]", "weights.checksum_every=1"]  # fmt: skip
ARRAYS = ("prompt_ids", "response_ids", "rollout_logprobs", "routes", "weight_versions", "trained")
CLOCKED = ("time/", "throughput/", "idle/", "servers/", "turns/", "devices/", "straggler/", "sync/")


def metrics(run) -> list[dict]:
    lines = (run.run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(CLOCKED)} for line in lines]


@pytest.mark.proof
def test_rollouts_metrics_evaluations_and_the_model_are_those_of_engines_apart(command):
    apart, turns = command(*RUN), command(*RUN, "cluster.colocated=true")
    for run in (apart, turns):
        assert run.end(200) == 0, run.text()
        assert run.orphans() == []
    for step in (1, 2):
        one, other = (read_dump(dump_path(run.run / "dumps", step)).batch for run in (apart, turns))
        assert one.version == other.version == step - 1
        assert len(one.rollouts) == len(other.rollouts) > 0
        for a, b in zip(one.rollouts, other.rollouts, strict=True):
            assert all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ARRAYS)
    assert metrics(apart) == metrics(turns)
    assert any(name.startswith("eval/") for name in metrics(turns)[-1])
    (weights,), (same,) = (sorted((run.run / "hf").glob("*.safetensors")) for run in (apart, turns))
    first, second = load_file(weights), load_file(same)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    counted = [json.loads(line) for line in (turns.run / "metrics.jsonl").read_text().splitlines()]
    assert [row["turns/count"] >= 2 for row in counted] == [True, True]
