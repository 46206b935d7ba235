"""What the server's command line says, without a server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.server import ServerConfig
from pipeline.engine.server import SGLangServer, startup_timeout


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    def arguments(device="cpu", trust_remote_code=False, model=None, memory_saver=False, **config):
        (tmp_path / "config.json").write_text(json.dumps(model or {"model_type": "qwen3_moe"}))
        server = SGLangServer(
            ServerConfig(**config),
            tmp_path,
            tmp_path / "sglang.log",
            device=device,
            seed=0,
            return_routed_experts=False,
            trust_remote_code=trust_remote_code,
            memory_saver=memory_saver,
        )
        monkeypatch.setattr(server, "_port", 30000)
        return server.arguments()

    return arguments


def value_of(arguments, name):
    return arguments[arguments.index(name) + 1]


def test_a_models_own_code_runs_in_the_server_only_where_it_is_trusted(arguments):
    assert "--trust-remote-code" not in arguments()
    assert "--trust-remote-code" in arguments(trust_remote_code=True)


def test_a_server_on_gpus_is_told_that_it_will_give_its_memory_away(arguments):
    assert "--enable-memory-saver" in arguments("cuda", memory_saver=True)
    assert "--enable-memory-saver" not in arguments("cuda")
    assert "--enable-memory-saver" not in arguments("cpu", memory_saver=True)  # it hooks the allocator of a GPU


def test_a_server_is_told_what_its_family_needs(arguments):
    model = {"model_type": "deepseek_v3", "scoring_func": "sigmoid"}  # of the three, what config.json does not say
    for device in ("cpu", "cuda"):
        told = json.loads(value_of(arguments(device, model=model), "--json-model-override-args"))
        assert told == {"moe_layer_freq": 1, "topk_method": "noaux_tc"}
    whole = model | told
    assert "--json-model-override-args" not in arguments(model=whole)
    rotated = {"model_type": "minimax_m2", "head_dim": 128, "partial_rotary_factor": 0.5, "scoring_func": "sigmoid"}
    told = json.loads(value_of(arguments(model=rotated), "--json-model-override-args"))
    assert told == {"use_qk_norm": True, "qk_norm_type": "per_layer", "use_routing_bias": True, "rotary_dim": 64}
    types = {"model_type": "glm4_moe_lite", "mlp_layer_types": ["dense", "dense", "sparse"]}
    told = json.loads(value_of(arguments(model=types), "--json-model-override-args"))
    assert told == {"first_k_dense_replace": 2}
    rope = {"rope_theta": 1e7, "partial_rotary_factor": 0.25}
    types = {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"], "rope_parameters": rope}
    told = json.loads(value_of(arguments(model=types), "--json-model-override-args"))
    assert told == rope | {"full_attention_interval": 2}
    assert value_of(arguments(model={"model_type": "gpt_oss"}), "--moe-runner-backend") == "triton"
    assert "--moe-runner-backend" not in arguments("cuda", model={"model_type": "gpt_oss"})
    sparse = {"model_type": "deepseek_v32", "first_k_dense_replace": 3}
    assert value_of(arguments("cuda", model=sparse), "--kv-cache-dtype") == "bfloat16"
    assert "--kv-cache-dtype" not in arguments("cuda", model=model | told)
    assert arguments() == arguments(model={"model_type": "of nobody"})


@pytest.mark.parametrize(("context", "cache"), [(4096, 65_536), (100_000, 100_000)])
def test_the_cache_of_a_cpu_holds_a_request_as_long_as_the_context(arguments, context, cache):
    assert value_of(arguments(context_length=context), "--max-total-tokens") == str(cache)
    assert value_of(arguments(context_length=context, max_total_tokens=200_000), "--max-total-tokens") == "200000"
    assert "--max-total-tokens" not in arguments(device="cuda", context_length=context)


def test_the_servers_process_finds_the_packages_before_anything_on_pythonpath(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somebody/else")
    server = SGLangServer(
        ServerConfig(), tmp_path, tmp_path / "log", device="cuda", seed=0, return_routed_experts=False
    )
    monkeypatch.setattr(server, "_scratch", tmp_path)
    root = str(Path(sys.modules["pipeline"].__file__).parent.parent)
    assert server._environment()["PYTHONPATH"].split(":") == [root, "/somebody/else"]


CACHE = """
from pathlib import Path
from pipeline.config.server import ServerConfig
from pipeline.engine.server import SGLangServer, startup_timeout

server = SGLangServer(ServerConfig(), "m", Path("log"), device="cuda", seed=0, return_routed_experts=False)
server._scratch = "scratch"
print(server._environment().get("SGLANG_CACHE_DIR"))
"""


@pytest.mark.parametrize(("bind", "cache"), [("--bind", "None"), ("--ro-bind", "scratch")])
def test_a_server_keeps_what_it_compiles_with_its_scratch_where_home_cannot_be_written(tmp_path, bind, cache):
    home = ["--setenv", "HOME", str(tmp_path), "--unsetenv", "SGLANG_CACHE_DIR"]
    words = ["bwrap", "--dev-bind", "/", "/", bind, str(tmp_path), str(tmp_path), *home, "--", sys.executable, "-c"]
    done = subprocess.run([*words, CACHE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [cache]
    assert ("cannot be written: a server compiles again at each start" in done.stderr) == (cache == "scratch")


def test_a_server_has_longer_to_start_the_more_it_has_to_read(tmp_path):
    assert startup_timeout(tmp_path) == 600
    for number in range(2):
        with (tmp_path / f"model-{number}.safetensors").open("wb") as file:
            file.truncate(100 * 10**9)  # sparse
    assert startup_timeout(tmp_path) == 1200
    assert ServerConfig().startup_timeout_s is None
