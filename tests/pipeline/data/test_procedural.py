"""Tasks of reasoning-gym: questions without end, a held-out kind, and their own verdicts in another process."""

import json

import numpy as np
import pytest

from pipeline.config.data import DataConfig
from pipeline.config.model import TinyModelConfig
from pipeline.data.chat import DataError
from pipeline.data.procedural import SIZE
from pipeline.data.prompts import PromptSource
from pipeline.data.tiny_model import make_tiny_model
from pipeline.rewards import Component, Grader, Limits, Question
from pipeline.rewards.registry import load

EASY = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
MIXTURE = EASY | {"spell_backward": {"min_word_len": 3, "max_word_len": 4, "weight": 3}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("bytes"), TinyModelConfig(layers=1, tokenizer="bytes"), seed=0)


@pytest.fixture
def open_tasks(model):
    def make(tasks, part="train", run_seed=0, supervised=False, **fields):
        source = {"kind": "reasoning_gym", "tasks": tasks} | fields
        config = DataConfig.model_validate({"sources": [source]})
        return PromptSource(config, model, seed=run_seed, part=part, supervised=supervised)

    return make


def grade(prompt, answer, finish_reason="stop"):
    return load(Component.named("reasoning_gym"))(Question(prompt, answer, np.zeros(1, np.int32), finish_reason))


def test_tasks_are_mixed_by_their_weights_and_questions_depend_on_the_seeds_alone(open_tasks):
    prompts = open_tasks(MIXTURE).take(40)
    assert [p.metadata["task"] for p in prompts].count("spell_backward") == 30
    assert [p.text for p in open_tasks(MIXTURE).take(40)] == [p.text for p in prompts]
    assert [p.text for p in open_tasks(MIXTURE, seed=1).take(40)] != [p.text for p in prompts]
    assert [p.text for p in open_tasks(MIXTURE, seed=0).take(40)] == [p.text for p in prompts]


def test_questions_go_on_past_a_set_and_do_not_come_again(open_tasks):
    questions = [p.metadata["question"] for p in open_tasks({"chain_sum": {}}).take(2 * SIZE)]
    assert len(set(questions)) > 1.9 * SIZE


def test_training_and_held_out_questions_share_none_whatever_the_seed(open_tasks):
    train = {p.metadata["question"] for seed in (0, 1) for p in open_tasks(EASY, run_seed=seed).take(150)}
    held_out = {p.metadata["question"] for seed in (0, 1) for p in open_tasks(EASY, "held_out", run_seed=seed).take(40)}
    pairs = {p.prompt.metadata["question"] for p in open_tasks(EASY).take_supervised(100)}
    assert len(held_out) > 10
    assert not held_out & (train | pairs)


def test_the_cursor_goes_on_as_it_would_have(open_tasks):
    stream, again = open_tasks(MIXTURE), open_tasks(MIXTURE)
    stream.take(21)
    again.restore(json.loads(json.dumps(stream.state())))
    assert [p.text for p in again.take(30)] == [p.text for p in stream.take(30)]


def test_every_right_answer_is_scored_1_and_a_wrong_or_cut_one_is_not(open_tasks):
    for prompt in open_tasks(MIXTURE).take(12):
        answer = prompt.metadata["answer"]
        assert grade(prompt, f" {answer}\n") == 1
        assert grade(prompt, f"I think\n<answer>{answer}</answer>") == 1
        assert grade(prompt, "no idea") < 0.1
        assert grade(prompt, answer, "length") == 0


def test_a_task_without_a_single_answer_is_judged_by_its_own_rules(open_tasks):
    (prompt,) = open_tasks({"countdown": {"min_numbers": 3, "max_numbers": 3}}).take(1)
    solution = prompt.metadata["answer"]
    swapped = " + ".join(reversed(solution.split(" + "))) if " + " in solution else f"({solution})"
    assert swapped != solution
    assert grade(prompt, swapped) == 1


def test_verdicts_are_the_same_in_the_grader_s_own_process(open_tasks):
    prompts = open_tasks(MIXTURE).take(4)
    questions = [
        Question(prompt, prompt.metadata["answer"] if right else "x", np.zeros(1, np.int32), "stop")
        for prompt in prompts
        for right in (True, False)
    ]
    with Grader("reasoning_gym", workers=1, limits=Limits(timeout_s=60)) as grader:
        rewards = [verdict.reward for verdict in grader.ask(questions)]
    assert rewards[::2] == [1.0] * 4
    assert all(reward is not None and reward < 0.1 for reward in rewards[1::2])


def test_another_release_s_question_is_not_judged(open_tasks):
    (prompt,) = open_tasks(EASY).take(1)
    prompt.metadata["question"] += " "
    with pytest.raises(ValueError, match="makes another question"):
        grade(prompt, "1")


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [
        ({"chess": {}}, "chess: reasoning-gym has no task 'chess'; it has ab, acre, "),
        ({"chain_sum": {"digits": 2}}, "the task chain_sum has no parameter 'digits'; it has allow_negation, "),
        ({"chain_sum": {"min_terms": 5, "max_terms": 2}}, "the task chain_sum refuses .*"),
    ],
)
def test_what_reasoning_gym_does_not_have_is_one_sentence(tasks, sentence, open_tasks):
    with pytest.raises(DataError, match=sentence):
        open_tasks(tasks)


def test_a_task_with_too_few_questions_for_a_held_out_part_says_so(open_tasks, monkeypatch):
    monkeypatch.setattr("pipeline.data.procedural._MOST_PASSED_OVER", 30)
    source = open_tasks(EASY, "held_out", held_out=1e-9)
    with pytest.raises(DataError, match="30 questions in a row are not of the held_out kind"):
        source.take(1)
    with pytest.raises(DataError, match="has no held_out prompts"):
        open_tasks(EASY, "held_out", held_out=0.0)
