"""What SGLang's model of each family makes of ties and of dense layers, and what a run with a server refuses."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_ext.hf.description import describe
from megatron_ext.hf.families import FAMILIES
from pipeline.commands.main import main
from pipeline.config import ConfigError, load_config, load_config_and_model
from pipeline.config.load_config import check_served
from tests.support.tiny_families import tiny_config

SGLANG_FILES = {
    "qwen3": "qwen3.py",
    "qwen2": "qwen2.py",
    "llama": "llama.py",
    "qwen3_moe": "qwen3_moe.py",
    "qwen2_moe": "qwen2_moe.py",
    "mixtral": "mixtral.py",
    "deepseek_v3": "deepseek_v2.py",
    "kimi_k2": "deepseek_v2.py",
    "deepseek_v32": "deepseek_v2.py",
    "glm4_moe": "glm4_moe.py",
    "glm4_moe_lite": "glm4_moe_lite.py",
    "minimax_m2": "minimax_m2.py",
    "gpt_oss": "gpt_oss.py",
    "qwen3_next": "qwen3_next.py",
    "qwen3_5_moe_text": "qwen3_5_text.py",
}
TIES_NOT_MADE = [
    *("qwen2_moe", "qwen3_moe with dense layers", "mixtral", "glm4_moe", "glm4_moe_lite", "minimax_m2", "gpt_oss"),
    "qwen3_next",
]
MAY_HAVE_DENSE_LAYERS = (
    *("qwen3_moe", "qwen2_moe", "deepseek_v3", "kimi_k2", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "qwen3_next"),
)
TIED = {"tie_word_embeddings": True}
SETTINGS = ["model.tiny=null", "precision.router=fp32", "precision.weights=bfloat16", "precision.kv_cache=same"]


def config_of(hf, folder, *overrides, **how):
    (folder / "config.json").write_text(json.dumps(hf))
    return load_config("configs/quickstart.yaml", [*SETTINGS, f"model.path={folder}", *overrides], **how)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_says_of_the_server_what_sglangs_source_says(name):
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "srt" / "models" / SGLANG_FILES[name]).read_text()
    assert FAMILIES[name].server_ties == ("self.lm_head = self.model.embed_tokens" in source)
    if FAMILIES[name].server_rope_types is not None:
        assert "rope_scaling" not in source
    elif "llama3" in FAMILIES[name].rope_types:
        assert "rope_scaling=rope_scaling" in source
    if name in MAY_HAVE_DENSE_LAYERS:
        assert FAMILIES[name].server_dense == (re.search(r"(    |self\.)is_layer_sparse = True\n", source) is None)


@pytest.mark.parametrize("name", TIES_NOT_MADE)
def test_ties_that_the_server_does_not_make_are_refused_with_a_server_only(name, tmp_path):
    hf = tiny_config(name) | TIED | {"mlp_only_layers": []}
    with pytest.raises(
        ConfigError, match=rf"model\.path: {tmp_path}: SGLang gives {hf['model_type']} an LM head of its"
    ):
        config_of(hf, tmp_path)
    with pytest.raises(ConfigError, match=r"write tie_word_embeddings=false, and into the files an lm_head\.weight"):
        load_config_and_model("configs/quickstart.yaml", [*SETTINGS, f"model.path={tmp_path}"])
    assert config_of(hf, tmp_path, served=False).model.path == tmp_path
    assert config_of(hf, tmp_path, "train.steps=0").model.path == tmp_path
    assert config_of(hf | {"tie_word_embeddings": False}, tmp_path).model.path == tmp_path


def test_a_stretched_rotary_embedding_that_the_server_does_not_make_is_refused_with_a_server_only(tmp_path):
    rope = {"rope_parameters": tiny_config("llama")["rope_parameters"], "tie_word_embeddings": False}
    hf = tiny_config("mixtral") | rope
    with pytest.raises(ConfigError, match=r"SGLang gives mixtral a plain rotary embedding, .* rope_type=llama3"):
        config_of(hf, tmp_path)
    assert config_of(hf, tmp_path, served=False).model.path == tmp_path
    assert config_of(tiny_config("qwen2_moe") | rope, tmp_path).model.path == tmp_path


@pytest.mark.parametrize("name", ["deepseek_v3", "moonlight", "qwen3_5_moe", "llama", "qwen2", "qwen3"])
def test_ties_that_the_server_makes_are_no_reason(name, tmp_path):
    assert config_of(tiny_config(name) | TIED, tmp_path).model.path == tmp_path


@pytest.mark.parametrize(
    ("name", "change", "layers"),
    [
        ("qwen3_moe with dense layers", {}, "2"),
        ("qwen3_moe with dense layers", {"mlp_only_layers": [], "decoder_sparse_step": 2}, "0, 2"),
        ("qwen3_moe with dense layers", {"mlp_only_layers": [0, 1, 2, 3]}, "0, 1, 2, 3"),
        ("qwen2_moe", {"mlp_only_layers": [3]}, "3"),
        ("qwen3_next", {"mlp_only_layers": [3]}, "3"),
        ("qwen2_moe", {"decoder_sparse_step": 4}, "0, 1, 2"),
    ],
)
def test_dense_layers_that_the_server_takes_for_sparse_are_refused_with_a_server_only(name, change, layers, tmp_path):
    hf = tiny_config(name) | change
    with pytest.raises(ConfigError, match=rf"layers {layers} are dense, and SGLang takes every layer of .*--from-dump"):
        config_of(hf, tmp_path)
    assert config_of(hf, tmp_path, served=False).model.path == tmp_path


def test_dense_layers_that_the_server_has_are_no_reason(tmp_path):
    for name in ("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite"):
        assert describe(tiny_config(name) | {"moe_layer_freq": 1}).moe_layers == (1, 2, 3)
        assert describe(tiny_config(name)).not_served() == []
    assert config_of(tiny_config("glm4_moe"), tmp_path).model.path == tmp_path


def test_a_family_that_the_server_computes_on_gpus_only_is_refused_with_a_server_on_a_cpu_only(tmp_path):
    hf, short = tiny_config("deepseek_v32") | {"index_topk": 512}, ["server.context_length=512"]
    on_gpus = r"SGLang computes the sparse attention of deepseek_v32 on GPUs only; set device=cuda .*--from-dump"
    with pytest.raises(ConfigError, match=on_gpus):
        config_of(hf, tmp_path, *short, "device=cpu")
    assert config_of(hf, tmp_path, *short, "device=cpu", served=False).model.path == tmp_path
    assert config_of(hf, tmp_path, *short, "device=cpu", "train.steps=0").model.path == tmp_path
    automatic = config_of(hf, tmp_path, *short, "device=auto")
    check_served(automatic, "cuda")
    with pytest.raises(ConfigError, match=on_gpus):
        check_served(automatic, "cpu")


def test_a_server_that_would_lose_its_indexers_is_refused(tmp_path):
    hf, settings = tiny_config("deepseek_v32") | {"index_topk": 512}, ["device=cuda", "cluster.colocated=true"]
    with pytest.raises(ConfigError, match=r"no transfer brings the indexers of deepseek_v32; set cluster\.colocated=f"):
        config_of(hf, tmp_path, *settings)
    assert config_of(tiny_config("deepseek_v3"), tmp_path, *settings).cluster.colocated


def test_more_tokens_than_an_indexer_chooses_are_refused_before_a_run_and_by_the_trainer(tmp_path):
    hf, settings = (
        tiny_config("deepseek_v32"),
        ["device=cuda", "data.max_prompt_tokens=12", "server.context_length=null"],
    )
    fits = config_of(hf, tmp_path, *settings, "rollout.max_new_tokens=18")
    assert fits.server.context_length == 32
    why = r"need a context of 33 tokens .* model's is 32 \(index_topk, behind which its attention is sparse"
    with pytest.raises(ConfigError, match=why):
        config_of(hf, tmp_path, *settings, "rollout.max_new_tokens=19")
    with pytest.raises(ConfigError, match=r"server\.context_length=64 is more than the model's 32 \(index_topk"):
        config_of(hf, tmp_path, *settings, "rollout.max_new_tokens=18", "server.context_length=64")
    model = describe(hf)
    assert (model.longest, model.too_long(32)) == (32, None)
    assert model.too_long(33) == (
        "a sequence of 33 tokens is longer than index_topk=32, behind which the attention of deepseek_v32 is sparse, "
        "which the trainer does not compute"
    )


def test_the_commands_ask_for_a_server_where_they_start_one(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("qwen2_moe") | TIED))
    words = ["configs/quickstart.yaml", *SETTINGS, f"model.path={tmp_path}", f"run.directory={tmp_path / 'run'}"]
    for command in (["train", *words], ["diagnose", *words, "train.steps=0"]):
        assert main(command) == 2
        assert "SGLang gives qwen2_moe an LM head of its own" in capsys.readouterr().err
    assert main(["train", *words, "--from-dump", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_talk_is_refused_where_the_server_would_be_of_another_model(tmp_path, capsys):
    """Of a run that started no server."""
    folder, base = tmp_path / "hf", Path("configs/quickstart.yaml").resolve()
    folder.mkdir()
    save_file({"w": np.zeros(1, np.float32)}, folder / "model.safetensors")
    own = {"model": {"tiny": None, "path": str(folder)}, "precision": {"router": "fp32"}, "train": {"steps": 0}}
    (tmp_path / "config.yaml").write_text(json.dumps({"base": str(base)} | own))
    for hf, why in (
        (tiny_config("qwen2_moe") | TIED, "SGLang gives qwen2_moe an LM head of its own"),
        (tiny_config("deepseek_v32") | {"index_topk": 4096}, "SGLang computes the sparse attention of deepseek_v32 on"),
    ):
        (folder / "config.json").write_text(json.dumps(hf))
        assert main(["chat", str(tmp_path)]) == 2
        assert f"{folder}: {why}" in capsys.readouterr().err
