import numpy as np
import pytest

from pipeline.data.tokenizer import load_tokenizer, write_character_tokenizer
from pipeline.observe.rollout_text import pick, rollout_text
from pipeline.types import Group, Prompt, Rollout


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_character_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def make_group(tokenizer, texts, rewards=()):
    def one(text):
        ids = np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int32)
        versions = np.where(np.arange(len(ids)) < 2, 3, 4).astype(np.int32)
        logprobs = -np.arange(len(ids), dtype=np.float32)
        return Rollout(np.zeros(1, np.int32), ids, logprobs, None, versions, "stop")

    prompt = Prompt(np.zeros(1, np.int32), "<|user|>21<|assistant|>", {"answer": "12"}, index=5)
    return Group(prompt, tuple(map(one, texts)), np.asarray(rewards, np.float32))


def test_prompt_response_reward_versions_and_logprobs_can_be_read(tokenizer):
    text = rollout_text(make_group(tokenizer, ["21<|eos|>", "12<|eos|>"], [0, 1]), 1, tokenizer)
    for part in (
        "prompt 5, sample 1 of 2",
        "reward    1.000",
        "finish    stop after 3 tokens",
        "versions  3 (tokens 0-1), 4 (tokens 2-2)",
        "log-prob  sum -3.000, mean -1.000 nats",
        "answer    12",
        "<|user|>21<|assistant|>",
        "\n12<|eos|>\n",
        "'1' 0.000  '2' -1.000  '<|eos|>' -2.000".replace("'1' 0.000", "'1' -0.000"),
    ):
        assert part in text


def test_an_ungraded_and_an_empty_rollout_are_said_to_be_so(tokenizer):
    text = rollout_text(make_group(tokenizer, [""]), 0, tokenizer)
    assert "reward    not graded" in text
    assert "log-prob  no tokens" in text
    assert "versions  none" in text


def test_picks_are_spread_over_the_groups_before_any_group_shows_two(tokenizer):
    groups = [make_group(tokenizer, ["1", "2"]) for _ in range(8)]

    def positions(count):
        return [(next(k for k, g in enumerate(groups) if g is group), i) for group, i in pick(groups, count)]

    assert positions(4) == [(0, 0), (2, 0), (4, 0), (6, 0)]
    assert positions(9) == [(k, 0) for k in range(8)] + [(0, 1)]
    assert len(positions(99)) == 16
    assert pick([], 3) == []
