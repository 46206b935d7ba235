"""What flows through the loop: a prompt, the rollouts sampled for it, the group they form.

All arrays are numpy, so that they travel between processes without a copy of their own serialisation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Prompt:
    """One question.

    ids:      [prompt tokens] int32, as the model reads it (chat template applied).
    text:     the same, for people.
    metadata: what the verifier needs (the answer, the numbers, ...).
    index:    position in the data stream; a prompt drawn again has a new index.
    """

    ids: np.ndarray
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    index: int = 0


@dataclass(frozen=True)
class Rollout:
    """One sampled answer, exactly as the rollout engine returned it.

    prompt_ids:       [P] int32.
    response_ids:     [N] int32, the stop token included where there was one.
    rollout_logprobs: [N] float32, log mu(y_t | x, y_<t) at the sampling temperature.
    routes:           [P + N - 1, layers, topk] uint8 or int16: row t holds the experts chosen where token t was the
                      input. The last sampled token was never an input, so it has no row. None: not asked for.
    weight_versions:  [N] int32, the version of the weights that sampled each token.
    finish_reason:    "stop" (a stop token), "length" (the limit), "abort" (interrupted; what is there is valid).
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    rollout_logprobs: np.ndarray
    routes: np.ndarray | None
    weight_versions: np.ndarray
    finish_reason: FinishReason

    def __len__(self) -> int:
        """Response tokens."""
        return len(self.response_ids)


@dataclass(frozen=True)
class Group:
    """The G rollouts of one prompt. rewards: [G] float32, empty until graded."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    rewards: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))


def route_dtype(num_experts: int) -> np.dtype:
    """The narrowest type that holds every expert id: uint8 up to 256 experts, else int16."""
    return np.dtype(np.uint8 if num_experts <= 256 else np.int16)
