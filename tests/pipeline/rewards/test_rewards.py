import sys
import types
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import load_config
from pipeline.data.tokenizer import load_tokenizer, write_character_tokenizer
from pipeline.rewards import RewardError, grade, register_reward, resolve_reward, response_text
from pipeline.types import Group, Prompt, Rollout


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
    (graded,) = grade([group(tokenizer, *responses)], tokenizer, resolve_reward("exact_match"))
    assert graded.rewards.dtype == np.float32
    assert graded.rewards.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0]


def test_grading_leaves_everything_else_as_it_was(tokenizer):
    before = group(tokenizer, ("1<|eos|>",), ("2<|eos|>",))
    (after,) = grade([before], tokenizer, lambda prompt, text, ids, finish: float(text))
    assert after.prompt is before.prompt
    assert all(a is b for a, b in zip(after.rollouts, before.rollouts, strict=True))
    assert after.rewards.tolist() == [1, 2]
    assert len(before.rewards) == 0


def test_a_verifier_sees_text_without_the_stop_token_and_ids_with_it(tokenizer):
    seen = []

    def verifier(prompt, text, ids, finish):
        seen.append((text, len(ids), finish, prompt.index))
        return True

    grade([group(tokenizer, ("12<|eos|>",), ("12", "length"))], tokenizer, verifier)
    assert seen == [("12", 3, "stop", 7), ("12", 2, "length", 7)]
    assert response_text(rollout(tokenizer, "a<|pad|>b", "length"), tokenizer) == "a<|pad|>b"


def test_a_verifier_that_raises_names_the_prompt_and_stops(tokenizer):
    def verifier(prompt, text, ids, finish):
        raise ZeroDivisionError("no such thing")

    with pytest.raises(RewardError, match=r"prompt 7 .*312.*response '9'.*ZeroDivisionError: no such thing") as caught:
        grade([group(tokenizer, ("9<|eos|>",))], tokenizer, verifier)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("value", [None, "1", float("nan"), float("inf"), [1.0]])
def test_a_reward_that_is_no_finite_number_is_refused(value, tokenizer):
    with pytest.raises(RewardError, match="no finite number, on prompt 7"):
        grade([group(tokenizer, ("9<|eos|>",))], tokenizer, lambda *_: value)


def test_a_users_function_is_found_by_its_dotted_path(tokenizer, monkeypatch):
    module = types.ModuleType("my_rewards")
    module.half = lambda prompt, text, ids, finish: 0.5
    module.number = 3
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    assert resolve_reward("my_rewards:half") is module.half
    with pytest.raises(RewardError, match="my_rewards has no function 'number'"):
        resolve_reward("my_rewards:number")
    with pytest.raises(RewardError, match="has no function 'whole'"):
        resolve_reward("my_rewards:whole")
    with pytest.raises(RewardError, match="cannot be imported: No module named 'nowhere_at_all'"):
        resolve_reward("nowhere_at_all:half")


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(RewardError, match=r"no verifier 'exact'; there are .*exact_match.*package\.module:function"):
        resolve_reward("exact")


def test_a_name_is_taken_once():
    with pytest.raises(RewardError, match="already a verifier 'exact_match'"):
        register_reward("exact_match")(lambda prompt, response_text, response_ids, finish_reason: 0.0)


def test_a_verifier_beside_the_yaml_file_is_found_before_one_on_the_path(tmp_path, monkeypatch):
    beside, elsewhere = tmp_path / "beside", tmp_path / "elsewhere"
    for folder, value in ((beside, 0.25), (elsewhere, 0.75)):
        folder.mkdir()
        (folder / "grade_beside.py").write_text(f"def grade(*_):\n    return {value}\n")
    monkeypatch.setattr(sys, "path", [str(elsewhere), *sys.path])
    (beside / "run.yaml").write_text(f"base: {Path('configs/quickstart.yaml').resolve()}\n")
    config = load_config(beside / "run.yaml", ["data.reward=grade_beside:grade"])
    assert config.data.reward_directory == beside.resolve()
    assert resolve_reward(config.data.reward, config.data.reward_directory)(None, "", None, "stop") == 0.25
    (beside / "above").mkdir()
    (beside / "above" / "run.yaml").write_text("base: ../run.yaml\n")
    again = load_config(beside / "above" / "run.yaml", ["data.reward=grade_beside:grade"])
    assert again.data.reward_directory == beside.resolve()
    assert load_config(beside / "run.yaml").data.reward_directory is None


def test_a_verifier_whose_module_another_one_hides_is_refused(tmp_path):
    for name in ("math", "json"):  # built in, and a file of Python's own
        (tmp_path / f"{name}.py").write_text("def grade(*_):\n    return 1.0\n")
        with pytest.raises(RewardError, match=f"the module {name} of .* is hidden by .*; rename the file"):
            resolve_reward(f"{name}:grade", tmp_path)
