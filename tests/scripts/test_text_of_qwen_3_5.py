"""The text model out of a published Qwen3.5-MoE computes what it computed there."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.hf.companions import Carried
from scripts.text_of_qwen_3_5 import text_config, write
from tests.support.tiny_families import save_family, tiny_config

PICTURES = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}


@pytest.fixture
def published(tmp_path):
    """A tiny random model as published: packed experts, decays in float32, a draft layer's tensor beside the others."""
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    config = Qwen3_5MoeConfig(text_config=tiny_config("qwen3_5_moe"), vision_config=PICTURES, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = Qwen3_5MoeForConditionalGeneration(config).float().eval()
    weights = {"mtp.norm.weight": torch.ones(3)}
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            weights[name] = tensor.clone() if name.endswith("A_log") else tensor.bfloat16()
            tensor.copy_(weights[name])
    folder = tmp_path / "published"
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors")
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (folder / name).write_text("{}")
    assert "model.language_model.layers.0.mlp.experts.gate_up_proj" in weights
    return folder, model


def test_the_text_model_says_the_same_alone_and_its_tensors_have_the_names_that_are_read_here(published, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, both = published
    out = tmp_path / "text"
    write(folder, out)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        alone = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()(ids).logits
        assert torch.equal(alone, both(input_ids=ids).logits)
    written = load_file(out / "model.safetensors")
    known = load_file(save_family("qwen3_5_moe", tmp_path / "known") / "model.safetensors")
    assert written.keys() == known.keys() | {"mtp.norm.weight"}
    assert {n: tuple(t.shape) for n, t in known.items()} == {n: tuple(written[n].shape) for n in known}
    floats = {name for name, tensor in written.items() if tensor.dtype == torch.float32}
    assert floats == {"mtp.norm.weight", *(f"model.layers.{i}.linear_attn.A_log" for i in range(3))}
    assert Carried(out).names == ["mtp.norm.weight"]
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}


def test_another_model_is_named():
    with pytest.raises(ValueError, match="model_type 'qwen3_5_moe_text'; give a published directory"):
        text_config(tiny_config("qwen3_5_moe"))
