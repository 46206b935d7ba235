from __future__ import annotations

import pytest
import torch

from pipeline.objectives import Denominators
from pipeline.objectives.terms.reduce import REDUCTIONS, reduce, token_weights

MASK = torch.tensor([[1, 0, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
PER_TOKEN = torch.tensor([[1.0, 7.0, 2.0, 6.0, 8.0], [5.0, 9, 9, 9, 9], [9, 9, 9, 9, 9]], dtype=torch.float64)
PER_SEQUENCE = torch.tensor([[2.0], [5.0], [99.0]], dtype=torch.float64)
PROMPT_TOKENS = torch.tensor([3, 1, 1])
"""The second and the third are of one prompt."""
WHOLE = Denominators.of(MASK, max_length=8, prompts=2)


def _reduced(term: torch.Tensor, rows: slice, reduction, denominators: Denominators = WHOLE) -> torch.Tensor:
    lengths = MASK[rows].sum(-1, keepdim=True).double()
    weights = token_weights(reduction, lengths, denominators, PROMPT_TOKENS[rows])
    return reduce(term[rows], MASK[rows], weights)


ALL = slice(None)


@pytest.mark.parametrize(
    ("reduction", "of_tokens", "of_sequences"),
    [
        ("sequence_mean_token_mean", (9 / 3 + 5) / 3, (2 + 5) / 3),
        ("sequence_mean_token_sum", (9 + 5) / 3, (3 * 2 + 5) / 3),
        ("prompt_token_mean", (9 / 3 + 5) / 2, (3 * 2 / 3 + 5) / 2),
        ("token_mean", (9 + 5) / 4, (3 * 2 + 5) / 4),
        ("token_sum_constant", (9 + 5) / (3 * 8), (3 * 2 + 5) / (3 * 8)),
        ("sequence_mean", (9 / 3 + 5) / 3, (2 + 5) / 3),
    ],
)
def test_a_reduction_is_its_equation_over_trained_tokens_and_an_empty_sequence_counts_below_but_not_above(
    reduction, of_tokens: float, of_sequences: float
) -> None:
    assert _reduced(PER_TOKEN, ALL, reduction).item() == pytest.approx(of_tokens, rel=1e-14)
    assert _reduced(PER_SEQUENCE, ALL, reduction).item() == pytest.approx(of_sequences, rel=1e-14)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_shares_add_up(reduction) -> None:
    shares = sum(_reduced(PER_TOKEN, slice(i, i + 1), reduction) for i in range(3))
    torch.testing.assert_close(shares, _reduced(PER_TOKEN, ALL, reduction), rtol=1e-14, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_mini_batch_without_tokens_reduces_to_zero(reduction) -> None:
    empty, nothing = Denominators(sequences=3, tokens=0, max_length=8, prompts=2), torch.zeros(3)
    weights = token_weights(reduction, torch.zeros(3, 1), empty, nothing)
    assert reduce(torch.ones(3, 4), torch.zeros(3, 4, dtype=torch.bool), weights).item() == 0.0


def test_unknown_reductions_and_impossible_denominators_are_refused() -> None:
    with pytest.raises(ValueError, match="sequence_mean_token_mean"):
        _reduced(PER_TOKEN, ALL, "mean")
    with pytest.raises(ValueError, match="sequences >= 1"):
        Denominators(sequences=0, tokens=0, max_length=1)
    for prompts in (0, 3):
        with pytest.raises(ValueError, match="not more prompts than sequences"):
            Denominators(sequences=2, tokens=0, max_length=1, prompts=prompts)


def test_a_mean_over_a_prompts_tokens_needs_to_know_them() -> None:
    ones = torch.ones(3, 1)
    for denominators, tokens in ((Denominators(3, 4, 8), PROMPT_TOKENS), (WHOLE, None)):
        with pytest.raises(ValueError, match=r"pass prompt_tokens and Denominators.prompts"):
            token_weights("prompt_token_mean", ones, denominators, tokens)
