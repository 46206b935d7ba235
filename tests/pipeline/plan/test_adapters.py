"""What a plan says of adapters, against models that Megatron-Core built."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ext.config import LoraConfig, OptimizerConfig, ParallelConfig, TrainerConfig, TrainerPrecision
from megatron_ext.hf.description import describe
from pipeline.config import load_config_and_model
from pipeline.plan import memory
from pipeline.plan.counts import flops, parameters
from pipeline.plan.counts.adapters import trained_count
from pipeline.plan.plan import make_plan
from tests.pipeline.plan.test_against_models import BUCKET, LAYOUTS, models
from tests.support.measured import configs
from tests.support.proofs import sampled
from tests.support.ranks import run_ranks

LORA = LoraConfig(rank=4, alpha=8.0, router="trained")
BF16 = TrainerPrecision(weights="bfloat16")


def held(parallel: ParallelConfig, models: list[dict]) -> list[tuple]:
    """Runs on a rank: stage, trained parameters (dense, expert), bytes of weights, gradients, optimizer; whether a
    frozen one has a gradient or a state."""
    import torch

    from megatron_ext.mcore import parallel_state
    from megatron_ext.network import Network

    out = []
    for hf in models:
        network = Network(describe(hf), parallel, TrainerConfig(), BF16, lora=LORA)
        network.restart_optimizer(OptimizerConfig())
        network.optimizer.step()
        every = [p for chunk in network.chunks for p in chunk.parameters()]
        trained = [p for p in every if p.requires_grad]
        own = {p.untyped_storage().data_ptr() for p in every}
        optimizer = sum(t.nbytes for t in network.optimizer_tensors if t.untyped_storage().data_ptr() not in own)
        frozen = [p for p in every if not p.requires_grad]
        out.append(
            (
                parallel_state.get_pipeline_model_parallel_rank(),
                sum(p.numel() for p in trained if getattr(p, "allreduce", True)),
                sum(p.numel() for p in trained if not getattr(p, "allreduce", True)),
                sum(p.nbytes for p in every),
                sum(b.nbytes for b in network.gradient_buffers),
                optimizer,
                any(p.grad is not None or hasattr(p, "main_grad") for p in frozen) or not torch.is_grad_enabled(),
            )
        )
    return out


@pytest.mark.parametrize("layout", sampled(LAYOUTS, ["tensor 2, pipeline 2, expert 2"]))
def test_trained_parameters_and_bytes_of_every_rank_are_those_of_the_tensors(layout):
    parallel, chosen = ParallelConfig(**LAYOUTS[layout]), models(layout)
    ranks = run_ranks(held, parallel, list(chosen.values()))
    for i, (name, hf) in enumerate(chosen.items()):
        model = describe(hf)
        for stage, dense, expert, weights, gradients, optimizer, touched in (rank[i] for rank in ranks):
            count = trained_count(model, parallel, LORA, stage)
            assert (count.dense, count.expert) == (dense, expert), name
            planned = memory.rank_memory(model, parallel, TrainerConfig(), BF16, 64, stage=stage, lora=LORA)
            buffers = 4 * parameters.rank_count(model, parallel, stage).buffers
            assert planned.weights - buffers == weights, name
            assert 0 <= gradients - planned.gradients <= BUCKET, name
            assert abs(planned.optimizer - optimizer) <= 3 * BUCKET, name
            assert not touched, name


def test_a_reference_and_a_critic_cost_no_more_than_their_adapters():
    model, one = describe(configs()["qwen3_moe"]), ParallelConfig.model_validate({})
    settings = {"stage": 0, "lora": LORA, "reference": True, "critic": True}
    others = memory.rank_memory(model, one, TrainerConfig(), BF16, 64, **settings).others
    count = trained_count(model, one, LORA).parameters
    assert others == 2 * count + (2 + 4 + 12) * (count + model.hidden)


def test_backward_has_no_gradients_of_frozen_weights():
    model = describe(configs()["qwen3_moe"])
    whole = flops.training(model, 1000, 0)
    frozen = flops.training(model, 1000, 0, lora=LORA)
    adapters = 6.0 * flops.met(model, LORA) * 1000
    assert frozen - adapters == pytest.approx(whole * 2 / 3)


def test_a_30b_model_with_adapters_fits_one_node_without_the_machines_memory():
    plans = {}
    for name in ("1-node", "1-node-lora"):
        config, model = load_config_and_model(Path(f"configs/qwen3-30b-a3b/{name}.yaml"))
        plans[name] = make_plan(config, model, "h100", quick=True)
    whole, adapters = plans["1-node"], plans["1-node-lora"]
    assert adapters.reasons == ()
    assert (whole.memory.host > 50 * 2**30, adapters.memory.host) == (True, 0.0)
    assert adapters.memory.total < 0.65 * whole.memory.total
    assert adapters.trained < 0.06 * adapters.total
