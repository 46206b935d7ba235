from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.objectives import mismatch_by, mismatch_metrics

MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=bool)
ROLLOUT = np.array([[-1.0, -2.0, -0.5, np.nan], [-3.0, -0.1, np.inf, 7.0], [np.nan] * 4])
LOG_W = np.array([[0.1, -0.8, 0.05, 0.0], [0.02, -0.03, 0.0, 0.0], [0.0] * 4])
PROXIMAL = ROLLOUT + LOG_W
TOKENS = LOG_W[MASK]
W = np.exp([LOG_W[0, :3].sum(), LOG_W[1, :2].sum()])


def test_every_metric_is_its_definition_and_padding_is_never_read() -> None:
    got = mismatch_metrics(PROXIMAL, ROLLOUT, MASK)
    p, q = np.exp(PROXIMAL[MASK]), np.exp(ROLLOUT[MASK])
    expected = {
        "mismatch/k1": -TOKENS.mean(),
        "mismatch/k3": (np.exp(TOKENS) - 1 - TOKENS).mean(),
        "mismatch/abs_logprob": np.abs(TOKENS).mean(),
        "mismatch/max_abs_logprob": 0.8,
        "mismatch/p99": np.quantile(np.abs(TOKENS), 0.99),
        "mismatch/ppl_ratio": np.mean([np.exp(-LOG_W[0, :3].mean()), np.exp(-LOG_W[1, :2].mean())]),
        "mismatch/chi2_token": np.mean(np.exp(2 * TOKENS)) - 1,
        "mismatch/chi2_sequence": np.mean(W**2) - 1,
        "mismatch/ess": W.sum() ** 2 / (2 * (W**2).sum()),
        "mismatch/f2": 1 / 5,
        "mismatch/pearson": np.corrcoef(p, q)[0, 1],
        "mismatch/nonfinite": 0.0,
    }
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=1e-12), key


def test_float32_tensors_and_arrays_give_the_same() -> None:
    ours = mismatch_metrics(torch.tensor(PROXIMAL), torch.tensor(ROLLOUT), torch.tensor(MASK))
    assert ours == mismatch_metrics(PROXIMAL, ROLLOUT, MASK)
    single = mismatch_metrics(PROXIMAL.astype(np.float32), ROLLOUT.astype(np.float32), MASK)
    assert single["mismatch/k3"] == pytest.approx(ours["mismatch/k3"], rel=1e-5)


def test_equal_engines_have_no_mismatch() -> None:
    got = mismatch_metrics(ROLLOUT, ROLLOUT, MASK)
    ones = ("mismatch/ppl_ratio", "mismatch/ess", "mismatch/pearson")
    assert all(got[key] == pytest.approx(1) for key in ones)
    assert all(value == 0 for key, value in got.items() if key not in ones)


def test_a_token_that_one_engine_finds_impossible_is_counted_and_left_out_of_the_means() -> None:
    rollout = ROLLOUT.copy()
    rollout[0, 1] = -np.inf
    got = mismatch_metrics(PROXIMAL, rollout, MASK)
    assert got["mismatch/nonfinite"] == 1
    assert got["mismatch/max_abs_logprob"] == pytest.approx(0.1)


def test_the_effective_sample_size_survives_weights_that_overflow() -> None:
    long = np.zeros((4, 4096))
    long[0] = 0.5
    got = mismatch_metrics(long, np.zeros_like(long), np.ones_like(long, dtype=bool))
    assert got["mismatch/ess"] == pytest.approx(1 / 4)
    assert got["mismatch/chi2_sequence"] == math.inf


def test_a_batch_without_tokens_is_nan_and_not_zero() -> None:
    got = mismatch_metrics(PROXIMAL, ROLLOUT, np.zeros_like(MASK))
    assert got.pop("mismatch/nonfinite") == 0
    assert all(math.isnan(value) for value in got.values())


def test_buckets_split_the_tokens() -> None:
    lag = np.array([[0, 0, 1, 9], [1, 1, 9, 9], [9] * 4])
    got = mismatch_by(PROXIMAL, ROLLOUT, MASK, lag)
    assert sorted(got) == [0, 1]
    assert got[0]["tokens"] == 2
    assert got[0]["abs_logprob"] == pytest.approx(0.45)
    assert got[1]["k1"] == pytest.approx(-(0.05 + 0.02 - 0.03) / 3)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3, 4\], rollout \[3, 3\]"):
        mismatch_metrics(PROXIMAL, ROLLOUT[:, :3], MASK)
