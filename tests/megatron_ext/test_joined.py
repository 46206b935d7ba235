"""What is joined on its way arrives as it was."""

from __future__ import annotations

import pickle
from dataclasses import fields

import numpy as np
import pytest

from megatron_ext.batch.layout import Sample
from megatron_ext.joined import JoinedRows, join, split
from megatron_ext.parts import TokenPart


def sent(value):
    """As Ray sends it: what arrives, and in how many pieces of memory."""
    pieces: list[pickle.PickleBuffer] = []
    packed = pickle.dumps(value, protocol=5, buffer_callback=pieces.append)
    return pickle.loads(packed, buffers=[piece.raw() for piece in pieces]), len(pieces)


def same(one, other):
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    return type(one) is type(other) and one == other


def samples(lengths, routes=np.uint8):
    rng = np.random.default_rng(0)
    for length in lengths:
        rows = rng.integers(0, 8, (length - 1, 4, 2)).astype(routes)
        yield Sample(rng.integers(0, 60, length).astype(np.int32), 2, row="own", routes=rows, trained=None)


@pytest.mark.parametrize("lengths", [[], [3], [3, 9, 5], [3] * 250], ids=len)
def test_samples_arrive_as_they_were_and_in_one_piece_a_field(lengths):
    given = list(samples(lengths))
    arrived, pieces = sent(JoinedRows(given))
    assert len(arrived.rows) == len(given)
    for before, after in zip(given, arrived.rows, strict=True):
        assert type(after) is Sample
        assert all(same(getattr(before, f.name), getattr(after, f.name)) for f in fields(Sample))
    assert pieces == (2 if lengths else 0)


def test_what_differs_in_kind_goes_as_it_is():
    given = [*samples([4, 5]), *samples([6], np.int16)]
    arrived, pieces = sent(JoinedRows(given))
    assert [row.routes.dtype for row in arrived.rows] == [np.uint8, np.uint8, np.int16]
    assert all(same(a.routes, b.routes) and same(a.tokens, b.tokens) for a, b in zip(given, arrived.rows, strict=True))
    assert pieces == 1 + 3


@pytest.mark.parametrize(
    "values",
    [
        [],
        [None, np.zeros(2)],
        [np.zeros(2), None],
        [np.zeros(2), np.zeros((2, 1))],
        [np.float32(1), np.float32(2)],
        [np.array(1), np.array(2)],
        ["on policy"] * 3,
        [np.zeros(1 << 16, np.uint8), np.zeros((1 << 16) + 1, np.uint8)],
    ],
    ids=["nothing", "first", "second", "axes", "numbers", "points", "words", "large"],
)
def test_only_small_arrays_of_one_kind_are_joined(values):
    assert isinstance(join(values), list)
    assert all(same(a, b) for a, b in zip(values, split(join(values)), strict=True))


def test_arrays_of_no_rows_keep_their_places():
    given = [np.zeros((0, 2)), np.ones((3, 2)), np.zeros((0, 2))]
    assert [part.shape for part in split(join(given))] == [(0, 2), (3, 2), (0, 2)]


def test_what_a_rank_says_of_tokens_arrives_as_it_was():
    numbers = {7: np.arange(3, dtype=np.float32), 2: np.arange(5, dtype=np.float32)}
    part = TokenPart((numbers, {}), {0: (4, 3, 1, 0)}, {7: ((1, 3), np.zeros((2, 2, 1), np.int16))})
    arrived, pieces = sent(part)
    assert list(arrived.quantities[0]) == [7, 2]
    assert all(same(numbers[i], arrived.quantities[0][i]) for i in numbers)
    assert (arrived.quantities[1], arrived.routing) == ({}, part.routing)
    assert same(arrived.routes[7][1], part.routes[7][1])
    assert pieces == 2
