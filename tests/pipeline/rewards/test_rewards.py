import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import load_config
from pipeline.data.tokenizer import load_tokenizer, write_character_tokenizer
from pipeline.rewards import (
    Component,
    Failures,
    Grader,
    RewardError,
    Verdict,
    VerifierError,
    grade,
    question,
    response_text,
    settle,
)
from pipeline.rewards.kinds.function import find
from pipeline.rewards.registry import load
from pipeline.rollout.grading import OwnGrading
from pipeline.types import Episode, Group, Prompt, Rollout


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_character_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def rollout(tokenizer, text, finish_reason="stop"):
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int32)
    return Rollout(
        prompt_ids=np.zeros(2, np.int32),
        response_ids=ids,
        rollout_logprobs=np.zeros(len(ids), np.float32),
        routes=None,
        weight_versions=np.zeros(len(ids), np.int32),
        finish_reason=finish_reason,
    )


def group(tokenizer, *responses, answer="123"):
    prompt = Prompt(np.zeros(2, np.int32), "<|user|>312<|assistant|>", {"answer": answer}, index=7)
    return Group.of_single_turns(prompt, [rollout(tokenizer, *r) for r in responses])


class Said:
    """A grader that knows its verdicts, and keeps what it was asked."""

    def __init__(self, *verdicts):
        given = [v if isinstance(v, Verdict) else Verdict(reward=v) for v in verdicts]
        self.verdicts = [replace(v, verifier="some:verifier", parts={"some": v}) for v in given]

    def ask(self, questions):
        self.asked = list(questions)
        assert len(self.asked) == len(self.verdicts)
        return [replace(v, response=q.response_text) for v, q in zip(self.verdicts, self.asked, strict=True)]


HUNG = Verdict(kind="timeout", what="took more than 5 s")
RAISED = Verdict(kind="raised", what="raised KeyError: 'answer'")


def test_exact_match_takes_the_answer_and_nothing_else(tokenizer):
    responses = [
        ("123<|eos|>",),
        (" 123\n<|eos|>",),
        ("132<|eos|>",),
        ("1234<|eos|>",),
        ("<|eos|>",),
        ("123", "length"),
        ("123", "abort"),
        ("12<|user|>3<|eos|>",),
        ("123<|eos|><|eos|>",),
    ]
    with Grader("exact_match") as grader:
        groups, failures = grade([group(tokenizer, *responses)], OwnGrading(grader, tokenizer))
    assert groups[0].rewards.dtype == np.float32
    assert groups[0].rewards.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert failures == Failures(answers=9)
    assert [dict(episode.parts) for episode in groups[0].episodes[:3]] == [{"exact_match": n} for n in (1, 1, 0)]


def test_a_prompt_without_an_answer_is_a_failure_of_exact_match(tokenizer):
    prompt = Prompt(np.zeros(2, np.int32), "a question", {}, index=3)
    with Grader("exact_match") as grader:
        groups, failures = grade(
            [Group.of_single_turns(prompt, [rollout(tokenizer, "1<|eos|>")])], OwnGrading(grader, tokenizer)
        )
    failure = groups[0].episodes[0].failure
    assert failure.startswith("the verifier 'exact_match' raised KeyError: 'answer' (exact_match.py, line ")
    assert failure.endswith(", on prompt 3 ('a question'), response '1'")
    assert failures.metrics()["reward/failures_raised"] == 1


def test_grading_leaves_everything_else_as_it_was(tokenizer):
    before = group(tokenizer, ("1<|eos|>",), ("2<|eos|>",))
    (after,), _ = grade([before], OwnGrading(Said(1, 2), tokenizer))
    assert after.prompt is before.prompt
    assert all(a is b for a, b in zip(after.rollouts, before.rollouts, strict=True))
    assert after.rewards.tolist() == [1, 2]
    assert len(before.rewards) == 0


def test_a_verifier_sees_text_without_the_stop_token_and_ids_with_it(tokenizer):
    grader = Said(1, 1)
    grade([group(tokenizer, ("12<|eos|>",), ("12", "length"))], OwnGrading(grader, tokenizer))
    seen = [(q.response_text, len(q.response_ids), q.finish_reason, q.prompt.index) for q in grader.asked]
    assert seen == [("12", 3, "stop", 7), ("12", 2, "length", 7)]
    assert response_text(rollout(tokenizer, "a<|pad|>b", "length"), tokenizer) == "a<|pad|>b"


def rewards_of(group):
    return [episode.reward for episode in group.episodes]


def three(tokenizer):
    return group(tokenizer, ("1<|eos|>",), ("2<|eos|>",), ("3<|eos|>",))


def test_an_answer_that_cannot_be_graded_is_left_out_with_its_reason(tokenizer):
    groups, failures = grade([three(tokenizer)] * 2, OwnGrading(Said(1, HUNG, 0, 1, 1, 0), tokenizer), least=2)
    assert [rewards_of(g) for g in groups] == [[1, None, 0], [1, 1, 0]]
    assert groups[0].episodes[1].failure == (
        "the verifier 'some:verifier' took more than 5 s, on prompt 7 ('<|user|>312<|assistant|>'), response '2'"
    )
    assert failures.metrics() == Failures().metrics() | {
        "reward/failed": 1.0,
        "reward/failures_timeout": 1.0,
    }
    assert str(failures).startswith("1 of 6 answers could not be graded (1 timeout); first: the verifier 'some:ver")


