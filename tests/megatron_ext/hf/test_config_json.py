"""A config.json that cannot be read, lacks a field or says one twice is a sentence with the file and the field."""

import json

import pytest

from megatron_ext.hf.description import UnsupportedModel, describe, read_description
from pipeline.config import ConfigError, load_config
from pipeline.config.model import TinyModelConfig
from tests.support.tiny_families import tiny_config

MOE = TinyModelConfig().hf_config()
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


def without(hf, *names):
    return {key: value for key, value in hf.items() if key not in names}


@pytest.mark.parametrize(
    ("hf", "sentence"),
    [
        (without(MOE, "num_key_value_heads"), r"num_key_value_heads is missing \(transformers would take its class's"),
        (MOE | {"num_key_value_heads": None}, r"num_key_value_heads is null \(.* would take num_attention_heads=4\)"),
        (without(MOE, "num_experts_per_tok"), "num_experts_per_tok is missing"),
        (MOE | {"num_experts_per_tok": None}, "num_experts_per_tok is null"),
        (without(MOE, "vocab_size", "hidden_size"), "hidden_size is missing .*; vocab_size is missing"),
        (MOE | {"hidden_size": "64"}, "hidden_size must be a whole number of at least 1, not '64'"),
        (MOE | {"num_hidden_layers": 0}, "num_hidden_layers must be a whole number"),
        (MOE | {"num_attention_heads": 4.0}, "num_attention_heads must be a whole number"),
        (MOE | {"intermediate_size": True}, "intermediate_size must be a whole number"),
        (without(MOE, "moe_intermediate_size"), "moe_intermediate_size is missing"),
        *[
            (without(tiny_config(family), name), f"{name} is missing .transformers would take")
            for family, names in {
                "deepseek_v3": ["kv_lora_rank", "q_lora_rank", "n_group", "n_shared_experts", "first_k_dense_replace"],
                "glm4_moe": ["routed_scaling_factor", "n_shared_experts", "moe_intermediate_size"],
            }.items()
            for name in names
        ],
        (MOE | {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "are both there and differ .* take rope_scaling"),
        (
            MOE | {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "default"}},
            "are both there and differ",
        ),
        (MOE | {"rope_theta": 1e6}, "rope_theta is 1000000.0, and 10000.0 in rope_parameters; leave one out"),
        (
            tiny_config("glm4_moe") | {"partial_rotary_factor": 0.25},
            "partial_rotary_factor is 0.25, and 0.5 in rope_parameters; leave one out",
        ),
        (MOE | {"max_position_embeddings": None}, "max_position_embeddings is null"),
        (MOE | {"rope_scaling": "yarn"}, "rope_scaling must be an object, not 'yarn'"),
        (MOE | {"rope_parameters": [1]}, r"rope_parameters must be an object, not \[1\]"),
        (MOE | {"quantization_config": []}, r"quantization_config must be an object, not \[\]"),
        (MOE | {"vocab_size": "64"}, "vocab_size must be a whole number of at least 1, not '64'"),
        (MOE | {"hidden_size": 0, "num_hidden_layers": -1}, "hidden_size .* not 0; num_hidden_layers .* not -1"),
        (MOE | {"num_experts": "8"}, "num_experts must be a whole number of at least 1, not '8'"),
        (MOE | {"num_experts": 0}, "num_experts must be a whole number of at least 1, not 0"),
        (without(MOE, "num_experts"), r"the number of experts \(num_experts or num_local_experts\) is missing"),
        (
            without(tiny_config("qwen2_moe"), "num_experts") | {"num_local_experts": 8},
            r"the number of experts \(num_experts\) is missing",
        ),
        (MOE | {"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than num_experts=8"),
        (MOE | {"num_local_experts": 4}, "num_experts=8 and num_local_experts=4 differ"),
        (MOE | {"moe_intermediate_size": 1.5}, "moe_intermediate_size must be a whole number"),
        (MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step must be a whole number of at least 1, not 0"),
        (MOE | {"mlp_only_layers": 2}, "mlp_only_layers must be a list, not 2"),
        (MOE | {"mlp_only_layers": ["2"]}, "mlp_only_layers must hold numbers of layers, not '2'"),
        (MOE | {"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, not 'false'"),
        (MOE | {"norm_topk_prob": 1}, "norm_topk_prob must be true or false, not 1"),
        (MOE | {"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number above 0, not '1e-6'"),
        (without(MOE, "rms_norm_eps"), "rms_norm_eps is missing"),
        (MOE | {"rope_parameters": {"rope_theta": "1e6"}}, "rope_parameters.rope_theta must be a number above 0"),
        (without(MOE, "head_dim") | {"hidden_size": 66}, "head_dim is missing, and hidden_size=66 does not divide by"),
        (MOE | {"num_key_value_heads": 3}, "num_attention_heads=4 does not divide by num_key_value_heads=3"),
        (without(TinyModelConfig(experts=0).hf_config(), "head_dim"), "head_dim is missing .transformers would take"),
        (tiny_config("gpt_oss") | {"head_dim": None}, "head_dim is missing .transformers would take"),
        (tiny_config("mixtral") | {"rope_parameters": None}, "rope_theta is missing .transformers would take"),
        (tiny_config("gpt_oss") | {"rope_parameters": {"rope_type": "default"}}, "rope_theta is missing"),
        (tiny_config("gpt_oss") | {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        (tiny_config("glm4_moe_lite") | {"mlp_layer_types": ["sparse"]}, "mlp_layer_types has 1 entries"),
        (without(tiny_config("glm4_moe_lite"), "mlp_layer_types"), "first_k_dense_replace is missing"),
        (without(tiny_config("qwen3_next"), "layer_types"), "full_attention_interval is missing"),
        (without(tiny_config("qwen3_next"), "linear_key_head_dim"), "linear_key_head_dim is missing"),
        (tiny_config("qwen3_next") | {"linear_num_key_heads": 0}, "linear_num_key_heads must be a whole number of at"),
        (tiny_config("minimax_m2") | {"rotary_dim": 8}, "rotary_dim=8 is not partial_rotary_factor of head_dim=32"),
        (tiny_config("deepseek_v3") | {"topk_group": None}, "topk_group=None must be of 1 to n_group=4 groups"),
        (tiny_config("deepseek_v3") | {"n_group": 3}, "8 experts do not divide by n_group=3"),
        (
            tiny_config("moonlight") | {"first_k_dense_replace": -1},
            "first_k_dense_replace must be a whole number of at",
        ),
    ],
)
def test_a_field_is_named_with_its_file_and_what_transformers_would_take(hf, sentence, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(UnsupportedModel, match=rf"config\.json: .*{sentence}"):
        read_description(tmp_path)
    with pytest.raises(ConfigError, match=rf"model\.path: {tmp_path}/config\.json: "):
        load_config("configs/quickstart.yaml", ["model.tiny=null", f"model.path={tmp_path}"])


def test_the_same_rotary_embedding_said_twice_is_no_mistake():
    rope = {"rope_theta": 1e6, **YARN}
    older = {key: value for key, value in YARN.items() if key != "rope_type"} | {"type": "yarn"}
    hf = tiny_config("deepseek_v3") | {"rope_parameters": rope, "rope_scaling": older, "rope_theta": 1e6}
    assert describe(hf).rope["factor"] == 4.0


def test_a_dense_model_needs_no_number_of_experts_a_token():
    hf = without(TinyModelConfig(experts=0).hf_config(), "num_experts_per_tok")
    assert describe(hf).topk == 0


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"a": 1,\n "b": }', r"config\.json, line 2, is not JSON: Expecting value"),
        (b"", r"config\.json, line 1, is not JSON"),
        (b"[]", r"config\.json must hold an object, not a list"),
        ("{'\u00e9': 1}".encode("latin-1"), r"config\.json is not JSON: .*can't decode byte 0xe9"),
        (b"[" * 100_000, r"config\.json is not JSON: .*recursion"),
    ],
)
def test_what_is_no_json_is_named_with_file_and_line(content, sentence, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"model\.path: .*{sentence}"):
        load_config("configs/quickstart.yaml", ["model.tiny=null", f"model.path={tmp_path}"])


@pytest.mark.parametrize("name", [["qwen3_moe"], {}, None, 3])
def test_a_model_type_that_is_no_text_is_named(name):
    with pytest.raises(UnsupportedModel, match=r"model_type .* is not supported; supported: qwen3_moe"):
        describe(MOE | {"model_type": name})
