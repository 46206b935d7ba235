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
HAVE_HEADS_OF_ONE_WIDTH = (
    *(
        "llama",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "qwen2_moe",
        "mixtral",
        "glm4_moe",
        "minimax_m2",
        "gpt_oss",
        "qwen3_next",
    ),
)
MAY_HAVE_DENSE_LAYERS = (
    *("qwen3_moe", "qwen2_moe", "deepseek_v3", "kimi_k2", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "qwen3_next"),
)
WITHOUT_A_DIFFERENCE = {
    *("architectures", "__class__", "pad_token_id", "text_config", "encoder_only", "layers_block_type", "mla"),
    *("linear_num_key_heads_cpu", "linear_num_value_heads_cpu"),  # SGLang's own, of the heads that divide over ranks
    *("enable_lm_head_fp32", "enable_lm_head_output_fp32"),  # how the LM head rounds
    *("mla_nope", "target_hidden_size", "original_intermediate_size"),  # drafts, and MXFP4 weights
    "indexer_rope_interleave",  # of the indexer, which chooses all tokens here
}
"""Fields that SGLang reads of a config, and that make no other model of it."""
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
    if name in HAVE_HEADS_OF_ONE_WIDTH:
        assert FAMILIES[name].server_heads == (re.search(r'config(\.|,\s*")head_dim\b', source) is not None)
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


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_heads_of_another_width_than_the_server_gives_are_refused_with_a_server_only(name, tmp_path):
    hf = tiny_config(name) | {"tie_word_embeddings": False, "head_dim": 32}
    with pytest.raises(
        ConfigError, match=rf"SGLang gives {name} heads of hidden_size / num_attention_heads = 16, .* head_dim=32 says"
    ):
        config_of(hf, tmp_path)
    assert config_of(hf, tmp_path, served=False).model.path == tmp_path
    assert config_of(hf | {"head_dim": 16}, tmp_path).model.path == tmp_path
    assert config_of(tiny_config("qwen3_moe with dense layers") | {"mlp_only_layers": []}, tmp_path)


@pytest.mark.parametrize(
    ("name", "field", "value", "instead"),
    [
        ("llama", "bias", True, "write bias=false"),
        ("llama", "rope_is_neox_style", False, "write rope_is_neox_style=true"),
        ("llama", "original_max_position_embeddings", 64, "write original_max_position_embeddings=40"),
        ("qwen2", "scale_emb", 12, "write scale_emb=1"),
        ("qwen2", "original_num_attention_heads", 2, "write original_num_attention_heads=4"),
        *(
            (name, "dual_chunk_attention_config", {"chunk_size": 8}, "leave dual_chunk_attention_config out")
            for name in ("qwen2", "qwen2_moe", "qwen3_moe with dense layers")
        ),
        ("mixtral", "rope_parameters.rope_theta", 9999.5, "write rope_theta=9999"),
        ("deepseek_v3", "swiglu_limit", 7.0, "leave swiglu_limit out"),
        ("deepseek_v3", "num_hash_layers", 1, "write num_hash_layers=0"),
        ("deepseek_v3", "rope_parameters.attn_factor", 2.0, "write attn_factor=1"),
        ("moonlight", "router_fp32", True, "leave router_fp32 out"),
        ("gpt_oss", "rope_parameters.extrapolation_factor", 2.0, "write extrapolation_factor=1"),
        ("gpt_oss", "hidden_act_alpha", 1.5, "write hidden_act_alpha=1.702"),
        ("qwen3_5_moe", "is_causal", False, "write is_causal=true"),
        ("glm4_moe", "final_logit_softcapping", 30.0, "leave final_logit_softcapping out"),
        ("minimax_m2", "rope_parameters.use_fope", True, "write use_fope=false"),
    ],
    ids=str,
)
def test_a_field_that_the_server_reads_in_its_own_way_is_refused_with_a_server_only(
    name, field, value, instead, tmp_path
):
    hf = tiny_config(name) | {"tie_word_embeddings": False, "mlp_only_layers": []}
    assert describe(hf).not_served() == []
    section, _, last = field.rpartition(".")
    changed = hf | ({section: hf[section] | {last: value}} if section else {last: value})
    (reason,) = describe(changed).not_served()
    assert reason.startswith(f"with {last}={json.dumps(value)} SGLang computes another {hf['model_type']} than")
    assert f"; {instead} if the model was trained so" in reason
    other = ["precision.weights=float32"] if name == "gpt_oss" else []
    with pytest.raises(ConfigError, match=f"with {last}=.* SGLang computes another"):
        config_of(changed, tmp_path, *other)
    assert config_of(changed, tmp_path, *other, served=False).model.path == tmp_path


@pytest.mark.parametrize("name", sorted({*FAMILIES, "logits_processor"} - {"kimi_k2", "deepseek_v32"}))
def test_no_field_that_sglangs_source_reads_is_unheard_of_here(name):
    """A new one asks whether the trainer reads it so too."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "srt"
    file = folder / "models" / SGLANG_FILES[name] if name in SGLANG_FILES else folder / "layers" / f"{name}.py"
    source = file.read_text()
    of_it = r"(?:\w+\.)?(?:hf_|text_|hf_text_)?config"
    read = {*re.findall(r"\bconfig\.(\w+)", source), *re.findall(rf'tattr\(\s*{of_it},\s*"(\w+)"', source)}
    here = " ".join(file.read_text() for file in Path("megatron_ext/hf").rglob("*.py"))
    assert read - set(re.findall(r'"(\w+)"', here)) <= WITHOUT_A_DIFFERENCE


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
