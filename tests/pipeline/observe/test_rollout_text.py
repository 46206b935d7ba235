import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.tokenizer import load_tokenizer, write_character_tokenizer
from pipeline.observe.rollout_text import pick, rollout_text
from pipeline.types import Episode, Group, Prompt
from tests.support.episodes import conversation, graded_group, plain_rollout


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_character_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def make_group(tokenizer, texts, rewards=()):
    def one(text):
        ids = np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int32)
        versions = np.where(np.arange(len(ids)) < 2, 3, 4).astype(np.int32)
        logprobs = -np.arange(len(ids), dtype=np.float32)
        return plain_rollout(ids, logprobs, weight_versions=versions)

    prompt = Prompt(
        np.zeros(1, np.int32), "<|user|>21<|assistant|>", {"answer": "12", "tests": ["1" * 9000]}, index=5, origin="q:7"
    )
    rollouts = list(map(one, texts))
    return graded_group(prompt, rollouts, rewards) if len(rewards) else Group.of_single_turns(prompt, rollouts)


def test_prompt_response_reward_versions_and_logprobs_can_be_read(tokenizer):
    text = rollout_text(make_group(tokenizer, ["21<|eos|>", "12<|eos|>"], [0, 1]), 1, tokenizer)
    for part in (
        "prompt 5, sample 1 of 2",
        "reward    1.000",
        "finish    stop after 3 tokens",
        "versions  3 (tokens 0-1), 4 (tokens 2-2)",
        "log-prob  sum -3.000, mean -1.000 nats",
        "origin    q:7",
        "answer    12",
        "tests     ['" + "1" * 998 + "... (9,004 characters)\n",
        "<|user|>21<|assistant|>",
        "\n12<|eos|>\n",
        "'1' 0.000  '2' -1.000  '<|eos|>' -2.000".replace("'1' 0.000", "'1' -0.000"),
    ):
        assert part in text


def test_the_parts_of_a_reward_stand_behind_it_where_there_are_several(tokenizer):
    group = make_group(tokenizer, ["12<|eos|>"], [0.75])
    (episode,) = group.episodes

    def shown(parts):
        return rollout_text(
            dataclasses.replace(group, episodes=(dataclasses.replace(episode, parts=parts),)), 0, tokenizer
        )

    assert "reward    0.750 (number 1, length -0.25)\n" in shown({"number": 1.0, "length": -0.25})
    assert "reward    0.750\n" in shown({"number": 0.75})


def test_an_ungraded_and_an_empty_rollout_are_said_to_be_so(tokenizer):
    text = rollout_text(make_group(tokenizer, [""]), 0, tokenizer)
    assert "reward    not graded" in text
    assert "log-prob  no tokens" in text
    assert "versions  none" in text


def positions(groups, count):
    return [(next(k for k, g in enumerate(groups) if g is group), i) for group, i in pick(groups, count)]


def test_picks_are_the_best_and_the_worst_answer_of_prompts_spread_over_the_step(tokenizer):
    groups = [make_group(tokenizer, ["1", "2", "3"], rewards) for rewards in [(0, 1, 0.5), (1, 0, 0.5)] * 4]
    assert positions(groups, 4) == [(2, 1), (2, 0), (5, 0), (5, 1)]
    assert positions(groups, 3) == [(2, 1), (2, 0), (5, 0)]
    assert {place % 2 for place, _ in positions(groups, 8)} == {0, 1}


@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 130))
def test_picks_are_as_many_as_asked_for_and_none_twice(groups, samples, count):
    episode = Episode((plain_rollout([1], np.zeros(1)),))
    group = Group(Prompt(np.zeros(1, np.int32), ""), (episode,) * samples)
    shown = pick([dataclasses.replace(group) for _ in range(groups)], count)
    assert len(shown) == len({(id(g), i) for g, i in shown}) == min(count, groups * samples)


def test_picks_show_further_answers_only_when_every_prompt_has_shown_two(tokenizer):
    groups = [make_group(tokenizer, ["1", "2", "3"], rewards) for rewards in [(0, 1, 0.5), (0.5, 0.5, 0.5)]]
    assert positions(groups, 5) == [(0, 1), (0, 0), (1, 0), (1, 2), (0, 2)]
    assert len(positions(groups, 99)) == 6
    assert pick([], 3) == []


def test_picks_of_ungraded_or_single_answers_are_one_each_in_order(tokenizer):
    assert positions([make_group(tokenizer, ["1"]) for _ in range(4)], 4) == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert positions([make_group(tokenizer, ["1", "2", "3"]) for _ in range(4)], 2) == [(2, 0), (2, 1)]


def test_a_conversation_says_its_turns_and_what_each_was_worth(tokenizer):
    told = conversation(tokenizer, [["12", "34", "5"], ["6"]], reward=1.5, turn_rewards=(0.0, 0.5, 1.0))
    text = rollout_text(Group(Prompt(np.zeros(1, np.int32), "question"), (told,)), 0, tokenizer)
    assert "turns     3 in 2 rollouts, of which this is the last, rewards 0, 0.5, 1\n" in text
