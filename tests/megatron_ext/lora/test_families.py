"""Adapters on every family's projections, shared experts and latents among them, whole and divided."""

import functools
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megatron_ext.config import LoraConfig, ParallelConfig, TrainerConfig
from megatron_ext.hf.description import describe
from megatron_ext.lora.targets import LoraError, choose_targets, projection
from tests.megatron_ext.lora.test_layouts import close
from tests.support.jobs import make_samples
from tests.support.lora import learn
from tests.support.proofs import sampled
from tests.support.tiny_families import (
    DENSE_FAMILIES,
    FAMILIES,
    VOCAB,
    save_family,
    tiny_config,
    transformers_says,
)

LORA = LoraConfig(rank=4, alpha=8.0)
TRAINER = TrainerConfig(micro_batch_tokens=100, recompute="selective")
DIVIDED = {"ranks": 4, "tensor": 2, "sequence": True, "pipeline": 2}
SAMPLE = ("deepseek_v3", "gpt_oss")
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
LATENT = {"q_b_proj", "q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
PROJECTIONS = {
    "qwen2_moe": ATTENTION | MLP,
    "qwen3_moe with dense layers": ATTENTION | MLP,
    "mixtral": ATTENTION | {"w1", "w2", "w3"},
    "deepseek_v3": LATENT | MLP,
    "deepseek_v32": LATENT | MLP,
    "moonlight": LATENT - {"q_b_proj", "q_a_proj"} | {"q_proj"} | MLP,
    "glm4_moe": ATTENTION | MLP,
    "glm4_moe_lite": LATENT | MLP,
    "minimax_m2": ATTENTION | {"w1", "w2", "w3"},
    "gpt_oss": ATTENTION | {"gate_up_proj", "down_proj"},
    "qwen3_next": ATTENTION | MLP,
    "qwen3_5_moe": ATTENTION | MLP,
    **dict.fromkeys(DENSE_FAMILIES, ATTENTION | MLP),
}


DELTA_NETS = [family for family in FAMILIES if describe(tiny_config(family)).delta_layers]
ADAPTED = [*FAMILIES, *DENSE_FAMILIES]


@functools.cache
def of_one_rank(model: str):
    return learn(ParallelConfig(), model, LORA, TRAINER, make_samples(routes=False, vocab_size=VOCAB))


@pytest.mark.parametrize("family", sampled(ADAPTED, SAMPLE))
def test_divided_adapters_send_and_learn_what_whole_ones_do(tmp_path, family):
    model = save_family(family, tmp_path)
    one = of_one_rank(str(model))
    layout = DIVIDED | {"sequence": family in FAMILIES}  # the dense ones do without
    other = learn(ParallelConfig(**layout), model, LORA, TRAINER, make_samples(routes=False, vocab_size=VOCAB))
    close(other.adapters, one.adapters)
    close(other.sent, one.sent)
    assert other.loss == pytest.approx(one.loss, rel=1e-5)
    close(other.gradients, one.gradients)
    assert other.norm == pytest.approx(one.norm, rel=1e-5)
    assert all(abs(gradient).max() > 0 for gradient in one.gradients.values())


@pytest.mark.proof
@pytest.mark.parametrize(
    "layout",
    [
        {"ranks": 2},
        {"ranks": 2, "context": 2},
        {"ranks": 2, "expert": 2},
        {"ranks": 2, "tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 1},
    ],
    ids=lambda layout: ", ".join(layout),
)
def test_beside_frozen_delta_nets_every_layout_learns_what_one_rank_does(tmp_path, layout):
    model = save_family("qwen3_next", tmp_path)
    one = of_one_rank(str(model))
    other = learn(ParallelConfig(**layout), model, LORA, TRAINER, make_samples(routes=False, vocab_size=VOCAB))
    close(other.sent, one.sent)
    close(other.gradients, one.gradients)
    assert other.norm == pytest.approx(one.norm, rel=1e-5)


@pytest.mark.parametrize("target", sampled(["dense", "experts"], ["dense"]))
def test_a_pipeline_stage_may_have_no_adapters(tmp_path, target):
    """The first layer alone is dense; the stage of the others passes gradients on, and the other way round."""
    model = save_family("moonlight", tmp_path)
    lora, samples = LoraConfig(rank=4, targets=(target,)), make_samples(routes=False, vocab_size=VOCAB)
    trainer = TRAINER.model_copy(update={"recompute": "full"})
    one = learn(ParallelConfig(), model, lora, trainer, samples)
    stages = ParallelConfig(ranks=2, pipeline=2, first_stage_layers=1)
    other = learn(stages, model, lora, trainer, samples)
    close(other.gradients, one.gradients)
    assert other.norm == pytest.approx(one.norm, rel=1e-5)
    assert abs(other.after - one.after).max() < 1e-4
    assert len(one.gradients) == 2 * 2 * (1 if target == "dense" else 3)


@pytest.mark.parametrize("family", DELTA_NETS)
def test_gated_delta_nets_stay_frozen_beside_attention_with_adapters(tmp_path, family):
    """What is computed with adapters is what a model with the merged tensors computes: norms that multiply by 1 +
    weight and queries beside their gates included. Nothing of a delta net is sent as other than it came."""
    model = save_family(family, tmp_path / "base")
    found = of_one_rank(str(model))
    base = load_file(model / "model.safetensors")
    moved = {name for name in found.sent if not np.array_equal(found.sent[name], base[name])}
    assert {name for name in moved if "linear_attn" in name} == set()
    assert {projection(name) for name in moved} == PROJECTIONS[family]
    layers = describe(tiny_config(family)).delta_layers
    assert not any(f".layers.{layer}.self_attention" in key for key in found.adapters for layer in layers)
    merged = tmp_path / "merged"
    shutil.copytree(model, merged)
    save_file(found.sent, merged / "model.safetensors", metadata={"format": "pt"})
    says, _ = transformers_says(merged, make_samples(routes=False, vocab_size=VOCAB))
    assert np.abs(says - found.logprobs).max() < 1e-4


def test_there_are_families_of_both_kinds():
    assert len(DELTA_NETS) == 2
    assert len(ADAPTED) > 10


@pytest.mark.parametrize("family", ADAPTED)
def test_every_projection_of_a_family_is_known_by_its_name_and_no_other(family):
    model = describe(tiny_config(family))
    targets = choose_targets(model, LORA)
    assert {projection(t.row.hf[p]) for t in targets for p in t.parts} == PROJECTIONS[family]
    for name in PROJECTIONS[family]:
        only = choose_targets(model, LORA.model_copy(update={"targets": (name,)}))
        assert {projection(t.row.hf[p]) for t in only for p in t.parts} == {name}
    with pytest.raises(LoraError, match=rf"has no lm_head; there are all, attention, .*{min(PROJECTIONS[family])}"):
        choose_targets(model, LORA.model_copy(update={"targets": ("lm_head", "o_proj")}))


def test_a_group_is_one_kind_of_layers():
    model = describe(tiny_config("deepseek_v3"))
    rows = {
        group: {
            t.row.megatron.format(layer="L", expert="E") for t in choose_targets(model, LoraConfig(targets=(group,)))
        }
        for group in ("dense", "experts", "shared_experts")
    }
    assert rows == {
        "dense": {"decoder.layers.L.mlp.linear_fc1.weight", "decoder.layers.L.mlp.linear_fc2.weight"},
        "experts": {
            "decoder.layers.L.mlp.experts.linear_fc1.weightE",
            "decoder.layers.L.mlp.experts.linear_fc2.weightE",
        },
        "shared_experts": {
            "decoder.layers.L.mlp.shared_experts.linear_fc1.weight",
            "decoder.layers.L.mlp.shared_experts.linear_fc2.weight",
        },
    }
    with pytest.raises(LoraError, match="qwen3 has no experts; there are all, attention, dense, down_proj"):
        choose_targets(describe(tiny_config("qwen3")), LoraConfig(targets=("experts",)))
