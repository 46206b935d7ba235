"""What flows through the loop: a prompt, the rollouts sampled for it, the group they form.

All arrays are numpy, so that they travel between processes without a copy of their own serialisation.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    rollout_logprobs: [N] float32, log mu(y_t | x, y_<t) at the sampling temperature, over the kept tokens if any.
    routes:           [P + N - 1, layers, topk] uint8 or int16: row t holds the experts chosen where token t was the
                      input. The last sampled token was never an input, so it has no row. None: not asked for.
    weight_versions:  [N] int32, the version of the weights that sampled each token.
    finish_reason:    "stop" (a stop token), "length" (the limit), "abort" (interrupted; what is there is valid).
    kept:             [N, K] int32, the token ids that top-k, top-p and min-p left to the sampler, -1 behind them. None:
                      all of the vocabulary.
    retractions:      how often the server dropped this request's KV cache and computed it again, tokens and routes of
                      what had been sampled included; those rows are then of the second computation.
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    rollout_logprobs: np.ndarray
    routes: np.ndarray | None
    weight_versions: np.ndarray
    finish_reason: FinishReason
    kept: np.ndarray | None = None
    retractions: int = 0

    def __len__(self) -> int:
        """Response tokens."""
        return len(self.response_ids)

    @property
    def token_ids(self) -> np.ndarray:
        """[P + N] int32."""
        return np.concatenate([self.prompt_ids, self.response_ids])

    def extended(self, more: Rollout) -> Rollout:
        """This rollout and what was sampled after it. Nothing that is here changes: the tokens keep the log-probs,
        versions and routes of the forward passes that sampled them, whatever recomputed them since.

        more: a rollout whose prompt is all of this one's tokens and whose routes, if any, are those from the last of
              them on: [M, layers, topk] for M new tokens.
        Raises ValueError where that is not so.
        """
        if not np.array_equal(more.prompt_ids, self.token_ids):
            raise ValueError("a continuation's prompt is all tokens so far, and this one's is not")
        routes = None
        if self.routes is not None:
            if more.routes is None or len(more.routes) != len(more):
                have = None if more.routes is None else len(more.routes)
                raise ValueError(f"a continuation of {len(more)} tokens brings as many route rows, not {have}")
            routes = np.concatenate([self.routes, more.routes])
        if (self.kept is None) != (more.kept is None):
            raise ValueError("a continuation is sampled from kept tokens where its beginning was, and only there")
        return Rollout(
            prompt_ids=self.prompt_ids,
            response_ids=np.concatenate([self.response_ids, more.response_ids]),
            rollout_logprobs=np.concatenate([self.rollout_logprobs, more.rollout_logprobs]),
            routes=routes,
            weight_versions=np.concatenate([self.weight_versions, more.weight_versions]),
            finish_reason=more.finish_reason,
            kept=None if self.kept is None or more.kept is None else stack_kept([self.kept, more.kept]),
            retractions=self.retractions + more.retractions,
        )


def stack_kept(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Kept sets [n, K] of several widths, one behind the other: [sum n, widest K] int32, -1 behind each."""
    out = np.full((sum(len(p) for p in parts), max(p.shape[1] for p in parts)), -1, np.int32)
    row = 0
    for part in parts:
        out[row : row + len(part), : part.shape[1]] = part
        row += len(part)
    return out


@dataclass(frozen=True)
class Group:
    """The G rollouts of one prompt. rewards: [G] float32, empty until graded."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    rewards: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))


def route_dtype(num_experts: int) -> np.dtype:
    """The narrowest type that holds every expert id: uint8 up to 256 experts, else int16."""
    return np.dtype(np.uint8 if num_experts <= 256 else np.int16)


def layer_with_duplicates(routes: np.ndarray) -> int | None:
    """A layer of routes [tokens, layers, topk] in which a row names an expert twice, or None."""
    for a in range(routes.shape[-1] - 1):
        for b in range(a + 1, routes.shape[-1]):
            same = routes[..., a] == routes[..., b]
            if same.any():
                return int(same.any(0).nonzero()[0][0])
    return None
