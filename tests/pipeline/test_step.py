"""How groups become a batch."""

from __future__ import annotations

import numpy as np

from pipeline.step import Batch
from pipeline.types import Episode, Group, Prompt
from tests.support.episodes import graded_group, plain_rollout


def prompt(index=0) -> Prompt:
    return Prompt(np.zeros(1, np.int32), "question", index=index)


def test_a_batch_counts_episodes_once_and_leaves_failures_out():
    one, two, three = (plain_rollout([n] * n, np.full(n, -1.0)) for n in (1, 2, 3))
    conversation = Group(prompt(), (Episode((one, two), 1.0), Episode((three,), failure="the verifier hung")))
    batch = Batch(1, 0, (conversation, graded_group(prompt(1), [three, one], [0.0, 0.5])))
    assert batch.rewards.tolist() == [1.0, 0.0, 0.5]
    assert batch.group_of_episode.tolist() == [0, 1, 1]
    assert batch.episode_of_rollout.tolist() == [0, 0, 1, 2]
    assert [len(r) for r in batch.rollouts] == [1, 2, 3, 1]
    assert conversation.rewards.tolist() == [1.0]
