"""The table of episodes: what a row says, that a part is whole, and what a resumed run drops."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest

from pipeline.disk.disk_errors import DiskError
from pipeline.observe.episodes import EVERY, EpisodeTable, drop_episodes, part_path
from pipeline.step import Batch
from pipeline.types import Ended, Episode, Group, Prompt
from tests.support.episodes import plain_rollout

TOKENIZER = SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(map(str, ids)))


def group(index, *episodes):
    return Group(Prompt(np.zeros(1, np.int32), f"prompt {index}", {"answer": index}, index, f"made:{index}"), episodes)


def graded(reward=1.0, version=3, **changes):
    rollout = replace(plain_rollout([5, 6, 7], np.full(3, -1.0), version), servers=(1,), seconds=0.5)
    return replace(Episode((rollout,), reward, parts={"exact_match": reward}, grade_s=0.25), **changes)


def step(number, *groups, ended=()):
    return SimpleNamespace(batch=Batch(number, number, groups), ended=ended)


def rows(folder):
    return pyarrow.parquet.read_table(folder).to_pylist() if any(folder.glob("part_*")) else []


def test_every_answer_has_a_row_that_says_how_it_ended(tmp_path):
    table = EpisodeTable(tmp_path / "episodes", ["exact_match"])
    failed = Episode((plain_rollout([4], np.full(1, -1.0)),), None, "the verifier raised")
    dropped = Ended(group(8, graded(0.0), graded(0.0)), "uninformative")
    mixed = replace(plain_rollout([5, 6], np.full(2, -1.0)), weight_versions=np.array([2, 4], np.int32))
    table.add(
        step(5, group(7, graded(), failed, graded(rollouts=(mixed,), note="2 calls")), ended=[dropped]), TOKENIZER
    )
    table.write()
    first, second, third, *rest = rows(tmp_path / "episodes")
    assert {key: first[key] for key in ("recorded", "step", "prompt", "sample", "ended", "reward", "tokens")} == {
        "recorded": 5, "step": 5, "prompt": 7, "sample": 0, "ended": "trained", "reward": 1, "tokens": 3,
    }  # fmt: skip
    assert (first["servers"], first["sample_s"], first["grade_s"], first["reward/exact_match"]) == ([1], 0.5, 0.25, 1)
    assert (first["answer"], first["answer_ids"], first["metadata"]) == ("5 6", [5, 6, 7], '{"answer": 7}')
    assert (second["step"], second["ended"], second["failure"]) == (None, "failed", "the verifier raised")
    assert second["reward"] is None
    assert (third["first_version"], third["last_version"]) == (2, 4)
    assert (first["note"], third["note"]) == (None, "2 calls")
    assert [(r["prompt"], r["sample"], r["step"], r["ended"]) for r in rest] == [
        (8, 0, None, "uninformative"),
        (8, 1, None, "uninformative"),
    ]


def test_components_that_an_environment_names_as_it_goes_are_columns(tmp_path):
    table = EpisodeTable(tmp_path / "episodes")
    table.add(step(5, group(7, graded(parts={"right": 0.5}), graded(parts={"calls": 2.0}))), TOKENIZER)
    table.write()
    first, second = rows(tmp_path / "episodes")
    assert (first["reward/right"], first["reward/calls"]) == (0.5, None)
    assert (second["reward/right"], second["reward/calls"]) == (None, 2)


def test_a_conversation_counts_what_the_policy_sampled_and_every_server(tmp_path):
    trained = np.array([True, False, True])
    turns = plain_rollout(
        [5, 6, 7], np.where(trained, -1.0, 0.0), trained=trained, weight_versions=np.array([3, -1, 4], np.int32)
    )
    pieces = replace(turns, servers=(0, 2)), replace(plain_rollout([8], -np.ones(1), 4), servers=(1, 2))
    table = EpisodeTable(tmp_path / "episodes")
    told = Episode(pieces, 1.0, turn_rewards=(0.5, 0.0, 0.5))
    table.add(step(5, group(7, told, Episode(pieces, 1.0))), TOKENIZER)
    table.write()
    row, other = rows(tmp_path / "episodes")
    assert (row["turns"], row["turn_rewards"]) == (3, [0.5, 0.0, 0.5])
    assert (other["turns"], other["turn_rewards"]) == (3, None)
    assert (row["tokens"], row["trained_tokens"]) == (4, 3)
    assert (row["first_version"], row["last_version"], row["servers"]) == (3, 4, [0, 1, 2])


def test_a_part_is_written_before_its_rows_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.observe.episodes._MOST_TOKENS", 6)
    table = EpisodeTable(tmp_path / "episodes")
    for number in (1, 2):
        assert rows(tmp_path / "episodes") == []
        table.add(step(number, group(number, graded())), TOKENIZER)
    assert len(rows(tmp_path / "episodes")) == 2


def test_without_answers_what_can_be_counted_is_kept(tmp_path):
    table = EpisodeTable(tmp_path / "episodes", answers=False)
    table.add(step(1, group(0, graded())), TOKENIZER)
    table.write()
    (row,) = rows(tmp_path / "episodes")
    assert (row["answer"], row["answer_ids"], row["prompt_text"]) == (None, None, None)
    assert (row["origin"], row["trained_tokens"]) == ("made:0", 3)


def test_a_part_is_written_after_so_many_steps_and_with_a_checkpoint(tmp_path):
    table = EpisodeTable(tmp_path / "episodes")
    for number in range(1, EVERY):
        table.add(step(number, group(number, graded())), TOKENIZER)
    assert rows(tmp_path / "episodes") == []
    table.add(step(EVERY, group(EVERY, graded())), TOKENIZER)
    table.add(step(EVERY + 1, group(EVERY + 1, graded())), TOKENIZER)
    assert len(rows(tmp_path / "episodes")) == EVERY
    table.write()
    assert [row["recorded"] for row in rows(tmp_path / "episodes")] == list(range(1, EVERY + 2))


@pytest.mark.parametrize("kept", [0, 2, 3, 4, 6])
def test_rows_of_later_steps_are_dropped_and_kept_aside(tmp_path, kept):
    folder, aside = tmp_path / "episodes", tmp_path / "dropped" / "episodes"
    table = EpisodeTable(folder)
    for number in range(1, 7):
        table.add(step(number, group(number, graded())), TOKENIZER)
        if number % 3 == 0:
            table.write()
    (folder / ".part_000009.parquet.partial").write_bytes(b"cut")
    drop_episodes(folder, kept, aside)
    assert [row["recorded"] for row in rows(folder)] == list(range(1, kept + 1))
    assert [row["recorded"] for row in rows(aside)] == list(range(kept + 1, 7))
    assert not list(folder.glob(".*"))
    for number in range(kept + 1, 7):  # what the resumed run writes takes the place of nothing that was kept
        table.add(step(number, group(number, graded())), TOKENIZER)
    table.write()
    assert [row["recorded"] for row in rows(folder)] == list(range(1, 7))


def test_a_disk_that_does_not_take_a_part_is_an_error_and_leaves_none(tmp_path, monkeypatch):
    table = EpisodeTable(tmp_path / "episodes")
    table.add(step(1, group(0, graded())), TOKENIZER)

    def full(table, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    with pytest.raises(DiskError, match=r"was not written: No space left"):
        table.write()
    assert list((tmp_path / "episodes").iterdir()) == []
    monkeypatch.undo()
    table.write()
    assert part_path(tmp_path / "episodes", 1).is_file(), "the rows are not lost"
