"""The recipes read what is published: tiny samples of the same columns, through the loaders that a run uses."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import load_config_and_model
from pipeline.config.model import TinyModelConfig
from pipeline.data.prompts import PromptSource
from pipeline.data.tiny_model import make_tiny_model
from pipeline.evaluation.opened_set import open_sets
from pipeline.rewards import Component, Question, open_grader
from pipeline.rewards.registry import load

RECIPES = Path("configs/recipes")
GSM8K = {
    "question": ["Natalia sold 48 clips, then half as many. How many?", "A farm has 1,000 hens and 72 more. How many?"],
    "answer": ["Half is 48/2 = <<48/2=24>>24.\nIn all 48+24 = <<48+24=72>>72.\n#### 72", "1000+72 = 1,072\n#### 1,072"],
}
_DAPO = "Solve the following math problem step by step. The last line is Answer: $Answer.\n\nWhat is {n}+{n}?"
DAPO = {
    "data_source": ["math_dapo"] * 3,
    "prompt": [[{"content": _DAPO.format(n=n), "role": "user"}] for n in (1, 2, 1)],
    "ability": ["MATH"] * 3,
    "reward_model": [{"ground_truth": str(2 * n), "style": "rule-lighteval/MATH_v2"} for n in (1, 2, 1)],
    "extra_info": [{"index": f"id-{i}"} for i in range(3)],
}
STREAMS = [{"type": "stdin_stdout", "fn_name": None, "input": "3\n", "output": "9\n"}]
CALLS = {"fn_name": "square", "inputs": [[3], [4]], "outputs": [9, 16]}
DEEPCODER = {
    "primeintellect": {
        "problem": ["Print the square of a number."],
        "solutions": [["n = int(input())\nprint(n * n)"]],
        "tests": [json.dumps(STREAMS)],
    },
    "taco": {
        "problem": ["Write square(n).", "Too long for Python."],
        "solutions": [["def square(n): return n * n"], [""]],
        "tests": [json.dumps(CALLS), '{"inputs": ["1"], "outputs": [' + "9" * 5000 + "]}"],
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("bytes"), TinyModelConfig(layers=1, tokenizer="bytes"), seed=0)


@pytest.fixture
def recipe(model, tmp_path):
    """The prompts of a recipe, with a local directory in place of each data set on the hub."""
    from datasets import Dataset

    def opened(name, samples=(), part="train", **fields):
        config, _ = load_config_and_model(RECIPES / f"{name}.yaml")
        sources = []
        for number, source in enumerate(config.data.sources):
            if samples:
                place = tmp_path / str(number)
                Dataset.from_dict(samples[number]).save_to_disk(place)
                source = source.model_copy(update={"path": str(place)})
            sources.append(source)
        data = config.data.model_copy(update={"sources": tuple(sources), "shuffle": False} | fields)
        return PromptSource(data, model, seed=0, part=part, say=lambda line: None)

    return opened


EVALUATED = {"gsm8k": GSM8K, "dapo-math-17k": DAPO, "deepcoder": DEEPCODER["primeintellect"]}


@pytest.mark.parametrize("name", ["gsm8k", "dapo-math-17k", "deepcoder", "reasoning-gym", "reasoning-gym-tiny"])
def test_the_evaluation_of_a_recipe_asks_what_its_verifiers_can_grade(name, model, tmp_path):
    config, _ = load_config_and_model(RECIPES / f"{name}.yaml")
    (one,) = config.evaluate
    if name in EVALUATED:
        from datasets import Dataset

        Dataset.from_dict(EVALUATED[name]).save_to_disk(tmp_path)
        (source,) = one.sources
        one = one.model_copy(update={"sources": (source.model_copy(update={"path": str(tmp_path), "split": "train"}),)})
    else:
        one = one.model_copy(update={"prompts": 6})
    (asked,) = open_sets(config.model_copy(update={"evaluate": (one,)}), model, lambda line: None)
    assert len(asked.prompts) == {"gsm8k": 2, "dapo-math-17k": 2, "deepcoder": 1}.get(name, 6)
    assert asked.sampling.max_new_tokens == config.rollout.max_new_tokens
    assert asked.config.ks[-1] == asked.config.samples
    for prompt in asked.prompts:
        assert {"deepcoder": "tests"}.get(name, "answer") in prompt.metadata
    assert config.checkpoint.best is None or config.checkpoint.best.set_name == one.name


def test_gsm8k_has_the_number_behind_its_last_line(recipe):
    first, second = recipe("gsm8k", [GSM8K]).take(2)
    assert [p.metadata for p in (first, second)] == [{"answer": "72"}, {"answer": "1,072"}]
    assert first.text.endswith(
        "How many?\n\nReason step by step, and put your final answer within \\boxed{}.<|assistant|>"
    )


def test_dapo_math_has_messages_and_the_ground_truth_and_each_prompt_once(recipe):
    source = recipe("dapo-math-17k", [DAPO])
    assert source.size == 2
    assert source.facts()["dapo-math-17k"]["left_out"]["duplicate"] == 1
    first, second = source.take(2)
    assert first.text == f"<|user|>{_DAPO.format(n=1)}<|assistant|>"
    assert [p.metadata["answer"] for p in (first, second)] == ["2", "4"]


def test_deepcoder_has_tests_of_both_forms_and_leaves_out_what_python_does_not_read(recipe):
    source = recipe("deepcoder", [DEEPCODER["primeintellect"], DEEPCODER["taco"]])
    prompts = {prompt.origin: prompt for prompt in source.take(6)}
    assert prompts["primeintellect:0"].metadata == {"tests": STREAMS}
    assert prompts["taco:0"].metadata == {"tests": CALLS}
    assert "in one ```python block.<|assistant|>" in prompts["taco:0"].text
    left_out = source.facts()["taco"]
    assert left_out["left_out"]["bad_line"] == 1
    assert '"tests" is no JSON' in left_out["first"]["bad_line"]


@pytest.mark.parametrize("name", ["reasoning-gym", "reasoning-gym-tiny"])
def test_reasoning_gym_asks_every_task_and_its_own_verdict_on_right_answers_is_1(name, recipe):
    source = recipe(name)
    tasks = {questions.name for questions in source.sources}
    prompts = source.take(2 * len(tasks))
    assert {prompt.metadata["task"] for prompt in prompts} == tasks
    verdict = load(Component.named("reasoning_gym"))
    for prompt in prompts:
        assert verdict(Question(prompt, prompt.metadata["answer"], np.zeros(1, np.int32), "stop")) == 1


@pytest.mark.parametrize(
    ("name", "samples", "right", "wrong"),
    [
        ("gsm8k", [GSM8K], "24 and 48 are \\boxed{72}", "72, or so: \\boxed{48}"),
        ("dapo-math-17k", [DAPO], "1 + 1 = 2\nAnswer: $2$", "2\nAnswer: 3"),
        (
            "deepcoder",
            [DEEPCODER["primeintellect"]] * 2,
            "```python\nprint(int(input()) ** 2)\n```",
            "```python\n9\n```",
        ),
    ],
)
def test_the_verifiers_of_a_recipe_grade_its_answers(name, samples, right, wrong, recipe):
    config, _ = load_config_and_model(RECIPES / f"{name}.yaml")
    prompt = recipe(name, samples).take(1)[0]
    with open_grader(config.rewards, config.grading.model_copy(update={"workers": 1})) as grader:
        verdicts = grader.ask([Question(prompt, text, np.zeros(1, np.int32), "stop") for text in (right, wrong)])
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0]


def test_the_tiny_mixture_has_a_held_out_part_that_is_never_trained_on(recipe):
    held_out = {prompt.metadata["question"] for prompt in recipe("reasoning-gym-tiny", part="held_out").take(20)}
    train = {prompt.metadata["question"] for prompt in recipe("reasoning-gym-tiny").take(200)}
    assert len(held_out) > 5
    assert not held_out & train


def test_every_recipe_has_its_test():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {
        "gsm8k", "dapo-math-17k", "deepcoder", "reasoning-gym", "reasoning-gym-tiny",
    }  # fmt: skip
