"""Every preset's servers as SGLang would run them on H100 and on B200, by its own resolution of its command line.

What it relies on in SGLang's sources is named by file and line, and a test fails when one of these moves.
"""

from __future__ import annotations

import functools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import ConfigError, load_config_and_model
from pipeline.config.server import CAPTURING, ServerConfig, nodes_of_server
from pipeline.engine.inside import router
from pipeline.engine.nodes.member import Member
from pipeline.engine.server import SGLangServer
from tests.support.forked_program import run_program
from tests.support.proofs import sampled
from tests.support.sglang_on_gpu import GPUS
from tests.support.tiny_families import FAMILIES, tiny_config
from tests.support.vendor import lines

PRESETS = sorted(
    path for path in Path("configs").rglob("*.yaml")
    if path.parent.name != "parts" and path.name != "base.yaml" and load_config_and_model(path)[0].device == "cuda"
)  # fmt: skip
ARCHITECTURES = {"qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe", "mixtral": "Mixtral", "glm4_moe": "Glm4Moe",
                 "deepseek_v3": "DeepseekV3", "deepseek_v32": "DeepseekV32", "gpt_oss": "GptOss",
                 "glm4_moe_lite": "Glm4MoeLite", "minimax_m2": "MiniMaxM2", "qwen3_next": "Qwen3Next",
                 "qwen3_5_moe_text": "Qwen3_5Moe"}  # fmt: skip
ATTENTION = {
    ("H100", "grouped"): ("fa3",),
    ("H100", "latent"): ("fa3",),
    ("H100", "beside delta nets"): ("fa3",),
    ("H100", "sparse"): ("dsa",),
    ("B200", "sparse"): ("dsa",),
    ("B200", "grouped"): ("trtllm_mha",),
    ("B200", "latent"): ("trtllm_mla", "flashinfer"),  # the second for GLM-4.7-Flash
    ("B200", "beside delta nets"): ("triton", "trtllm_mha"),  # the second for the text model of Qwen3.5-MoE
}
"""SGLang's own choices, which take bfloat16 and a cache of it."""
every_gpu = pytest.mark.parametrize("gpu", sampled(GPUS, ["H100"]))


def command_line(folder: Path, hf: dict[str, Any], config: ServerConfig, **others: Any) -> list[str]:
    """Of a server of this model, on GPUs, eight of a machine; of the first machine where it spans several."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf))
    server = SGLangServer(
        config, folder, folder / "log", device="cuda", seed=0, return_routed_experts=True, **others
    )  # fmt: skip
    part = Member(server, 0, nodes_of_server(config.tensor_parallel, 8))
    part._port, part.meeting = 30000, "10.0.0.1:25000"
    return part.arguments()


def jobs(folder: Path) -> dict[str, list[str]]:
    """Of all presets, of each family's tiny model, of what SGLang does by itself, and of a fault."""
    from pipeline.config.precision import PrecisionConfig

    half = PrecisionConfig(weights="bfloat16")  # pyright: ignore[reportCallIssue]
    found = {}
    for path in PRESETS:
        config, model = load_config_and_model(path)
        place = folder / str(path).replace("/", "_")
        found[str(path)] = command_line(place, model.hf, config.server, precision=config.precision)
    for name, (kind, _) in FAMILIES.items():
        hf = tiny_config(name) | {"architectures": [f"{ARCHITECTURES[kind]}ForCausalLM"], "torch_dtype": "bfloat16"}
        found[name] = command_line(folder / name.replace(" ", "_"), hf, ServerConfig(), precision=half)  # pyright: ignore
        ours = ("--moe-runner-backend", "triton", "--disable-shared-experts-fusion")
        found[f"{name}, by itself"] = [word for word in found[name] if word not in ours]
    found["planted"] = [*found["configs/qwen3-30b-a3b/2-nodes.yaml"], "--attention-backend", "triton"]
    return found


@pytest.fixture(scope="module")
def on(preloaded, tmp_path_factory):
    """GPU -> what tests/support/sglang_on_gpu.py says."""
    folder = tmp_path_factory.mktemp("sglang")
    (folder / "jobs").write_bytes(pickle.dumps(jobs(folder / "models")))

    @functools.cache
    def said(gpu: str):
        run_program("tests.support.sglang_on_gpu", gpu, folder / "jobs", folder / gpu)
        return pickle.loads((folder / gpu).read_bytes())

    return said


