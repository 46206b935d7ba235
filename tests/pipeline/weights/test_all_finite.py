"""Weights that are not finite are named, each, behind a stream that goes to its end."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pipeline.trainer.rank import TrainerRank
from pipeline.weights import FiniteWeights, NotFiniteWeightsError


def passed(*buckets):
    seen = FiniteWeights()
    assert list(seen.passing(buckets)) == list(buckets)
    return seen


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_that_is_none_is_named_with_its_tensor(number, dtype):
    wrong = torch.ones(3, 4, dtype=dtype)
    wrong[1, 2] = number
    seen = passed([("a", torch.ones(2))], [("b", torch.ones(5)), ("c", wrong)], [("d", torch.ones(1))])
    with pytest.raises(NotFiniteWeightsError, match=r"are not finite: c \(1 of 12 numbers\)\. No server"):
        seen.check()


def test_infinities_of_both_signs_do_not_cancel_out():
    with pytest.raises(NotFiniteWeightsError, match=r"a \(2 of 2 numbers\)"):
        passed([("a", torch.tensor([torch.inf, -torch.inf]))]).check()


def test_of_many_the_first_are_named_and_the_others_counted():
    with pytest.raises(NotFiniteWeightsError, match=r"t0 \(.*t4 \(9 of 9 numbers\) and 2 more\. "):
        passed([(f"t{i}", torch.full((9,), torch.nan)) for i in range(7)]).check()


def test_finite_weights_of_any_kind_pass():
    """Also those whose sum is not finite, whole numbers, and nothing."""
    large = torch.full((4,), torch.finfo(torch.float32).max)
    passed([], [("a", large), ("b", torch.arange(3)), ("c", torch.ones(0)), ("d", torch.ones(2).half())]).check()


BUCKETS = [[("a", torch.ones(2, 2))], [("b", torch.full((2, 2), torch.nan))], [("c", torch.ones(3))]]


def rank(senders, sender="some"):
    """A trainer rank that streams the buckets."""
    made = TrainerRank.__new__(TrainerRank)
    made.senders, made.sender, made.rollout_weights = senders, sender, "int8"
    made.trainer = SimpleNamespace(
        exporter=SimpleNamespace(bucket_bytes=1),
        export=lambda everywhere: iter(BUCKETS),
        share=lambda senders: ([bucket] for bucket in BUCKETS),
        policy=SimpleNamespace(model=SimpleNamespace(family=SimpleNamespace(kept_whole=()))),
    )
    return made


@pytest.mark.parametrize("senders", [None, (0, 1)], ids=["one sender", "two"])
def test_a_rank_that_sends_ends_its_stream_with_the_names_and_not_before(senders):
    rounds = rank(senders)._rounds()
    came = [name for _ in BUCKETS for bucket in next(rounds) for name, _ in bucket]
    assert came == ["a", "b", "c"]
    with pytest.raises(NotFiniteWeightsError, match=r"b \(4 of 4 numbers\)"):
        next(rounds)


def test_a_rank_that_sends_nothing_walks_to_the_end():
    assert len(list(rank(None, sender=None)._rounds())) == len(BUCKETS)
