"""What is patched in Megatron-Core does not change what it computes, and is not there where it would."""

from __future__ import annotations

import numpy as np

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from tests.support.jobs import make_samples, weighted_likelihood
from tests.support.ranks import run_ranks


def one_update(config: ParallelConfig, model: str, samples):
    """Collectives of an update, by name, and the weights after it."""
    from torch.profiler import ProfilerActivity, profile

    from megatron_ext.trainer import Trainer

    it = Trainer(model, config, TrainerConfig(), OptimizerConfig(lr=1.0, eps=1.0), replay=False)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        it.update(samples, weighted_likelihood)
    weights = {name: tensor.numpy().copy() for bucket in it.export() for name, tensor in bucket}
    return sorted({e.key for e in seen.key_averages() if "scatter_" in e.key or "gather_" in e.key}), weights


def test_a_rank_alone_reduces_and_gathers_no_buffer_and_two_ranks_do(tiny_dense_model_dir):
    samples = make_samples(routes=False)
    ((none, alone),) = run_ranks(one_update, ParallelConfig(), str(tiny_dense_model_dir), samples)
    (some, together), _ = run_ranks(one_update, ParallelConfig(ranks=2), str(tiny_dense_model_dir), samples)
    buffers = {"c10d::_allgather_base_", "c10d::allgather_into_tensor_coalesced_", "c10d::_reduce_scatter_base_"}
    buffers |= {"c10d::reduce_scatter_tensor_coalesced_"}
    assert not buffers & set(none), none
    assert len(buffers & set(some)) >= 2, some
    assert alone.keys() == together.keys()
    assert max(np.abs(alone[name] - together[name]).max() for name in alone) < 1e-6
