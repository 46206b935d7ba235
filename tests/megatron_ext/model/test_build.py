"""What docs/models.md says of the configs that Megatron-Core gets, and of what it does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig, TrainerPrecision
from megatron_ext.hf.description import describe
from tests.support.jobs import make_samples, weighted_likelihood
from tests.support.ranks import run_alone, run_ranks
from tests.support.tiny_families import VOCAB, save_family, tiny_config


def built() -> dict[str, Any]:
    """Runs in a process of its own: what is asked below, of configs as they are here and as on a GPU."""
    from megatron_ext import cpu
    from megatron_ext.model.build import transformer_config

    def config(name: str, parallel: ParallelConfig | None = None, **fields):
        model, trainer = describe(tiny_config(name) | fields), TrainerConfig(extra={"moe_permute_fusion": False})
        return transformer_config(model, parallel or ParallelConfig(), trainer, TrainerPrecision(), replay=False)

    divided = ParallelConfig(ranks=2, tensor=2, sequence=True, expert_tensor=2)
    found: dict[str, Any] = {"latent epsilon": config("moonlight", rms_norm_eps=1e-5).layernorm_epsilon}
    config("gpt_oss", divided)
    cpu.torch_layers = lambda: False  # as where Transformer Engine is
    sinks = config("gpt_oss")
    found["split sinks"], found["fused rotation"] = sinks.cp_comm_type, sinks.apply_rope_fusion
    try:
        config("gpt_oss", divided)
    except ValueError as error:
        found["divided experts"] = str(error)
    return found


def test_configs_are_what_the_page_of_models_says():
    (found,) = run_alone(built)
    refused = found.pop("divided experts")
    assert refused.endswith("would add their output bias on every expert-tensor rank; set parallel.expert_tensor=1")
    assert found == {"latent epsilon": 1e-5, "split sinks": "a2a", "fused rotation": False}


def updated(config: ParallelConfig, model: str, samples, rate: float) -> dict[str, np.ndarray]:
    """The routing biases after an update."""
    from megatron_ext.trainer import Trainer

    trainer = TrainerConfig(extra={"moe_router_bias_update_rate": rate})
    it = Trainer(model, config, trainer, OptimizerConfig(lr=1e-3), replay=False)
    it.update(samples, weighted_likelihood)
    tensors = ((name, tensor.numpy().copy()) for bucket in it.export() for name, tensor in bucket)
    return {name: tensor for name, tensor in tensors if name.endswith("e_score_correction_bias")}


def test_a_rate_of_its_own_lets_the_routing_bias_move_by_the_load_and_none_keeps_it(tmp_path: Path):
    model = save_family("deepseek_v3", tmp_path)
    before = load_file(model / "model.safetensors")
    samples = make_samples(routes=False, vocab_size=VOCAB)
    for rate in (0.0, 1e-3):
        (after,) = run_ranks(updated, ParallelConfig(), str(model), samples, rate)
        assert len(after) == 3
        for name, bias in after.items():
            assert np.abs(np.abs(bias - before[name])).max() <= rate * 1.01 + 1e-9, name
            assert (np.abs(bias - before[name]).max() > 0) == (rate > 0), name
