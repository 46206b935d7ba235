"""reasoning-gym's own verdicts, by its own sets."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.rewards import Component, Question
from pipeline.rewards.registry import load
from pipeline.types import Prompt

IDS = np.zeros(3, np.int32)
MADE = {"seed": 3, "size": 5, "index": 2, "parameters": {"min_terms": 2, "max_terms": 3}}


@pytest.fixture(scope="module")
def entry():
    import reasoning_gym  # 1 s, of the worker that has this file

    return reasoning_gym.create_dataset("chain_sum", seed=3, size=5, min_terms=2, max_terms=3)[2]


def ask(metadata, response, finish_reason="stop", tag="answer"):
    verifier = load(Component("reasoning_gym", {"kind": "reasoning_gym", "tag": tag}))
    return verifier(Question(Prompt(IDS, "", metadata, 0), response, IDS, finish_reason))


def test_an_entry_is_graded_by_the_task_that_made_it(entry):
    right = entry["answer"]
    made = {"task": "chain_sum", "question": entry["question"], "reasoning_gym": MADE}
    for metadata in (entry, made):
        assert ask(metadata, right) == 1.0
        assert ask(metadata, f"I add. <answer>1</answer> No: <answer> {right} </answer>.") == 1.0
        assert ask(metadata, f"{right} <answer>{int(right) + 1}</answer>") < 1.0
        assert ask(metadata, f"<answer>{right}</answer>", "length") == 0.0
    assert ask(entry, f"<answer>{right}</answer>", tag=None) < 1.0


def test_a_prompt_that_no_task_made_and_one_that_is_made_otherwise_now_are_named(entry):
    with pytest.raises(KeyError):
        ask({"answer": "1"}, "1")
    with pytest.raises(ValueError, match="this release of reasoning-gym makes another question"):
        ask({"task": "chain_sum", "question": "1 + 1?", "reasoning_gym": MADE}, "2")
