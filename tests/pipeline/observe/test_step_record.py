"""What a step leaves beside its numbers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from pipeline.data.tokenizer import load_tokenizer, write_character_tokenizer
from pipeline.objectives import ObjectiveConfig, resolve
from pipeline.observe.run_dir import RunDirectory
from pipeline.observe.step_record import (
    BIN_EDGES,
    TOKENS_SHOWN,
    clip_bounds,
    histogram,
    pass_rate_counts,
    shown_rollouts,
    step_record,
)
from pipeline.types import Group, Prompt
from tests.support.episodes import conversation, graded_group, plain_rollout, step_result

GSPO = resolve(ObjectiveConfig(preset="gspo", clip_low=0.02, clip_high=0.03))
CENTRE = len(BIN_EDGES) // 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_character_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def make_step(tokenizer, *texts, shift=0.0, step=1):
    """A step of a group a text of one rollout each; the trainer's log-probs are the server's plus `shift`."""
    groups, rows = [], []
    for index, text in enumerate(texts):
        ids = np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int32)
        logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32) / 4
        rollout = plain_rollout(ids, logprobs, version=3)
        prompt = Prompt(np.zeros(1, np.int32), f"question {index}", {"answer": 12}, index)
        groups.append(graded_group(prompt, [rollout], [0.5]))
        rows.append(logprobs + np.float32(shift))
    routing = np.array([[10, 9, 0, 0], [10, 10, 1, 2]])
    moved = [r - np.float32(0.5) for r in rows]
    return step_result(step, groups, rows, moved, rows, [0.25] * len(rows), routing)


def test_pass_rates_are_counted_in_tenths_over_graded_answers():
    groups = [np.array(rewards, np.float32) for rewards in ([1, 1, 0, 0], [1.5], [0, 0.9], [], [1, 1, 1, 0])]
    counts = pass_rate_counts(groups, 1.0)
    assert counts == [1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1]
    assert pass_rate_counts([], 1.0) == [0] * 11
    assert pass_rate_counts(groups, 0.5)[5] == 2


def test_every_bin_counts_what_lies_between_its_edges():
    values = [0.0, 1e-9, -1e-9, 1.01e-8, -0.02, 0.02, 20.0, -20.0]
    counts = histogram([np.array(values)], [np.zeros(len(values))], "token")["counts"]
    assert len(counts) == len(BIN_EDGES) + 1
    assert counts[CENTRE] == 3
    assert counts[CENTRE + 1] == 1
    assert counts[0] == counts[-1] == 1
    assert sum(counts) == len(values)
    k = int(np.flatnonzero(counts[CENTRE + 2 : -1])[0]) + CENTRE + 2
    assert BIN_EDGES[k - 1] <= 0.02 < BIN_EDGES[k]
    assert counts[len(counts) - 1 - k] == 1


def test_a_sequence_counts_once_by_its_mean_and_an_empty_one_not_at_all():
    numerator = [np.array([0.1, 0.3]), np.zeros(0), np.array([-0.2])]
    out = histogram(numerator, [np.zeros(2), np.zeros(0), np.zeros(1)], "sequence")
    counts = np.array(out["counts"])
    assert out["level"] == "sequence"
    assert counts.sum() == 2
    k = np.searchsorted(BIN_EDGES, 0.2, side="right")
    assert counts[k] == 1
    assert counts[len(counts) - 1 - k] == 1


def test_a_log_ratio_that_is_not_finite_is_counted_apart():
    out = histogram([np.array([np.nan, -np.inf, 0.1])], [np.zeros(3)], "token")
    assert out["nonfinite"] == 2
    assert sum(out["counts"]) == 1


@pytest.mark.parametrize(
    ("config", "bounds"),
    [
        ({"preset": "gspo", "clip_low": 0.02, "clip_high": 0.03}, [math.log(0.98), math.log(1.03)]),
        ({"preset": "gmpo", "clip_low": 0.4, "clip_high": 0.4}, [-0.4, 0.4]),
        ({"preset": "cispo", "clip_high": 2.0}, [None, math.log(3)]),
        ({"preset": "sapo"}, [None, None]),
        ({"preset": "reinforce"}, [None, None]),
    ],
)
def test_bounds_are_where_the_surrogate_clips(config, bounds):
    assert clip_bounds(resolve(ObjectiveConfig(**config))) == pytest.approx(bounds)


@pytest.mark.parametrize(("preset", "level"), [("gspo", "sequence"), ("grpo", "token"), ("gmpo", "token")])
def test_the_ratio_is_taken_at_the_level_that_is_clipped(tokenizer, preset, level):
    record = step_record(make_step(tokenizer, "12", "3"), resolve(ObjectiveConfig(preset=preset)))
    assert record["ratios"]["current/proximal"]["level"] == level
    assert record["ratios"]["proximal/rollout"]["level"] == "token"


def test_a_record_holds_routing_by_layer_and_both_ratios(tokenizer):
    record = step_record(make_step(tokenizer, "12", "3", shift=1 / 64, step=7), GSPO)
    assert record["step"] == 7
    assert record["routing"] == [[10, 9, 0, 0], [10, 10, 1, 2]]
    mismatch, update = (np.array(record["ratios"][n]["counts"]) for n in ("proximal/rollout", "current/proximal"))
    assert mismatch[np.searchsorted(BIN_EDGES, 1 / 64)] == 3
    assert update[np.searchsorted(BIN_EDGES, -0.5, side="right")] == 2


def test_shown_rollouts_hold_each_policy_s_log_prob_of_each_token(tokenizer):
    result = make_step(tokenizer, "1", "23", "4", "56", shift=0.125)
    first, second = shown_rollouts(result, tokenizer, 2)
    assert (first["prompt"], second["prompt"]) == ("question 1", "question 2")
    shown = shown_rollouts(result, tokenizer, 4)[1]
    assert shown["text"] == ["2", "3"]
    assert shown["rollout"] == [-0.25, -0.5]
    assert shown["proximal"] == [-0.125, -0.375]
    assert shown["current"] == [-0.625, -0.875]
    assert (shown["reward"], shown["advantage"], shown["versions"]) == (0.5, 0.25, [3])
    assert shown["metadata"] == {"answer": "12"}


def test_a_long_rollout_is_cut_and_says_how_long_it_was(tokenizer):
    (shown,) = shown_rollouts(make_step(tokenizer, "7" * (TOKENS_SHOWN + 5)), tokenizer, 1)
    assert shown["length"] == TOKENS_SHOWN + 5
    assert {len(shown[k]) for k in ("text", "rollout", "proximal", "current", "entropy")} == {TOKENS_SHOWN}


def test_a_float32_is_written_so_that_it_reads_back_as_itself(tokenizer):
    result = make_step(tokenizer, "12", shift=1e-7)
    (shown,) = json.loads(json.dumps(shown_rollouts(result, tokenizer, 1)))
    assert np.array_equal(np.array(shown["proximal"], np.float32), result.proximal.logprobs[0])


def test_tokens_that_the_policy_did_not_sample_have_no_log_probs_and_are_in_no_histogram(tokenizer):
    trained = np.array([True, False, True])
    rollout = plain_rollout(
        [5, 6, 7],
        np.array([-0.25, 0, -0.75], np.float32),
        trained=trained,
        weight_versions=np.array([3, -1, 4], np.int32),
    )
    group = graded_group(Prompt(np.zeros(1, np.int32), "question"), [rollout], [1.0])
    rows = [np.array([-0.25, 9.0, -0.75], np.float32)]
    result = step_result(1, [group], rows, rows, rows, [0.5], np.zeros((0, 4), np.int64))
    (shown,) = shown_rollouts(result, tokenizer, 1)
    assert shown["versions"] == [3, 4]
    assert [shown[k][1] for k in ("rollout", "proximal", "current", "entropy")] == [None] * 4
    assert sum(step_record(result, GSPO)["ratios"]["proximal/rollout"]["counts"]) == 2


def test_a_conversation_is_one_answer_of_all_its_turns(tokenizer):
    calls = [[("look", "1" * 2000, "34")], [], []]
    told = conversation(tokenizer, [["12", "34", "5"], ["6"]], 3, reward=1.5, turn_rewards=(0.0, 0.5, 1.0), calls=calls)
    group = Group(Prompt(np.zeros(1, np.int32), "question"), (told,))
    rows = [r.rollout_logprobs for r in told.rollouts]
    advantages = [np.array([1, 1, 0, 0, -1], np.float32), 0.25]
    result = step_result(1, [group], rows, rows, rows, advantages, np.zeros((0, 4), np.int64))
    (shown,) = shown_rollouts(result, tokenizer, 1)
    assert shown["text"] == list("123456")
    assert shown["turn"] == [0, 0, None, None, 1, 2]
    assert shown["runs"] == [2, 2, 1, 1]
    assert [(turn["reward"], turn["advantage"], turn["anew"]) for turn in shown["turns"]] == [
        (0.0, 1.0, False),
        (0.5, -1.0, False),
        (1.0, 0.25, True),
    ]
    ((name, arguments, answer),) = shown["turns"][0]["calls"]
    assert (name, answer, len(arguments) < 1100) == ("look", "34", True)
    assert [turn["calls"] for turn in shown["turns"][1:]] == [[], []]
    assert [value is None for value in shown["rollout"]] == [False, False, True, True, False, False]


def test_a_run_directory_holds_a_line_a_step_as_soon_as_it_is_written(tokenizer, tmp_path):
    with RunDirectory(tmp_path / "a", {}, rollouts_shown=1) as run:
        for step in (1, 2):
            run.write_step(make_step(tokenizer, "1", "2", step=step), GSPO, tokenizer)
        lines = (run.path / "records.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2]
        assert len(json.loads((run.path / "rollouts" / "step_000002.json").read_text())) == 1
    with RunDirectory(tmp_path / "b", {}, rollouts_shown=0) as run:
        run.write_step(make_step(tokenizer, "1"), GSPO, tokenizer)
    assert list((tmp_path / "b" / "rollouts").iterdir()) == []