def test_a_group_of_which_one_answer_is_left_is_dropped_where_a_baseline_needs_two(tokenizer):
    verdicts = (1, HUNG, RAISED)
    (left,), failures = grade([three(tokenizer)], OwnGrading(Said(*verdicts), tokenizer), least=2)
    assert rewards_of(left) == [None, None, None]
    assert "too few answers of its group could be graded: the verifier" in left.episodes[0].failure
    assert (failures.groups, failures.by_kind.total()) == (1, 2)
    (left,), failures = grade([three(tokenizer)], OwnGrading(Said(*verdicts), tokenizer), least=1)
    assert (rewards_of(left), failures.groups) == ([1, None, None], 0)


def test_groups_that_are_of_one_from_the_start_stay(tokenizer):
    single = group(tokenizer, ("1<|eos|>",))
    groups, failures = grade([single, single], OwnGrading(Said(1, HUNG), tokenizer), least=2)
    assert [rewards_of(g) for g in groups] == [[1], [None]]
    assert failures.groups == 1


def test_failures_may_count_as_nothing_take_their_group_along_or_end_the_run(tokenizer):
    verdicts = (1, HUNG, 0, 1, 1, 0)
    zero, failures = grade([three(tokenizer)] * 2, OwnGrading(Said(*verdicts), tokenizer), on_failure="zero", least=2)
    assert [rewards_of(g) for g in zero] == [[1, 0, 0], [1, 1, 0]]
    assert failures.metrics()["reward/failed"] == 1
    dropped, failures = grade(
        [three(tokenizer)] * 2, OwnGrading(Said(*verdicts), tokenizer), on_failure="drop_group", least=2
    )
    assert [rewards_of(g) for g in dropped] == [[None] * 3, [1, 1, 0]]
    assert failures.groups == 1
    with pytest.raises(RewardError, match=r"took more than 5 s, on prompt 7 .*312.*, response '2'"):
        grade([three(tokenizer)] * 2, OwnGrading(Said(*verdicts), tokenizer), on_failure="stop", least=2)


def test_the_first_of_several_failures_is_told_and_components_that_could_grade_are_kept(tokenizer):
    mixed = Verdict(parts={"format": Verdict(0.5), "code": HUNG}, kind="timeout", what="took more than 5 s")
    whole = group(tokenizer, ("1<|eos|>",), ("2<|eos|>",), ("3<|eos|>",))
    graded, failures = settle(whole, [mixed, RAISED, Verdict(1.0)])
    assert "took more than 5 s" in failures.first
    assert "KeyError" not in failures.first
    assert graded.episodes[0].parts == {"format": 0.5}


def test_what_was_cut_keeps_its_last_token_and_an_episode_counts_what_was_sampled_in_all_of_it(tokenizer):
    cut = rollout(tokenizer, "12", "time")
    assert response_text(cut, tokenizer) == "12"
    trained = np.array([True, False])
    turns = replace(cut, trained=trained, weight_versions=np.array([0, -1], np.int32))
    asked = question(group(tokenizer).prompt, Episode((turns, cut)), tokenizer)
    assert (asked.length, asked.response_text, asked.finish_reason) == (3, "12", "time")


def test_failures_of_several_rounds_add_up(tokenizer):
    _, first = grade([three(tokenizer)], OwnGrading(Said(1, HUNG, 0), tokenizer))
    _, second = grade([three(tokenizer)], OwnGrading(Said(RAISED, HUNG, RAISED), tokenizer))
    both = Failures() + first + second
    assert (both.answers, both.groups, dict(both.by_kind)) == (6, 1, {"timeout": 2, "raised": 2})
    assert both.first == first.first


def test_a_users_function_is_found_by_its_dotted_path(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("half = lambda *_: 0.5\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find("my_rewards:half")(None, "", None, "stop") == 0.5
    with pytest.raises(VerifierError, match=r"my_rewards\.py has no function 'number'"):
        find("my_rewards:number")
    with pytest.raises(VerifierError, match="has no function 'whole'"):
        find("my_rewards:whole")
    with pytest.raises(VerifierError, match="cannot be imported: ModuleNotFoundError: No module named 'nowhere"):
        load(Component.named("nowhere_at_all:half"))


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(VerifierError, match=r"no verifier 'exact'; there are .*exact_match.*package\.module:function"):
        Component.named("exact")
    with pytest.raises(VerifierError, match="no verifier 'exact'"):
        Grader("exact")


def test_a_verifier_beside_the_yaml_file_is_found_before_one_on_the_path(tmp_path, monkeypatch):
    beside, elsewhere = tmp_path / "beside", tmp_path / "elsewhere"
    for folder, value in ((beside, 0.25), (elsewhere, 0.75)):
        folder.mkdir()
        (folder / "grade_beside.py").write_text(f"def grade(*_):\n    return {value}\n")
    monkeypatch.setattr(sys, "path", [str(elsewhere), *sys.path])
    (beside / "run.yaml").write_text(f"base: {Path('configs/quickstart.yaml').resolve()}\n")
    config = load_config(beside / "run.yaml", ["rewards=grade_beside:grade"])
    (reward,) = config.rewards
    assert reward.directory == beside.resolve()
    assert find(reward.function, reward.directory)(None, "", None, "stop") == 0.25
    (beside / "above").mkdir()
    (beside / "above" / "run.yaml").write_text("base: ../run.yaml\n")
    again = load_config(beside / "above" / "run.yaml", ["rewards=grade_beside:grade"])
    assert again.rewards[0].directory == beside.resolve()
    assert load_config(beside / "run.yaml", ["rewards=elsewhere:grade"]).rewards[0].directory is None


def test_a_verifier_whose_module_another_one_hides_is_refused(tmp_path):
    for name in ("math", "json"):  # built in, and a file of Python's own
        (tmp_path / f"{name}.py").write_text("def grade(*_):\n    return 1.0\n")
        with pytest.raises(RewardError, match=f"the module {name} of .* is hidden by .*; rename the file"):
            find(f"{name}:grade", tmp_path)
