"""Kept answers are graded again from a run directory alone."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet
import pytest

from pipeline.commands.main import main
from pipeline.config import load_config
from pipeline.observe.episodes import EpisodeTable
from pipeline.observe.graded_again import FILE, RegradeError, regrade
from pipeline.rewards import Grader, Verdict
from pipeline.text.yaml_text import dump
from pipeline.types import Episode, Group, Prompt
from tests.pipeline.observe.test_episodes import TOKENIZER, step
from tests.support.episodes import plain_rollout


@pytest.fixture
def run(tmp_path):
    """A run whose first two answers have the rewards of its verifier, and whose third has not."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = load_config("configs/quickstart.yaml", ["rewards=[{kind: exact_match}]"])
    (folder / "config.yaml").write_text(dump(config.model_dump(mode="json")))
    answers = [([5, 6, 1], 1.0), ([5, 5, 1], 0.0), ([5, 6, 1], 0.0)]
    episodes = tuple(Episode((plain_rollout(ids, np.full(3, -1.0)),), reward) for ids, reward in answers)
    group = Group(Prompt(np.zeros(1, np.int32), "56", {"answer": "5 6"}, 4), episodes)
    table = EpisodeTable(folder / "episodes")
    table.add(step(1, group), TOKENIZER)
    table.write()
    return folder


def test_the_same_verifier_agrees_where_the_run_graded_with_it(run, capsys):
    assert main(["regrade", str(run)]) == 0
    said = capsys.readouterr().out
    assert "3 answers graded again, 2 of them the same (66.67%)" in said
    assert "0.3333 before, 0.6667 now" in said
    assert "prompt 4, sample 2: 0.0 -> 1.0  '5 6'" in said
    rows = pyarrow.parquet.read_table(run / FILE).to_pylist()
    assert [(r["sample"], r["reward_before"], r["reward"], r["changed"]) for r in rows] == [
        (0, 1, 1, False),
        (1, 0, 0, False),
        (2, 0, 1, True),
    ]


def test_rewards_of_an_environment_are_not_taken_for_those_of_a_verifier(run, tmp_path, capsys):
    own = ["environment={function: a:b, max_tokens: 40}", "objective={preset: grpo, credit: turn}"]
    config = load_config("configs/quickstart.yaml", own)
    (run / "config.yaml").write_text(dump(config.model_dump(mode="json")))
    assert main(["regrade", str(run)]) == 2
    assert "name others with --rewards" in capsys.readouterr().err
    assert not (run / FILE).exists()
    other = tmp_path / "other.yaml"
    other.write_text("rewards: tests.support.verifiers:length\n")
    assert main(["regrade", str(run), "--rewards", str(other)]) == 0


def test_another_block_of_rewards_grades_in_its_place(run, tmp_path, capsys):
    other = tmp_path / "other.yaml"
    other.write_text("rewards: tests.support.verifiers:length\n")
    assert main(["regrade", str(run), "--rewards", str(other)]) == 0
    rows = pyarrow.parquet.read_table(run / FILE).to_pylist()
    assert [r["reward"] for r in rows] == pytest.approx([0.3] * 3)
    other.write_text("grading: {workers: 1}\n")
    assert main(["regrade", str(run), "--rewards", str(other)]) == 2
    assert "has no rewards" in capsys.readouterr().err


def test_a_question_is_what_was_asked_and_answered(run):
    """Of every part; a verifier may read how an answer ended and how much of it was sampled."""
    asked = []

    class Told:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def ask(self, questions):
            asked.extend(questions)
            return [Verdict(kind="raised", what="raised ValueError", verifier="told")] * 1

    for part in (run / "episodes").iterdir():
        part.unlink()
    table = EpisodeTable(run / "episodes")
    trained = np.array([True, False, True])
    turns = plain_rollout(
        [5, 6, 7], np.where(trained, -1.0, 0.0), trained=trained, weight_versions=np.array([0, -1, 0], np.int32),
        finish_reason="length",
    )  # fmt: skip
    failed = Episode((plain_rollout([5], -np.ones(1)),), failure="the verifier hung")
    for number, episode in ((1, Episode((turns,), 1.0)), (2, failed)):
        table.add(
            step(number, Group(Prompt(np.zeros(1, np.int32), "56", {"answer": 9}, number), (episode,))), TOKENIZER
        )
        table.write()
    found = regrade(run, Told())
    assert [(q.finish_reason, q.trained_tokens, q.prompt.index) for q in asked] == [("length", 2, 1), ("stop", 1, 2)]
    assert [row["changed"] for row in found.rows] == [True, False], "a reward is lost; what failed fails again"


def test_a_run_that_kept_no_texts_says_so(run):
    for part in (run / "episodes").iterdir():
        part.unlink()
    table = EpisodeTable(run / "episodes", answers=False)
    table.add(
        step(1, Group(Prompt(np.zeros(1, np.int32), ""), (Episode((plain_rollout([1], -np.ones(1)),), 1.0),))), None
    )
    table.write()
    with pytest.raises(RegradeError, match=r"observe\.episode_answers=false"):
        regrade(run, Grader("exact_match", workers=1))
    assert not (run / FILE).exists()


def test_a_run_without_kept_answers_says_so(run, capsys):
    for part in (run / "episodes").iterdir():
        part.unlink()
    assert main(["regrade", str(run)]) == 2
    assert "has no answers" in capsys.readouterr().err
