"""Answers that go in circles, and answers that nobody can read: what a policy that breaks down writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.types import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RUN, SHORTEST, REPEATED = 6, 64, 0.5
"""Tokens of a run that is looked for again; tokens of the shortest answer that is judged; the share of runs that were
there before, above which an answer repeats itself."""
UNREADABLE = 0.05
"""The share of an answer's characters, above which it is garbage."""

_SPACES = str.maketrans("", "", "\n\t\r")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def answer_metrics(rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase | None) -> dict[str, float]:
    """Shares of the rollouts of a step, of what the policy sampled."""
    own = [rollout.response_ids[rollout.trained] for rollout in rollouts]
    circles = sum(repeated(ids) > REPEATED for ids in own)
    garbage = 0
    if tokenizer is not None and own:
        garbage = sum(unreadable(text) > UNREADABLE for text in tokenizer.batch_decode([ids.tolist() for ids in own]))
    return {
        "response/repeating_fraction": circles / max(1, len(own)),
        "response/garbage_fraction": garbage / max(1, len(own)),
    }


def repeated(ids: np.ndarray) -> float:
    """Share of the runs of RUN tokens that were there before; 0 for fewer than SHORTEST tokens. ids: [N]."""
    if len(ids) < SHORTEST:
        return 0.0
    windows = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64), RUN)
    hashes = np.zeros(len(windows), np.uint64)
    for k in range(RUN):
        hashes = (hashes ^ windows[:, k]) * _FACTOR
        hashes ^= hashes >> np.uint64(29)
    return 1.0 - len(np.unique(hashes)) / len(hashes)


def unreadable(text: str) -> float:
    """Share of the characters that are broken, U+FFFD, or not printable; spaces of all kinds are."""
    text = text.translate(_SPACES)
    if not text:
        return 0.0
    broken = text.count("\ufffd")
    if not text.isprintable():
        broken += sum(not char.isprintable() and not char.isspace() for char in text)
    return broken / len(text)
