"""Calibration of sampled tokens, on distributions of which everything is known."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.diagnose.breakdown import calibration
from pipeline.step import PolicyTokens

VOCABULARY = 64


def drawn(rng, tokens, sharpness, kept=VOCABULARY):
    """Tokens of random distributions, drawn from the `kept` likeliest."""
    scores = rng.standard_normal((tokens, VOCABULARY)) * sharpness
    p = np.exp(scores - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p.sort(1)
    entropy = -(p * np.log(p, where=p > 0, out=np.zeros_like(p))).sum(1)
    among = p[:, -kept:] / p[:, -kept:].sum(1, keepdims=True)
    position = np.minimum((among.cumsum(1) < rng.random((tokens, 1))).sum(1), kept - 1)
    logprobs = np.log(p[np.arange(tokens), VOCABULARY - kept + position])
    return PolicyTokens([logprobs.astype(np.float32)], [entropy.astype(np.float32)], np.zeros((0, 4)))


def test_a_policy_that_is_sure_of_itself_is_not_taken_for_a_mask():
    rng = np.random.default_rng(0)
    found = [calibration(drawn(rng, 100, sharpness), VOCABULARY) for sharpness in (5, 20, 80) for _ in range(200)]
    assert not any(c.off for c in found)
    assert any(abs(c.difference) > max(5 * c.error, 0.01) for c in found)  # standard errors alone would tell of some


@pytest.mark.parametrize("sharpness", [1, 2])
def test_a_mask_on_sampling_is_beyond_chance(sharpness):
    found = calibration(drawn(np.random.default_rng(0), 1000, sharpness, kept=4), VOCABULARY)
    assert found.off
    assert found.difference < 0
