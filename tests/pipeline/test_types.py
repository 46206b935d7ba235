"""What a rollout and an episode may hold."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.types import Episode, Rollout, Sampled
from tests.support.episodes import plain_rollout

MODEL = SimpleNamespace(num_layers=2, topk=2, num_experts=4, moe_layers=(1,))


def make_rollout(**changes) -> Rollout:
    """A prompt of 2, three response tokens of which the tool wrote the second; the first layer is dense."""
    routes = np.zeros((4, 2, 2), np.uint8)
    routes[:, 1] = [0, 3]
    fields = {
        "prompt_ids": np.array([1, 2], np.int32),
        "response_ids": np.array([5, 6, 7], np.int32),
        "rollout_logprobs": np.array([-0.5, 0, -1], np.float32),
        "routes": routes,
        "weight_versions": np.array([3, -1, 4], np.int32),
        "finish_reason": "stop",
        "trained": np.array([True, False, True]),
        "kept": np.array([[5, 9], [-1, -1], [7, -1]], np.int32),
    }
    return Rollout(**(fields | changes))


def test_the_tokens_that_were_sampled_are_what_counts():
    rollout = make_rollout()
    assert len(rollout) == 3
    assert rollout.trained_tokens == 2
    assert rollout.token_ids.tolist() == [1, 2, 5, 6, 7]
    assert make_rollout(trained=None, rollout_logprobs=np.full(3, -1, np.float32), kept=None,
                        weight_versions=np.zeros(3, np.int32)).trained_tokens == 3  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": np.zeros(0, np.int32)}, "a prompt of at least one token"),
        ({"rollout_logprobs": np.zeros(2, np.float32)}, "rollout_logprobs has 2 rows for 3 tokens"),
        ({"rollout_logprobs": np.zeros(3)}, "rollout_logprobs is float64, not float32"),
        ({"weight_versions": np.zeros(4, np.int32)}, "weight_versions has 4 rows for 3 tokens"),
        ({"routes": np.zeros((5, 2, 2), np.uint8)}, "routes has 5 rows for 4 tokens"),
        ({"routes": np.zeros((4, 2), np.uint8)}, r"routes has shape \[4, 2\]"),
        ({"routes": np.full((4, 2, 2), -1, np.int16)}, "routes holds -1"),
        ({"kept": np.full((2, 1), -1, np.int32)}, "kept has 2 rows for 3 tokens"),
        ({"kept": np.array([[4], [-1], [7]], np.int32)}, "not among those that were kept"),
        ({"kept": np.array([[5, 5], [-1, -1], [7, -1]], np.int32)}, "not among those that were kept"),
        ({"kept": np.array([[5], [6], [7]], np.int32)}, "was not sampled has a kept set"),
        ({"response_ids": np.array([5, -6, 7], np.int32), "kept": None}, "response_ids holds -6"),
        ({"rollout_logprobs": np.array([-0.5, 0, 0.5], np.float32)}, "at most 0, got 0.5"),
        ({"rollout_logprobs": np.array([-0.5, 0, np.nan], np.float32)}, "at most 0, got nan"),
        ({"rollout_logprobs": np.array([-0.5, 0, -np.inf], np.float32)}, "at most 0, got nan"),
        ({"rollout_logprobs": np.array([-0.5, -1, -1], np.float32)}, "was not sampled has a log-prob"),
        ({"weight_versions": np.array([3, 3, 4], np.int32)}, "was not sampled has a weight version"),
        ({"weight_versions": np.array([-1, -1, 4], np.int32)}, "a sampled token has no weight version"),
        ({"trained": np.ones(2, bool)}, "trained has 2 rows for 3 tokens"),
        ({"mixed_kv": np.ones(2, bool)}, "mixed_kv has 2 rows for 3 tokens"),
        ({"mixed_kv": np.ones(3, bool)}, "was not sampled is marked mixed_kv"),
    ],
)
def test_a_rollout_that_cannot_be_is_refused_where_it_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        make_rollout(**changes)


def test_tokens_over_old_keys_and_values_are_sampled_and_not_comparable():
    assert make_rollout().comparable.tolist() == [True, False, True]
    marked = make_rollout(mixed_kv=np.array([False, False, True]))
    assert marked.trained_tokens == 2
    assert marked.comparable.tolist() == [True, False, False]
    whole = make_rollout(weight_versions=np.array([4, -1, 4], np.int32))
    assert whole.is_of(4)
    assert not make_rollout().is_of(4), "a token of version 3"
    assert not dataclasses.replace(whole, mixed_kv=np.array([False, False, True])).is_of(4)


def with_route(value) -> Rollout:
    routes = make_rollout().routes.copy()
    routes[2, 1] = value
    return make_rollout(routes=routes)


def test_routes_and_tokens_of_another_model_are_refused():
    make_rollout().check_model(MODEL, 10)  # a dense layer's rows may be anything
    with pytest.raises(ValueError, match="response_ids holds token 7, outside the model's vocabulary of 7"):
        make_rollout().check_model(MODEL, 7)
    with pytest.raises(ValueError, match="kept holds token 9, outside"):
        make_rollout().check_model(MODEL, 9)
    with pytest.raises(ValueError, match="a route of layer 1 names expert 3 twice"):
        with_route([3, 3]).check_model(MODEL, 10)
    with pytest.raises(ValueError, match=r"expert ids 0 \.\. 4 are outside \[0, 4\)"):
        with_route([0, 4]).check_model(MODEL, 10)
    with pytest.raises(ValueError, match="for 2 layers, top 2; the model has 3, top 2"):
        make_rollout().check_model(SimpleNamespace(**(vars(MODEL) | {"num_layers": 3})), 10)


def test_going_on_adds_what_was_sampled_and_changes_nothing_that_was_there():
    before = make_rollout(retractions=1, servers=(0,), seconds=0.5)
    more = Sampled(
        ids=np.array([8], np.int32),
        logprobs=np.array([-2], np.float32),
        routes=np.ones((1, 2, 2), np.uint8),
        weight_versions=np.array([5], np.int32),
        finish_reason="length",
        kept=np.array([[1, 2, 8]], np.int32),
        retractions=2,
        server=3,
        seconds=0.25,
    )
    after = before.extended(more)
    assert after.trained.tolist() == [True, False, True, True]
    assert after.weight_versions.tolist() == [3, -1, 4, 5]
    assert np.array_equal(after.routes[:4], before.routes)
    assert after.kept.tolist() == [[5, 9, -1], [-1, -1, -1], [7, -1, -1], [1, 2, 8]]
    assert (after.finish_reason, after.retractions) == ("length", 3)
    assert (after.servers, after.seconds) == ((0, 3), 0.75)
    assert after.extended(more).servers == (0, 3)


def test_an_episode_has_a_reward_or_a_failure_and_at_least_one_rollout():
    one = plain_rollout([1], np.zeros(1))
    assert not Episode((one,)).graded
    assert Episode((one,), failure="it crashed").graded
    with pytest.raises(ValueError, match="not both"):
        Episode((one,), 1.0, "it crashed")
    with pytest.raises(ValueError, match="at least one rollout"):
        Episode(())


def test_a_rollout_is_not_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_rollout().retractions = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_turns_are_runs_of_sampled_tokens_and_an_episode_has_a_reward_for_each():
    trained = np.array([True, True, False, True, False, False, True])
    versions = np.where(trained, 0, -1).astype(np.int32)
    one = plain_rollout(range(7), np.where(trained, -1, 0), trained=trained, weight_versions=versions)
    assert one.turn_numbers.tolist() == [0, 0, -1, 1, -1, -1, 2]
    late = ~trained
    versions = np.where(late, 0, -1).astype(np.int32)
    other = plain_rollout(range(7), np.where(late, -1, 0), trained=late, weight_versions=versions)
    assert other.turn_numbers.tolist() == [-1, -1, 0, -1, 1, 1, -1]
    episode = Episode((one, other), 1.0, turn_rewards=(0.0,) * 5)
    assert episode.turn_numbers.tolist() == [0, 0, -1, 1, -1, -1, 2, -1, -1, 3, -1, 4, 4, -1]
    with pytest.raises(ValueError, match="an episode of 5 turns has 4 rewards of turns"):
        Episode((one, other), 1.0, turn_rewards=(0.0,) * 4)
