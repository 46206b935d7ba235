"""Each way in which replay can go wrong, put in on purpose: the checks of test_replay_layouts must see it."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from tests.megatron_ext.batch.test_replay_layouts import name_of, reference
from tests.support.ranks import run_ranks
from tests.support.route_codes import Seen, complaints, loss, make_samples, reading


def no_fault(_trainer, samples):
    return samples


def routes_shifted_by_one(_trainer, samples):
    return [replace(s, routes=np.roll(s.routes, 1, 0)) for s in samples]


def layers_swapped(_trainer, samples):
    return [replace(s, routes=s.routes[:, [1, 0, 2, 3]].copy()) for s in samples]


def routes_of_another_sample(_trainer, samples):
    """Of one with as many tokens or more, so that no shape tells."""
    longest = max(samples, key=lambda s: s.input_length)
    return [replace(s, routes=longest.routes[: s.input_length].copy()) for s in samples]


def duplicated_expert(_trainer, samples):
    return [replace(s, routes=np.repeat(s.routes[..., :1], 3, -1)) for s in samples]


def stale_queue(trainer, samples):
    """A forward-only pass queues routes for a backward that never comes, and nothing clears them."""
    from megatron_ext.batch.replay import ChunkReplay

    original, clear = ChunkReplay.set, ChunkReplay.clear
    ChunkReplay.set = lambda self, routes, counted, *, recompute: original(self, routes, counted, recompute=True)
    ChunkReplay.clear = lambda self: None
    with pytest.raises(RuntimeError, match="not consumed"):
        trainer.logprobs(samples)
    ChunkReplay.set, ChunkReplay.clear = original, clear
    return samples


def backward_replays_the_last_forward(_trainer, samples):
    """The hook that switches to the queue is missing: recomputed forwards see the last micro-batch's routes."""
    from megatron_ext.batch.replay import ChunkReplay

    ChunkReplay.switch_in_backward = lambda self, output: None
    return samples


def contiguous_context_slices(_trainer, samples):
    """Routes cut for context parallelism as if its chunks were not zigzag."""
    from megatron_ext.batch.layout import TokenLayout

    def slice_sequence(self, packed):
        return packed.chunk(self.cp_size)[self.cp_rank].chunk(self.sequence_parallel_size)[self.sequence_parallel_rank]

    TokenLayout.slice_sequence = slice_sequence
    return samples


def every_sequence_rank_gets_the_first_slice(_trainer, samples):
    from megatron_ext.batch.layout import TokenLayout

    original = TokenLayout.slice_sequence
    TokenLayout.slice_sequence = lambda self, packed: original(replace(self, sequence_parallel_rank=0), packed)
    return samples


def chunks_in_the_wrong_order(trainer, samples):
    trainer.policy.replays.reverse()
    return samples


def one_update(config: ParallelConfig, path: str, recompute: str, fault) -> tuple[Seen, str]:
    """Runs on a rank of its own: what its routers took, and the error that the trainer raised, if any."""
    from megatron_ext.trainer import Trainer

    settings = TrainerConfig(micro_batch_tokens=30, recompute=recompute)
    trainer = Trainer(path, config, settings, OptimizerConfig(lr=1e-9), replay=True)
    samples = fault(trainer, make_samples())
    error = ""
    with reading() as seen:
        try:
            trainer.update(samples, loss)
        except (RuntimeError, ValueError) as raised:
            error = str(raised)
    return seen, error


CONTEXT, SEQUENCE = {"ranks": 2, "context": 2}, {"ranks": 2, "tensor": 2, "sequence": True}
CHUNKS = {"ranks": 2, "pipeline": 2, "virtual_pipeline": 2}
FAULTS = [
    (routes_shifted_by_one, {}, "none", "is another"),
    (layers_swapped, {}, "none", "took the route"),
    (routes_of_another_sample, {}, "none", "was routed"),
    (backward_replays_the_last_forward, {}, "full", "not consumed"),
    (stale_queue, {}, "full", "not consumed|routes of shape|is another|was routed"),
    (duplicated_expert, {}, "none", "names expert .* twice for one token"),
    (contiguous_context_slices, CONTEXT, "none", "is another"),
    (every_sequence_rank_gets_the_first_slice, SEQUENCE, "none", "was routed"),
    (chunks_in_the_wrong_order, CHUNKS, "none", "routed natively|took the route"),
]


@pytest.mark.parametrize("layout", [{}, CONTEXT, SEQUENCE, CHUNKS], ids=name_of)
def test_without_a_fault_there_is_no_complaint(coded_model_dir, layout):
    model = str(coded_model_dir)
    answers = run_ranks(one_update, ParallelConfig(**layout), model, "full", no_fault)
    assert [error for _, error in answers] == [""] * len(answers)
    assert complaints([seen for seen, _ in answers], reference(model).seen, 2) == []


@pytest.mark.parametrize(("fault", "layout", "recompute", "message"), FAULTS, ids=[f.__name__ for f, *_ in FAULTS])
def test_a_fault_is_seen(coded_model_dir, fault, layout, recompute, message):
    model = str(coded_model_dir)
    answers = run_ranks(one_update, ParallelConfig(**layout), model, recompute, fault)
    found = complaints([seen for seen, _ in answers], reference(model).seen, 1 if recompute == "none" else 2)
    found += [error for _, error in answers if error]
    assert any(re.search(message, complaint) for complaint in found), found[:5]
