"""The precision block: what it makes of SGLang's command line, what it refuses, and how it rounds weights."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from megatron_ext.hf.families import FAMILIES
from pipeline.commands.main import main
from pipeline.config import ConfigError, load_config
from pipeline.config.precision import PrecisionConfig
from pipeline.config.server import ServerConfig
from pipeline.engine.server import SGLangServer
from pipeline.loop import inputs
from pipeline.weights.rounding import rounded
from tests.support.vendor import lines

QUICKSTART = "configs/quickstart.yaml"
HALF = {"weights": "bfloat16"}


@pytest.mark.parametrize(
    ("fields", "arguments", "routers"),
    [
        ({}, "--dtype float32 --enable-fp32-lm-head", {}),
        (HALF, "--dtype bfloat16 --enable-fp32-lm-head", {"SAMEROUTE_ROUTER": "fp32"}),
        (HALF | {"head": "fp32"}, "--dtype bfloat16 --enable-fp32-lm-head", {"SAMEROUTE_ROUTER": "fp32"}),
        (HALF | {"head": "bf16", "router": "bf16"}, "--dtype bfloat16", {}),
        (
            HALF | {"kv_cache": "fp8_e4m3", "router": "bf16", "head": "bf16"},
            "--dtype bfloat16 --kv-cache-dtype fp8_e4m3",
            {},
        ),
        (
            {"top_k": 20, "top_p": 0.9, "temperature": 0.7},
            "--dtype float32 --enable-fp32-lm-head --sampling-mask-max-tokens 84",
            {},
        ),
    ],
)
def test_each_setting_reaches_the_server(fields, arguments, routers):
    precision = PrecisionConfig(**fields)
    assert precision.server_arguments() == arguments.split()
    states = {"SGLANG_MAMBA_CONV_DTYPE": precision.weights}
    assert precision.server_environment() == states | routers


def test_the_server_runs_under_the_arguments_of_the_block_and_a_backend_that_has_its_cache(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for fields, backend in (
        ({}, "sameroute_cpu"),
        ({"kv_cache": "bfloat16"}, "torch_native"),
        (HALF, "torch_native"),
    ):
        precision = PrecisionConfig(**fields)
        server = SGLangServer(
            ServerConfig(),
            tmp_path,
            tmp_path / "log",
            device="cpu",
            seed=0,
            return_routed_experts=True,
            precision=precision,
        )
        server._port = 1
        line = " ".join(server.arguments())
        assert " ".join(precision.server_arguments()) in line
        assert f"--attention-backend {backend} " in line


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head": "bf16"}, "set head=fp32, or weights=bfloat16"),
        ({"router": "bf16"}, "set router=fp32, or weights=bfloat16"),
        ({"top_p": 0.9}, "set top_k to at most that"),
        ({"top_k": 5000}, "set top_k to at most that"),
        ({"temperature": 0.0}, "greater than 0"),
    ],
)
def test_what_both_engines_cannot_do_alike_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        PrecisionConfig(**fields)


def test_an_fp8_cache_is_refused_on_a_cpu_and_where_the_server_would_round_otherwise():
    precision = PrecisionConfig(weights="bfloat16", kv_cache="fp8_e4m3")
    precision.check_device("cuda")
    assert precision.cache_backend(None) == precision.cache_backend("fa3") == "fa3"
    assert PrecisionConfig(**HALF).cache_backend(None) is None
    assert PrecisionConfig(**HALF).cache_backend("triton") == "triton"
    for backend in ("triton", "flashinfer", "trtllm_mha", "fa4"):
        with pytest.raises(
            ValueError, match=rf"={backend} is not known to round .*; set server\.attention_backend=fa3"
        ):
            precision.cache_backend(backend)
    with pytest.raises(ValueError, match=r"set precision\.kv_cache=fp8_e4m3, or same"):
        PrecisionConfig(weights="bfloat16", kv_cache="fp8_e5m2").cache_backend(None)
    with pytest.raises(ValueError, match=r"set precision\.kv_cache to same or bfloat16"):
        precision.check_device("cpu")


def test_code_can_make_the_engines_differ_where_a_configuration_cannot():
    precision = load_config(QUICKSTART, ["precision.weights=bfloat16"]).precision
    assert precision.head == "fp32_accumulate"
    assert precision.model_copy(update={"head": "bf16"}).head == "bf16"


def test_the_bound_on_the_mismatch_is_that_of_the_precision():
    bounds = [
        load_config(QUICKSTART, overrides).logprob_bound
        for overrides in (
            [],
            ["precision.weights=bfloat16"],
            ["precision.rollout_weights=int8"],
            ["precision.weights=bfloat16", "checks.max_abs_logprob=7"],
        )
    ]
    assert bounds == [1e-3, 0.1, 0.3, 7]


@pytest.mark.parametrize(("kind", "largest_error"), [("int8", 0.5 / 127), ("fp8", 1 / 28)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_are_rounded_by_rows_and_the_rest_is_left_alone(kind, largest_error, dtype):
    kept = (*FAMILIES["qwen3_moe"].kept_whole, *FAMILIES["gpt_oss"].kept_whole)
    torch.manual_seed(0)
    matrix = torch.randn(16, 64).to(dtype) * torch.logspace(-3, 3, 16)[:, None].to(dtype)
    matrix[3] = 0
    left = [
        ("model.embed_tokens.weight", torch.randn(8, 4)),
        ("lm_head.weight", torch.randn(8, 4)),
        ("model.layers.0.mlp.gate.weight", torch.randn(8, 4)),
        ("model.layers.0.mlp.router.weight", torch.randn(8, 4)),
        ("model.layers.0.mlp.experts.down_proj_bias", torch.randn(8, 4)),
        ("model.layers.0.input_layernorm.weight", torch.randn(4)),
    ]
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.experts.3.gate_proj.weight"]
    buckets = [[(names[0], matrix), *left], [(names[1], matrix)]]
    first, second = rounded(buckets, kind, kept)
    assert [name for name, _ in first] == [name for name, _ in buckets[0]]
    assert all(a is b for (_, a), (_, b) in zip(first[1:], left, strict=True))
    for name, held in (first[0], second[0]):
        assert name in names
        assert held.dtype == dtype
        assert torch.isfinite(held).all()
        assert not torch.equal(held, matrix)
        error = (held.float() - matrix.float()).abs().amax(1) / matrix.float().abs().amax(1).clamp_min(1e-30)
        assert error.max() <= largest_error * 1.02 + (2**-8 if dtype == torch.bfloat16 else 0)
        if kind == "int8" and dtype == torch.float32:
            steps = held / (held.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127)
            assert (steps - steps.round()).abs().max() < 1e-3
    assert list(rounded(buckets, "same", kept)) == buckets
    packed = [("model.layers.0.mlp.experts.down_proj", torch.stack([matrix, matrix.flip(0)]).mT)]
    (((_, held_packed),),) = rounded([packed], kind, kept)
    assert torch.equal(held_packed.mT, torch.stack([first[0][1], first[0][1].flip(0)]))


def test_float32_is_refused_on_a_gpu_with_what_to_write():
    with pytest.raises(ValueError, match=r"float32, the default, .* set precision\.weights=bfloat16, or device=cpu"):
        PrecisionConfig().check_device("cuda")
    PrecisionConfig().check_device("cpu")
    PrecisionConfig(**HALF).check_device("cuda")


@pytest.mark.parametrize(
    ("line", "warned"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512bw", True),
        ("flags\t\t: fpu avx512f avx512_bf16", False),
        ("flags\t\t: fpu amx_tile amx_bf16", False),
        ("Features\t: fp asimd i8mm bf16", False),
        ("Features\t: fp asimd", True),
        ("processor\t: 0", False),
    ],
)
def test_bf16_is_warned_of_where_the_processor_has_no_such_arithmetic(line, warned, tmp_path, monkeypatch, capsys):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n{line}\n")
    slow_on = PrecisionConfig.slow_on
    monkeypatch.setattr(PrecisionConfig, "slow_on", lambda own, device: slow_on(own, device, cpuinfo))
    for weights in ("bfloat16", "float32"):
        inputs.check_inputs(load_config(QUICKSTART, [f"precision.weights={weights}", f"run.directory={tmp_path}/run"]))
        said = capsys.readouterr().err
        assert ("set precision.weights=float32" in said) == (warned and weights == "bfloat16")
        assert said.count("\n") == int(warned and weights == "bfloat16")
    assert slow_on(PrecisionConfig(**HALF), "cuda", cpuinfo) is None
    assert slow_on(PrecisionConfig(**HALF), "cpu", tmp_path / "absent") is None


@pytest.mark.parametrize("weights", [[], ["precision.weights=float32"], ["precision={head: fp32, router: fp32}"]])
def test_a_configuration_for_gpus_is_refused_wherever_it_is_read(weights, tmp_path, capsys, monkeypatch):
    said = "set precision.weights=bfloat16"
    with pytest.raises(ConfigError, match=said):
        load_config(QUICKSTART, ["device=cuda", *weights])
    for device in ("cuda", "auto"):  # a plan and a job are of GPUs where nothing says otherwise
        for command in (["plan", QUICKSTART], ["launch", "slurm", QUICKSTART, "--dry-run"]):
            assert main([*command, f"device={device}", *weights]) == 2
            assert said in capsys.readouterr().err
    monkeypatch.setattr(inputs.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(inputs.torch.cuda, "device_count", lambda: 8)
    with pytest.raises(ConfigError, match=said):
        inputs.check_inputs(load_config(QUICKSTART, ["device=auto", f"run.directory={tmp_path}", *weights]))


def test_float32_is_tf32_in_sglangs_experts_on_a_gpu():
    kernel = "sglang/kernels/ops/moe/fused_moe_triton_kernels.py"
    assert "input_precision" not in lines(kernel, 611, 611, begins="accumulator += tl.dot(a, b)")
    lines("triton/language/core.py", 2387, 2387, begins='input_precision = knobs.language.fp32_default or ("tf32"')


def test_backends_round_an_fp8_cache_as_they_were_read():
    """SGLang's sources: the table of `PrecisionConfig.cache_backend`."""
    lines("sglang/srt/layers/attention/flashattention_backend.py", 1436, 1436, begins="q = q.to(self.kv_cache_dtype)")
    lines("sglang/kernels/ops/attention/extend_attention.py", 619, 619, begins="qk = tl.dot(q.to(k.dtype), k)")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            ["server.moe_runner=flashinfer_trtllm"],
            r"moe_runner=flashinfer_trtllm is not known to tell .*; set one of triton",
        ),
        (["server.moe_runner=triton_kernel"], "moe_runner=triton_kernel is not known"),
        (["precision.kv_cache=fp8_e4m3", "server.attention_backend=triton"], "attention_backend=triton is not known"),
        (
            ["precision.kv_cache=fp8_e4m3", "cluster.gpu=b200"],
            r"\(fa3\) does not run on b200; set precision\.kv_cache=same",
        ),
        (["server.extra_args=[--moe-runner-backend, triton]"], r"a field of its own, server\.moe_runner"),
        (["server.extra_args=[--decode-attention-backend=fa3]"], r"by one, server\.attention_backend"),
    ],
)
def test_kernels_of_a_server_that_would_set_it_apart_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        load_config(QUICKSTART, ["device=cuda", "precision.weights=bfloat16", *fields])


def test_where_no_routes_are_needed_any_runner_may_be_taken():
    load_config(QUICKSTART, ["device=cuda", "precision.weights=bfloat16", "replay=none", "server.moe_runner=auto"])
