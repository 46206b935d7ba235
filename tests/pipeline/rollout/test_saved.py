"""What a checkpoint has of rollouts is what it was given."""

from __future__ import annotations

import numpy as np

from pipeline.rollout.saved import Saved, read_saved
from pipeline.types import Prompt
from tests.support.episodes import plain_rollout


def test_answers_keep_their_sample_numbers_and_prompts_without_an_answer_are_there(tmp_path):
    def prompt(index):
        return Prompt(np.zeros(1, np.int32), f"prompt {index}", {"answer": index}, index, f"made:{index}")

    answers = {2: plain_rollout([1], -np.ones(1)), 0: plain_rollout([7, 8], -np.ones(2), finish_reason="abort")}
    Saved({}, {}, {}, {4: (prompt(4), answers), 9: (prompt(9), {})}).write(tmp_path)
    read = read_saved(tmp_path, {"prompts": 10})
    assert read is not None
    assert read.cursor == {"prompts": 10}
    asked, found = read.open[4]
    assert (asked.text, asked.metadata, asked.origin) == ("prompt 4", {"answer": 4}, "made:4")
    assert {n: (r.response_ids.tolist(), r.finish_reason) for n, r in found.items()} == {
        0: ([7, 8], "abort"),
        2: ([1], "stop"),
    }
    assert read.open[9][1] == {}
