from __future__ import annotations

import pytest
import torch

from pipeline.objectives import Denominators
from pipeline.objectives.terms.reduce import REDUCTIONS, reduce

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
LENGTHS = MASK.sum(-1, keepdim=True).double()
PER_TOKEN = torch.tensor([[1.0, 2.0, 6.0, 0.0], [5.0, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
PER_SEQUENCE = torch.tensor([[2.0], [5.0], [99.0]], dtype=torch.float64)
WHOLE = Denominators.of(MASK, max_length=8)


@pytest.mark.parametrize(
    ("reduction", "of_tokens", "of_sequences"),
    [
        ("sequence_mean_token_mean", (9 / 3 + 5) / 3, (2 + 5) / 3),
        ("sequence_mean_token_sum", (9 + 5) / 3, (3 * 2 + 5) / 3),
        ("token_mean", (9 + 5) / 4, (3 * 2 + 5) / 4),
        ("token_sum_constant", (9 + 5) / (3 * 8), (3 * 2 + 5) / (3 * 8)),
        ("sequence_mean", (9 / 3 + 5) / 3, (2 + 5) / 3),
    ],
)
def test_a_reduction_is_its_equation_and_an_empty_sequence_counts_below_but_not_above(
    reduction, of_tokens: float, of_sequences: float
) -> None:
    assert reduce(PER_TOKEN, LENGTHS, reduction, WHOLE).item() == pytest.approx(of_tokens, rel=1e-14)
    assert reduce(PER_SEQUENCE, LENGTHS, reduction, WHOLE).item() == pytest.approx(of_sequences, rel=1e-14)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_shares_add_up(reduction) -> None:
    shares = sum(reduce(PER_TOKEN[[i]], LENGTHS[[i]], reduction, WHOLE) for i in range(3))
    torch.testing.assert_close(shares, reduce(PER_TOKEN, LENGTHS, reduction, WHOLE), rtol=1e-14, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_mini_batch_without_tokens_reduces_to_zero(reduction) -> None:
    empty = Denominators(sequences=3, tokens=0, max_length=8)
    assert reduce(torch.zeros(3, 4), torch.zeros(3, 1), reduction, empty).item() == 0.0


def test_unknown_reductions_and_impossible_denominators_are_refused() -> None:
    with pytest.raises(ValueError, match="sequence_mean_token_mean"):
        reduce(PER_TOKEN, LENGTHS, "mean", WHOLE)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="sequences >= 1"):
        Denominators(sequences=0, tokens=0, max_length=1)
