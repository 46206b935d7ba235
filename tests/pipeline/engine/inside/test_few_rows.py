"""Products of a few rows, against float64; and how threads share them out."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from pipeline.engine.inside.cpu import few_rows, inlined, kernels
from pipeline.engine.inside.cpu.together import together
from tests.support.against_sglang import helpers_first

HIDDEN, INNER, EXPERTS = 512, 560, 3  # a row is no whole number of blocks, nor a matrix of what a thread takes


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    gate_up, down = torch.randn(EXPERTS, 2 * INNER, HIDDEN), torch.randn(EXPERTS, HIDDEN, INNER)
    return gate_up / HIDDEN**0.5, down / INNER**0.5


def of_experts(weights, x, rows, counts):
    starts = np.concatenate([[0], np.cumsum(counts)])
    return few_rows.experts(x, rows, *weights, starts, few_rows.most_rows(*weights))


def in_float64(weights, x, rows, counts):
    found, start = [], 0
    for gate_up, down, count in zip(*weights, counts, strict=True):
        gate, up = (x[torch.from_numpy(rows[start : start + count])].double() @ gate_up.double().t()).chunk(2, 1)
        found.append((torch.nn.functional.silu(gate) * up) @ down.double().t())
        start += count
    return torch.cat(found)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [*range(1, 15), 23, 24, 25, few_rows.MOST_ROWS])
def test_products_of_a_few_rows(weights, monkeypatch, threads, count):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    counts = [count, 0, max(1, few_rows.MOST_ROWS - count)]
    rows = np.random.default_rng(count).integers(0, 60, sum(counts))
    x = torch.randn(60, HIDDEN)
    found, expected = of_experts(weights, x, rows, counts), in_float64(weights, x, rows, counts)
    assert (found - expected).abs().max() < 1e-5


def products_of_a_helper():
    """Again and again, by a thread that has begun before the one that waits for all."""
    weights = torch.randn(EXPERTS, 2 * INNER, HIDDEN) / HIDDEN**0.5, torch.randn(EXPERTS, HIDDEN, INNER) / INNER**0.5
    x, rows = torch.randn(40, HIDDEN), np.arange(40)
    expected = in_float64(weights, x, rows, [13, 20, 7])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 2)
        taken = helpers_first(patch, few_rows, lambda work: work.args[-1][0, 0])
        for _ in range(20):
            assert (of_experts(weights, x, rows, [13, 20, 7]) - expected).abs().max() < 1e-5
        assert len(taken) == 20
        assert min(taken) > 0


def test_threads_do_not_use_each_others_memory():
    """Where they have it from one heap, as those of a process with many threads have."""
    program = f"from {__name__} import products_of_a_helper; products_of_a_helper()"
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_nobody_waits_for_a_thread_that_failed(weights, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    ended, original = threading.Event(), few_rows.together

    def fails(work):
        def broken(leads):
            if leads:
                raise MemoryError
            work(False)
            ended.set()

        original(broken)

    monkeypatch.setattr(few_rows, "together", fails)
    with pytest.raises(MemoryError):
        of_experts(weights, torch.randn(9, HIDDEN), np.arange(9), [3, 3, 3])
    assert ended.wait(30)


def test_an_expert_of_too_many_rows_is_left_to_others(weights):
    counts = [few_rows.MOST_ROWS + 1, 2, 0]
    rows, x = np.arange(sum(counts)), torch.randn(60, HIDDEN)
    found, expected = of_experts(weights, x, rows, counts), in_float64(weights, x, rows, counts)
    assert (found - expected)[counts[0] :].abs().max() < 1e-5


def test_a_row_becomes_the_same_whatever_is_beside_it(weights):
    x = torch.randn(40, HIDDEN)
    many = of_experts(weights, x, np.arange(40), [40, 0, 0])
    for count in (1, 2, 13, 24, 39):
        assert torch.equal(of_experts(weights, x, np.arange(count), [count, 0, 0]), many[:count])


def test_what_is_not_finite_stays_so_and_with_its_row(weights):
    x = torch.randn(20, HIDDEN)
    x[3, 7], x[11, 500] = torch.nan, torch.inf
    finite = of_experts(weights, x, np.arange(20), [9, 11, 0]).isfinite().all(1)
    assert finite.logical_not().nonzero().flatten().tolist() == [3, 11]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("counts", [[few_rows.MOST_ROWS + 1, 0, 3], [0, 97, 144], [4 * few_rows.MOST_ROWS, 1, 0]])
def test_small_matrices_are_read_again_for_more_rows(monkeypatch, threads, counts):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    small = torch.randn(3, 96, 64) / 8, torch.randn(3, 64, 48) / 7
    assert few_rows.most_rows(*small) == 4 * few_rows.MOST_ROWS
    rows, x = np.random.default_rng(0).integers(0, 60, sum(counts)), torch.randn(60, 64)
    assert (of_experts(small, x, rows, counts) - in_float64(small, x, rows, counts)).abs().max() < 1e-5


def test_small_matrices_too_are_left_to_others_for_too_many_rows():
    small = torch.randn(3, 96, 64) / 8, torch.randn(3, 64, 48) / 7
    counts = [60, few_rows.most_rows(*small) + 1, 7]
    rows, x = np.random.default_rng(0).integers(0, 60, sum(counts)), torch.randn(60, 64)
    off = (of_experts(small, x, rows, counts) - in_float64(small, x, rows, counts)).abs()
    assert max(off[:60].max(), off[-7:].max()) < 1e-5
    spans, of = few_rows._spans(np.concatenate([[0], np.cumsum(counts)]), few_rows.most_rows(*small))
    assert np.diff(spans).tolist() == [48, 12, counts[1], 7]  # one of too many rows is passed by
    assert of.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    "weight",
    [
        torch.empty(2, 1024, 520),
        torch.empty(2, 1032, 512),
        torch.empty(2, 1024, 512, dtype=torch.bfloat16),
        torch.empty(2, 512, 1024).transpose(1, 2),
    ],
)
def test_other_matrices_are_left_to_the_library(weight):
    large = torch.empty(2, 1024, 512)
    assert few_rows.most_rows(large, large) == few_rows.most_rows(large, torch.empty(2, 16, 512)) == few_rows.MOST_ROWS
    assert few_rows.most_rows(large, weight) == few_rows.most_rows(weight, large) == 0


def test_every_thread_takes_part_and_nobody_waits_for_one_that_comes_late(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    came, go = threading.Barrier(3, timeout=30), threading.Event()
    together(lambda leads: came.wait() and None)  # it would break without the other two
    late: list[bool] = []

    def work(leads):
        if not leads:
            go.wait(30)
            late.append(leads)

    together(work)
    assert late == []
    go.set()
    together(lambda leads: came.wait() and None)
    assert late == [False, False]


def test_the_exponential_function():
    t = np.concatenate([np.linspace(-87, 88, 100_001), np.linspace(-1, 1, 10_001)]).astype(np.float32)
    found = np.array([inlined.exp(value) for value in t], np.float64)
    assert np.abs(found / np.exp(t.astype(np.float64)) - 1).max() < 1.2e-7
    assert np.isnan(inlined.exp(np.float32(np.nan)))
    assert inlined.exp(np.float32(-np.inf)) < 2e-38
    assert inlined.exp(np.float32(1e30)) > 1e38


def test_rows_are_stored_where_they_belong():
    rows, places = np.random.default_rng(0).standard_normal((5, 3, 8)).astype(np.float32), np.array([4, 0, 9, 2, 7])
    cache = np.zeros((10, 3, 4), np.float32)
    kernels.store_rows(rows[:, :, ::2], cache, places)
    assert (cache[places] == rows[:, :, ::2]).all()
    assert (np.delete(cache, places, 0) == 0).all()