def wrong(gpu: str, hf: dict[str, Any], resolved: dict[str, Any] | str) -> list[str]:
    """What a server would do otherwise than the trainer counts on."""
    if isinstance(resolved, str):
        return [resolved]
    latent = hf["model_type"] in ("deepseek_v3", "kimi_k2", "glm4_moe_lite")
    beside = hf["model_type"] in ("qwen3_next", "qwen3_5_moe_text")
    kind = "latent" if latent else "beside delta nets" if beside else "sparse" if "index_topk" in hf else "grouped"
    expected: dict[str, Any] = {
        "attention_backend": ATTENTION[gpu, kind],
        "prefill_attention_backend": (None,),
        "decode_attention_backend": (None,),
        "moe_runner_backend": CAPTURING[:1],
        "moe_a2a_backend": ("none",),
        "dtype": ("bfloat16",),
        "quantization": (None,),
        "enable_return_routed_experts": (True,),
        "disable_shared_experts_fusion": (True,),
        "enable_fp32_lm_head": (True,),
    }
    return [f"{key} is {resolved[key]}" for key, values in expected.items() if resolved[key] not in values]


@every_gpu
@pytest.mark.parametrize("path", PRESETS, ids=str)
def test_a_presets_server_tells_the_routes_and_attends_in_its_dtype(on, gpu, path):
    config, model = load_config_and_model(path)
    if gpu == "B200" and config.precision.kv_cache != "same":
        return  # it is refused, see below
    resolved = on(gpu)[0][str(path)]
    assert wrong(gpu, model.hf, resolved) == []
    by_itself = "auto" if model.family.indexer is None else "bfloat16"
    cache = {"same": by_itself}.get(config.precision.kv_cache, config.precision.kv_cache)
    assert (resolved["tp_size"], resolved["kv_cache_dtype"]) == (config.server.tensor_parallel, cache)
    assert resolved["nnodes"] == nodes_of_server(config.server.tensor_parallel, config.cluster.gpus_per_node)


def test_a_preset_with_a_narrow_cache_is_refused_on_a_gpu_whose_attention_has_none():
    narrow = [path for path in PRESETS if load_config_and_model(path)[0].precision.kv_cache != "same"]
    assert narrow
    for path in narrow:
        with pytest.raises(ConfigError, match=r"fa3.* does not run on b200; set precision\.kv_cache=same"):
            load_config_and_model(path, ["cluster.gpu=b200"])


@every_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_server_of_every_family_does(on, gpu, family):
    assert wrong(gpu, tiny_config(family), on(gpu)[0][family]) == []


@pytest.mark.parametrize(
    ("gpu", "family", "runner"),
    [
        ("H100", "gpt_oss", "triton_kernel"),
        pytest.param("B200", "qwen3_moe with dense layers", "flashinfer_trtllm", marks=pytest.mark.proof),
        pytest.param("B200", "glm4_moe", "flashinfer_trtllm", marks=pytest.mark.proof),
    ],
)
def test_sglang_by_itself_would_take_a_runner_that_is_not_told_the_experts(on, gpu, family, runner):
    found, runners, _ = on(gpu)
    assert found[f"{family}, by itself"]["moe_runner_backend"] == runner
    assert runners[runner] != "STANDARD"
    assert runner not in CAPTURING


@every_gpu
def test_runners_that_capture_are_those_that_are_handed_the_experts(on, gpu):
    assert {runner for runner, what in on(gpu)[1].items() if what == "STANDARD"} == set(CAPTURING)


def test_another_attention_backend_is_seen(on):
    hf = load_config_and_model(Path("configs/qwen3-30b-a3b/2-nodes.yaml"))[1].hf
    assert wrong("H100", hf, on("H100")[0]["planted"]) == ["attention_backend is triton"]


@every_gpu
def test_experts_in_blocks_are_read_as_they_were_sent_and_stay_in_blocks(on, gpu):
    said = on(gpu)[2]
    assert said["in blocks"]
    assert said["held"] == said["sent"]
    assert said["as before"]


@every_gpu
def test_routers_in_float32_are_no_tf32(on, gpu, monkeypatch):
    assert on(gpu)[0]["glm4_moe"]["enable_tf32_matmul"]  # SGLang's choice for this family
    monkeypatch.setattr(router, "make_routers_float32", lambda model: None)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        router._after_load(None, type("Runner", (), {"model": None}))
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("file", "line", "begins"),
    [
        ("layers/moe/topk.py", 769, "def bind_runner_backend("),
        ("layers/moe/topk.py", 2541, "if (cap := get_global_experts_capturer()) is not None:"),
        ("arg_groups/model_overrides/gpt_oss.py", 117, 'overrides["moe_runner_backend"] = "triton_kernel"'),
        ("arg_groups/model_overrides/qwen3_moe.py", 86, 'overrides["moe_runner_backend"] = "flashinfer_trtllm"'),
        ("arg_groups/model_overrides/qwen3_5.py", 28, 'sm100_default_attn_backend = "triton"'),
        ("arg_groups/model_overrides/glm4_moe.py", 46, 'overrides["enable_tf32_matmul"] = True'),
        ("model_executor/model_runner.py", 438, "if get_exec().features.enable_tf32_matmul:"),
        ("layers/quantization/unquant.py", 1099, "def restore_weights_before_loading("),
    ],
)
def test_what_is_relied_on_stands_where_it_was_read(file, line, begins):
    assert lines(f"sglang/srt/{file}", line, line, begins=begins)
