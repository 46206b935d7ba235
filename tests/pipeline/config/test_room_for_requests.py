"""The server's context follows the model and the run; what cannot fit is refused with numbers."""

import json

import pytest

from pipeline.config import ConfigError, load_config, load_config_and_model
from pipeline.config.model import TinyModelConfig
from pipeline.config.server import model_context, request_tokens

QUICKSTART = "configs/quickstart.yaml"
FREE = ["model.tiny=null", "server.context_length=null", "server.max_total_tokens=null"]


@pytest.fixture
def load(tmp_path):
    def load(*overrides, **fields):
        (tmp_path / "config.json").write_text(json.dumps(TinyModelConfig().hf_config() | fields))
        return load_config(QUICKSTART, [*FREE, f"model.path={tmp_path}", *overrides])

    return load


@pytest.mark.parametrize(
    ("positions", "answer", "context"),
    [(1024, 8, 1024), (40_960, 8, 4096), (40_960, 8192, 8210), (8210, 8192, 8210), (26, 8, 26)],
)
def test_the_default_is_4096_or_what_the_run_needs_within_what_the_model_reaches(load, positions, answer, context):
    config = load(f"rollout.max_new_tokens={answer}", max_position_embeddings=positions)
    assert config.server.context_length == context


def test_more_than_the_model_reaches_is_refused_with_numbers(load):
    with pytest.raises(ConfigError, match=r"context_length=2048 is more than the model's 1024"):
        load("server.context_length=2048", max_position_embeddings=1024)
    with pytest.raises(ConfigError, match=r"max_new_tokens=8 need a context of 26 tokens .* the model's is 25"):
        load(max_position_embeddings=25)
    with pytest.raises(ConfigError, match=r"max_new_tokens=1 need a context of 23 tokens .* the model's is 22"):
        load("rollout.max_new_tokens=1", max_position_embeddings=22)


def test_a_model_that_does_not_say_how_far_it_reaches_is_refused(tmp_path):
    hf = TinyModelConfig().hf_config()
    del hf["max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ConfigError, match="max_position_embeddings is missing"):
        load_config(QUICKSTART, [*FREE, f"model.path={tmp_path}"])


def test_a_plan_settles_it_too(tmp_path):
    config, model = load_config_and_model(QUICKSTART, ["server.context_length=null", "model.tiny.max_positions=512"])
    assert config.server.context_length == model.hf["max_position_embeddings"] == 512


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0,
                             "original_max_position_embeddings": 2048}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 2048}},
        {"model_max_length": 512},
    ],
)  # fmt: skip
def test_a_models_context_is_what_sglang_takes_it_for(fields):
    from sglang.srt.utils.hf_transformers.common import get_context_length
    from transformers import Qwen3MoeConfig

    hf = TinyModelConfig().hf_config() | {"max_position_embeddings": 8192} | fields
    assert model_context(hf) == get_context_length(Qwen3MoeConfig(**hf))


def test_a_request_has_two_tokens_beside_it_and_a_prompt_seven():
    assert [request_tokens(16, n) for n in (8, 5, 4, 1)] == [26, 23, 23, 23]
