"""What a step of training is of: the batch it trains on, what the policy says of its tokens, and what it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.types import Ended, Episode, Group, Rollout

BETWEEN = "between"
"""The phase of a rank's seconds that belong to no other: those until its next call comes, and what it does in them."""


@dataclass(frozen=True)
class Batch:
    """What one step trains on.

    step:    its number, from 1.
    version: of the weights that the trainer held when the step began.
    groups:  graded.
    """

    step: int
    version: int
    groups: tuple[Group, ...]

    @cached_property
    def episodes(self) -> list[Episode]:
        """Those with a reward, in order: the ones that are trained on."""
        return [episode for group in self.groups for episode in group.episodes if episode.reward is not None]

    @cached_property
    def rollouts(self) -> list[Rollout]:
        """Of `episodes`, in order."""
        return [rollout for episode in self.episodes for rollout in episode.rollouts]

    @cached_property
    def rewards(self) -> np.ndarray:
        """[episodes] float32."""
        return np.array([episode.reward for episode in self.episodes], np.float32)

    @cached_property
    def group_of_episode(self) -> np.ndarray:
        """[episodes] int64: position of its group."""
        return np.repeat(np.arange(len(self.groups)), [len(group.rewards) for group in self.groups])

    @cached_property
    def episode_of_rollout(self) -> np.ndarray:
        """[rollouts] int64: position of its episode."""
        return np.repeat(np.arange(len(self.episodes)), [len(episode.rollouts) for episode in self.episodes])

    @cached_property
    def group_of_rollout(self) -> np.ndarray:
        """[rollouts] int64: position of its group."""
        return self.group_of_episode[self.episode_of_rollout]


@dataclass(frozen=True)
class PolicyTokens:
    """What the policy says of every response token of some rollouts.

    logprobs, entropy: [N] float32 a rollout; what stands at tokens that were not sampled means nothing.
    routing: [layers, 4] int64: tokens replayed, of these native selection agreed, tokens fallen back, tokens of which a
             floor refused an expert; no layers where nothing is routed.
    """

    logprobs: list[np.ndarray]
    entropy: list[np.ndarray]
    routing: np.ndarray


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    metrics:          name -> number, "step" among them.
    batch:            what it trained on.
    proximal:         pi_o on the batch's rollouts.
    current_logprobs: [N] float32 a rollout, log pi at the start of the mini-batch that trained on it.
    advantages:       a number, or [N] float32, a rollout.
    ended:            groups that ended since the step before, and that no step trains on.
    ranks:            of each trainer rank by phase, seconds (own, waited for others); BETWEEN among them.
    """

    metrics: dict[str, float]
    batch: Batch
    proximal: PolicyTokens
    current_logprobs: list[np.ndarray]
    advantages: list[np.ndarray | float]
    ended: Sequence[Ended] = ()
    ranks: Sequence[Mapping[str, tuple[float, float]]] = ()
