import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.config.sources import ChatConfig, SyntheticTaskConfig
from pipeline.data.chat import PromptWriter
from pipeline.data.synthetic import GENERATORS, SyntheticTask, is_held_out, register


def of(config, tokenizer, seed=0, **given):
    return SyntheticTask(config, PromptWriter(tokenizer, 64, 64, ChatConfig()), seed, **given)


def make(tokenizer, seed=0, **fields):
    return of(SyntheticTaskConfig(**fields), tokenizer, seed)


@pytest.mark.parametrize("name", ["digit_sort", "addition"])
def test_answers_are_right_and_digits_stay_within_their_bounds(name, tokenizer):
    task = make(tokenizer, name=name, min_digits=2, max_digits=4)
    lengths = set()
    for index in range(300):
        question, answer = task.problem(index)
        if name == "digit_sort":
            assert answer == "".join(sorted(question))
            lengths.add(len(question))
        else:
            a, b = (int(n) for n in question.split("+"))
            assert int(answer) == a + b
            assert max(a, b) < 10**4
            lengths.add(len(str(max(a, b))))
    assert {2, 3, 4} <= lengths
    if name == "digit_sort":
        assert lengths == {2, 3, 4}


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_training_and_held_out_streams_share_no_question_whatever_the_seed(name, tokenizer):
    task, other = (make(tokenizer, seed, name=name, min_digits=1, max_digits=2) for seed in (0, 1))
    train = {t.problem(i, s)[0] for t in (task, other) for s in ("train", "supervised") for i in range(400)}
    held_out = {t.problem(i, "held_out")[0] for t in (task, other) for i in range(100)}
    assert len(train) > 20
    assert held_out
    assert not train & held_out


def test_about_a_tenth_of_all_questions_is_held_out():
    assert np.mean([is_held_out(f"{n:04d}") for n in range(10_000)]) == pytest.approx(0.1, abs=0.01)


def test_index_and_seed_decide_a_prompt_alone(tokenizer):
    task = make(tokenizer)
    forward = [task.problem(i) for i in range(20)]
    assert [make(tokenizer).problem(i) for i in reversed(range(20))] == forward[::-1]
    assert [make(tokenizer, seed=1).problem(i) for i in range(20)] != forward
    assert [of(SyntheticTaskConfig(seed=1), tokenizer).problem(i) for i in range(20)] != forward


def test_a_prompt_is_the_question_in_the_chat_template(tokenizer):
    task = make(tokenizer, question="sort {question}")
    asked = task.asked(3, "prompts")
    (prompt,) = task.writer.prompts([asked], [7])
    assert prompt.text == f"<|user|>sort {prompt.metadata['question']}<|assistant|>"
    assert prompt.ids.dtype == np.int32
    assert tokenizer.decode(prompt.ids.tolist()) == prompt.text
    assert (prompt.index, prompt.origin, prompt.metadata["task"]) == (7, "digit_sort:3", "digit_sort")


def test_supervised_answers_are_right_and_stop(tokenizer):
    task = make(tokenizer)
    asked = task.asked(5, "supervised")
    assert tokenizer.decode(task.writer.answer(asked).tolist()) == asked.metadata["answer"] + "<|eos|>"


def test_what_a_source_adds_is_in_the_metadata(tokenizer):
    task = of(SyntheticTaskConfig(), tokenizer, name="sorting", metadata={"verifier": "exact"})
    assert task.asked(0, "prompts").metadata["verifier"] == "exact"
    assert task.asked(2, "prompts").origin == "sorting:2"


def test_an_imperfect_teacher_errs_at_its_rate_and_the_verifier_does_not(tokenizer):
    task = make(tokenizer, min_digits=10, max_digits=10, supervised_error_rate=0.5)
    wrong = []
    for index in range(200):
        asked = task.asked(index, "supervised")
        answer = asked.metadata["answer"]
        assert answer == "".join(sorted(asked.metadata["question"]))
        wrong += [a != b for a, b in zip(answer, asked.answer, strict=True)]
    # A tenth of the replacements falls on the right digit.
    assert np.mean(wrong) == pytest.approx(0.45, abs=0.05)


def test_a_stream_without_questions_ends_with_a_sentence(tokenizer, monkeypatch):
    question = next(str(n) for n in range(100) if is_held_out(str(n)))
    monkeypatch.setitem(GENERATORS, "addition", lambda rng, digits: (question, "1"))
    task = make(tokenizer, name="addition")
    assert task.problem(0, "held_out") == (question, "1")
    with pytest.raises(ValueError, match="too few questions for a train stream; raise max_digits"):
        task.problem(0)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"name": "chess"}, "there are addition, digit_sort"),
        ({"min_digits": 5, "max_digits": 4}, "swap them"),
        ({"question": "sort!"}, "must hold {question} once"),
        ({"digits": 3}, "Extra inputs"),
    ],
)
def test_a_wrong_task_is_refused(wrong, sentence):
    with pytest.raises(ValidationError, match=sentence):
        SyntheticTaskConfig(**wrong)


def test_a_task_name_is_taken_once():
    with pytest.raises(ValueError, match="already a synthetic task 'addition'"):
        register("addition")(lambda rng, digits: ("", ""))
