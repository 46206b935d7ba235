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
        (without(tiny_config("deepseek_v3"), "kv_lora_rank"), "kv_lora_rank is missing"),
        (MOE | {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "are both there and differ .* take rope_scaling"),
        (
            MOE | {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "default"}},
            "are both there and differ",
        ),
        (MOE | {"max_position_embeddings": None}, "max_position_embeddings is null"),
        (MOE | {"rope_scaling": "yarn"}, "rope_scaling must be an object, not 'yarn'"),
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
