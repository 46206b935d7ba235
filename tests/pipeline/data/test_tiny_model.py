import json

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import load_file

from pipeline.config.model import TinyModelConfig
from pipeline.data.tiny_model import make_tiny_model, parameter_count

MOE = TinyModelConfig(layers=2)
DENSE = TinyModelConfig(layers=2, experts=0)


def test_the_default_is_a_moe_of_at_most_a_million_parameters():
    config = TinyModelConfig()
    assert (config.layers, config.hidden, config.experts, config.topk) == (4, 64, 8, 2)
    assert 500_000 < parameter_count(config) <= 1_000_000


@pytest.mark.parametrize("config", [MOE, DENSE], ids=["moe", "dense"])
def test_transformers_loads_every_weight_and_misses_none(config, tmp_path):
    import torch
    from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM

    directory = make_tiny_model(tmp_path, config, seed=0)
    family = Qwen3MoeForCausalLM if config.experts else Qwen3ForCausalLM
    model, report = family.from_pretrained(str(directory), output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == parameter_count(config)
    written = load_file(directory / "model.safetensors")
    assert np.array_equal(model.lm_head.weight.detach().numpy(), written["lm_head.weight"])
    assert model.config.num_hidden_layers == 2
    if config.experts:
        assert (model.config.num_experts, model.config.num_experts_per_tok) == (8, 2)
        assert model.config.norm_topk_prob is True
        assert model.config.tie_word_embeddings is False
    assert model.generation_config.eos_token_id == 1
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_a_seed_decides_every_byte(tmp_path):
    first, again, other = (
        (make_tiny_model(tmp_path / str(n), MOE, seed) / "model.safetensors").read_bytes()
        for n, seed in enumerate((0, 0, 1))
    )
    assert first == again != other


def test_weights_have_the_configured_spread_and_norms_are_one(tmp_path):
    weights = load_file(make_tiny_model(tmp_path, TinyModelConfig(init_std=0.03), 0) / "model.safetensors")
    matrices = np.concatenate([w.ravel() for w in weights.values() if w.ndim == 2])
    assert matrices.std() == pytest.approx(0.03, rel=0.01)
    assert all((w == 1).all() for w in weights.values() if w.ndim == 1)
    assert {w.dtype for w in weights.values()} == {np.dtype(np.float32)}


def test_hf_config_is_what_is_written(tmp_path):
    assert json.loads((make_tiny_model(tmp_path, MOE, 0) / "config.json").read_text()) == MOE.hf_config()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"heads": 3}, "multiple of kv_heads"),
        ({"topk": 9}, "more than experts=8"),
        ({"head_dim": 15}, "must be even"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(wrong, sentence):
    with pytest.raises(ValidationError, match=sentence):
        TinyModelConfig(**wrong)
