"""The one place that does index arithmetic, without any process group."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.batch.layout import (
    Sample,
    TokenLayout,
    plan_micro_batches,
    response_mask,
    trained_mask,
)
from megatron_ext.zigzag import zigzag_positions

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(LENGTHS, st.integers(1, 60), st.integers(1, 3), st.integers(1, 3))
def test_every_sample_is_dealt_once_and_ranks_run_equally_many_micro_batches(lengths, budget, dp, multiple):
    plan = plan_micro_batches(lengths, token_budget=budget, dp_size=dp, multiple_of=multiple)
    assert sorted(i for rank in plan for batch in rank for i in batch) == list(range(len(lengths)))
    assert len(plan) == dp
    assert len({len(rank) for rank in plan}) == 1
    assert len(plan[0]) % multiple == 0
    for batch in (b for rank in plan for b in rank):
        assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1


def test_micro_batches_are_balanced():
    plan = plan_micro_batches([10] * 16, token_budget=40, dp_size=2)
    assert [[len(b) for b in rank] for rank in plan] == [[4, 4], [4, 4]]
    (batches,) = plan_micro_batches([1, 1, 1, 1, 4], token_budget=4, dp_size=1)
    assert sorted(map(sorted, batches)) == [[0, 1, 2, 3], [4]], "the longest is dealt first"


@given(LENGTHS, st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 4]))
def test_slices_of_all_ranks_cover_the_pack_and_merge_back(lengths, cp, sp):
    layouts = [TokenLayout(tuple(lengths), cp, rank, sp, 0) for rank in range(cp)]
    total = layouts[0].total
    assert total % (cp * sp) == 0
    assert int(layouts[0].is_token.sum()) == sum(lengths)
    packed = torch.arange(total)
    parts = torch.stack([layout.slice_context(packed) for layout in layouts])
    assert sorted(parts.flatten().tolist()) == list(range(total))
    assert torch.equal(layouts[-1].merge_context(parts), packed)
    for rank in range(cp):
        pieces = [TokenLayout(tuple(lengths), cp, rank, sp, s).slice_sequence(packed) for s in range(sp)]
        assert torch.equal(torch.cat(pieces), parts[rank])


@given(LENGTHS, st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]), st.booleans(), st.sampled_from([1, 16, 32]))
def test_what_all_routers_see_merges_back_packed_or_padded_and_aligned(lengths, cp, sp, packed, align):
    layouts = [
        [TokenLayout(tuple(lengths), cp, c, sp, s, packed=packed, align=align) for s in range(sp)] for c in range(cp)
    ]
    first = layouts[0][0]
    assert (first.total // first.rows) % (cp * sp * align) == 0
    tokens = torch.stack([torch.arange(first.total), torch.arange(first.total) % 7], 1)
    seen = torch.stack([torch.stack([layout.slice_sequence(tokens) for layout in row]) for row in layouts])
    assert torch.equal(first.merge_sequence(seen), tokens)
    assert int(sum(layout.slice_sequence(first.is_token).sum() for row in layouts for layout in row)) == sum(lengths)
    parts = torch.stack([row[0].slice_context(tokens[:, 0]) for row in layouts])
    assert torch.equal(first.merge_context(parts), tokens[:, 0])


def test_padded_rows_are_as_long_as_the_longest_and_routers_see_them_position_by_position():
    layout = TokenLayout((2, 3), packed=False)
    assert layout.padded_lengths == (3, 3)
    assert layout.pack([np.array([10, 11]), np.array([20, 21, 22])]).tolist() == [10, 11, 0, 20, 21, 22]
    assert layout.slice_sequence(torch.tensor([10, 11, 0, 20, 21, 22])).tolist() == [10, 20, 11, 21, 0, 22]


@given(LENGTHS, st.sampled_from([1, 2]))
def test_responses_are_the_last_inputs_of_each_sequence(lengths, cp):
    layout = TokenLayout(tuple(lengths), cp_size=cp)
    packed = layout.pack([np.arange(n, dtype=np.float32) + 100 * i for i, n in enumerate(lengths)], fill=-1)
    wanted = [max(1, n // 2) for n in lengths]
    matrix = layout.responses(packed, wanted)
    mask = response_mask(wanted)
    whole = layout.responses(packed + 1, wanted)
    assert (whole[~mask] == 0).all()
    for row, (n, response) in enumerate(zip(lengths, wanted, strict=True)):
        assert matrix[row, :response].tolist() == [100 * row + t for t in range(n - response, n)]
    assert (matrix[~mask] == 0).all()


def test_a_row_of_another_length_is_not_spread_over_a_sequence():
    with pytest.raises(ValueError, match="a row of 1 for a sequence of 3 tokens"):
        TokenLayout((3,)).pack([np.zeros(1)])


def test_zigzag_gives_each_rank_an_early_and_a_late_chunk():
    assert zigzag_positions(8, 2, 0).tolist() == [0, 1, 6, 7]
    assert zigzag_positions(8, 2, 1).tolist() == [2, 3, 4, 5]
    with pytest.raises(ValueError, match="does not divide into 4"):
        zigzag_positions(6, 2, 0)


def test_positions_restart_in_every_sequence():
    assert TokenLayout((3, 2)).positions.tolist() == [0, 1, 2, 0, 1]


def test_a_sample_refuses_values_and_routes_of_the_wrong_length():
    tokens = np.arange(5, dtype=np.int32)
    assert Sample(tokens, 2).response_length == 3
    with pytest.raises(ValueError, match="5 route rows for 4"):
        Sample(tokens, 2, routes=np.zeros((5, 1, 2), np.uint8))
    with pytest.raises(ValueError, match="trained has 2 rows for a response of 3"):
        Sample(tokens, 2, trained=np.ones(2, bool))
    with pytest.raises(ValueError, match="kept has 2 rows for a response of 3"):
        Sample(tokens, 2, kept=np.zeros((2, 1), np.int32))
    with pytest.raises(ValueError, match="a prompt and a response"):
        Sample(tokens, 5)


def test_the_loss_counts_the_tokens_that_are_trained_and_all_where_nothing_is_said():
    said = Sample(np.arange(5, dtype=np.int32), 2, trained=np.array([True, False, True]))
    assert trained_mask([said, Sample(np.arange(3, dtype=np.int32), 1)]).tolist() == [
        [True, False, True],
        [True, True, False],
    ]
