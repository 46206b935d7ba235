"""The formulas of `sameroute plan` against models that Megatron-Core built."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from megatron_ext.batch.layout import Sample
from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig, TrainerPrecision
from megatron_ext.hf.description import describe
from pipeline.plan import memory
from pipeline.plan.counts import parameters
from tests.support.measured import configs, kept_bytes, states
from tests.support.proofs import sampled
from tests.support.ranks import run_ranks

LAYOUTS = {
    "one rank": {},
    "tensor 2": {"ranks": 2, "tensor": 2, "sequence": True},
    "pipeline 2, one layer first": {"ranks": 2, "pipeline": 2, "first_stage_layers": 1},
    "pipeline 2, two chunks each": {"ranks": 2, "pipeline": 2, "virtual_pipeline": 2},
    "data 2, expert 2": {"ranks": 2, "expert": 2},
    "tensor 2, pipeline 2, expert 2": {
        "ranks": 4, "tensor": 2, "sequence": True, "pipeline": 2, "expert": 2, "expert_tensor": 1,
    },
}  # fmt: skip
SAMPLE = ("one rank", "pipeline 2, one layer first", "pipeline 2, two chunks each", "tensor 2, pipeline 2, expert 2")
SAMPLES, LENGTH = 8, 32
BUCKET = 4 * 128 * 8
"""Bytes of padding: Megatron-Core aligns parameters to 64 elements, and the few buckets here to 128 a rank."""


def models(layout: str) -> dict:
    """Megatron-Core builds no dense model with expert parallelism."""
    expert = LAYOUTS[layout].get("expert", 1) > 1
    return {name: hf for name, hf in configs().items() if not (expert and describe(hf).num_experts == 0)}


@functools.cache
def measured(layout: str, dtype: str):
    """[(name, config.json, states of every rank)]"""
    parallel, chosen = ParallelConfig(**LAYOUTS[layout]), models(layout)
    ranks = run_ranks(states, parallel, TrainerPrecision(weights=dtype), list(chosen.values()))
    return [(name, hf, [rank[i] for rank in ranks]) for i, (name, hf) in enumerate(chosen.items())]


@pytest.mark.parametrize("layout", sampled(LAYOUTS, SAMPLE))
def test_parameters_of_every_rank_are_megatron_cores_to_the_digit(layout):
    parallel = ParallelConfig(**LAYOUTS[layout])
    for name, hf, ranks in measured(layout, "bfloat16"):
        for rank in ranks:
            count = parameters.rank_count(describe(hf), parallel, rank.stage)
            assert (count.dense, count.expert, count.buffers) == (rank.dense, rank.expert, rank.buffers), name
            critic = parameters.rank_count(describe(hf), parallel, rank.stage, value_head=True)
            assert critic.parameters == rank.critic, name


def test_the_whole_model_is_what_one_rank_holds():
    for name, hf, (rank,) in measured("one rank", "bfloat16"):
        assert parameters.total(describe(hf)) == rank.dense + rank.expert, name


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        *(pytest.param(x, "bfloat16", marks=() if x in SAMPLE else pytest.mark.proof) for x in LAYOUTS),
        ("one rank", "float32"),
    ],
)
def test_bytes_of_weights_gradients_and_optimizer_are_those_of_the_tensors(layout, dtype):
    parallel, precision = ParallelConfig(**LAYOUTS[layout]), TrainerPrecision(weights=dtype)
    for name, hf, ranks in measured(layout, dtype):
        planned = [
            memory.states(parameters.rank_count(describe(hf), parallel, r.stage), parallel, precision) for r in ranks
        ]
        for rank, (weights, gradients, optimizer) in zip(ranks, planned, strict=True):
            assert (rank.weights, rank.gradients) == (weights, gradients), name
            assert 0 <= rank.padded - rank.gradients <= BUCKET, name
            # a rank owns a piece of each bucket, whose padding lies in the last rank's
            assert abs(rank.optimizer - optimizer) <= 3 * BUCKET, name
        # all ranks together own every parameter once
        assert sum(r.optimizer for r in ranks) == pytest.approx(sum(p[2] for p in planned), rel=1e-12), name


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_what_forward_keeps_for_backward_is_the_formulas_within_five_percent(recompute):
    """Without Transformer Engine's fused kernels; the rest is positions, scales of norms and indices of tokens."""
    chosen, parallel = configs(), ParallelConfig()
    trainer, random = (
        TrainerConfig(recompute=recompute, extra={"bias_activation_fusion": False}),
        np.random.default_rng(0),
    )
    lengths = [LENGTH - i % 2 for i in range(SAMPLES)]  # of one length the kernel's inputs would be no copies
    samples = [Sample(random.integers(0, 509, n + 1).astype(np.int32), 1, {}, None) for n in lengths]
    (found,) = run_ranks(kept_bytes, parallel, trainer, list(chosen.values()), samples)
    for (name, hf), kept in zip(chosen.items(), found, strict=True):
        planned, _ = memory.kept(describe(hf), parallel, trainer, TrainerPrecision(), sum(lengths), fused=False)
        assert planned <= kept <= 1.05 * planned, name


def offload_without_a_gpu() -> None:
    """From now on bfloat16 tensors pass for a GPU's, so that Megatron-Core moves what it would move."""
    import sys

    import torch

    def asked_by():
        return sys._getframe(2).f_globals["__name__"]

    torch.Tensor.is_cuda = property(lambda t: asked_by().endswith("hybrid_optimizer") and t.dtype == torch.bfloat16)
    torch.Tensor.pin_memory = lambda tensor: tensor


def three_steps(config: ParallelConfig, hf, samples, offload: bool):
    """Gradient norms, and the weights after them; so large an eps keeps rounding small."""
    import torch

    from megatron_ext.hf.export import HFExporter
    from megatron_ext.network import Network

    if offload:
        offload_without_a_gpu()
    torch.manual_seed(0)
    model = describe(hf)
    trainer, precision = TrainerConfig(offload_optimizer=offload), TrainerPrecision(weights="bfloat16")
    network = Network(model, config, trainer, precision, replay=False)
    network.restart_optimizer(OptimizerConfig(lr=0.1, eps=1.0, weight_decay=0.1))
    norms = [network.step(samples, lambda batch, q: (q[0].square().sum() / 100, {}), "native")[0] for _ in range(3)]
    exporter = HFExporter(network.chunks, model)
    weights = {name: tensor.float().numpy().copy() for bucket in exporter.stream() for name, tensor in bucket}
    inner = getattr(network.optimizer, "chained_optimizers", [network.optimizer])
    on_gpu = sum(bool(getattr(one.optimizer, "gpu_optimizer", True)) for one in inner)
    return norms, weights, on_gpu


def test_an_offloaded_optimizer_takes_the_same_steps_and_leaves_nothing_on_the_gpu():
    hf, config = configs()["qwen3_moe"], ParallelConfig(ranks=2, expert=2)
    random = np.random.default_rng(0)
    samples = [Sample(random.integers(0, 509, LENGTH + 1).astype(np.int32), 1, {}, None) for _ in range(SAMPLES)]
    (norms, weights, _), _ = run_ranks(three_steps, config, hf, samples, False)
    (offloaded, moved, on_gpu), _ = run_ranks(three_steps, config, hf, samples, True)
    assert on_gpu == 0
    assert offloaded == pytest.approx(norms, rel=1e-2)
    assert norms[2] != pytest.approx(norms[0], rel=0.03)  # the weights did move
    for name, weight in weights.items():
        # bfloat16 after float32 arithmetic in another order
        assert np.abs(moved[name] - weight).max() <= 2**-7 * np.abs(weight).max(), name
