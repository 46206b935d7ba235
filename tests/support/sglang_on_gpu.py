"""SGLang's own resolution of its command line as on a machine of eight GPUs, without one.

    python -m tests.support.sglang_on_gpu H100|B200 JOBS OUT

JOBS: a pickle of {name: arguments}. OUT: a pickle of ({name: what SGLang would run with, or the error}, {MoE runner:
what its layer of top-k hands on}, what `read_back` says). Run by itself: much of SGLang looks at the GPU when it is
imported.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.support.stand_ins import StandIns

GPUS = {"H100": ((9, 0), 79.1, "NVIDIA H100 80GB HBM3"), "B200": ((10, 0), 178.0, "NVIDIA B200")}
"""Compute capability, GiB, and name, by the part of its name that a configuration uses."""
KEYS = (
    "attention_backend", "prefill_attention_backend", "decode_attention_backend", "moe_runner_backend",
    "moe_a2a_backend", "ep_size", "tp_size", "nnodes", "dtype", "kv_cache_dtype", "enable_tf32_matmul", "quantization",
    "disable_shared_experts_fusion", "enable_return_routed_experts", "enable_fp32_lm_head",
)  # fmt: skip
RUNNERS = ("triton", "triton_kernel", "flashinfer_trtllm", "flashinfer_trtllm_routed", "flashinfer_cutlass")
_KERNELS = ("sgl_kernel", "flash_mla", "deep_gemm", "deep_ep")  # which do not load without a driver


def show(gpu: str) -> None:
    """Let torch say that there are eight of them. Before SGLang is imported."""
    import torch

    capability, gib, name = GPUS[gpu]
    size = int(gib * (1 << 30))
    properties = SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], total_memory=size, multi_processor_count=132, uuid="x",
        warp_size=32, gcnArchName="", L2_cache_size=50 << 20, shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
    )  # fmt: skip
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 8, "current_device": 0, "get_device_capability": capability,
        "get_device_properties": properties, "get_device_name": name, "mem_get_info": (size, size), "set_device": None,
        "empty_cache": None, "is_bf16_supported": True,
    }  # fmt: skip
    for function, answer in answers.items():
        setattr(torch.cuda, function, lambda *args, answer=answer, **kwargs: answer)
    sys.meta_path.insert(0, StandIns(*_KERNELS))
    importlib.import_module("sglang.srt.server_args")
    for loaded, module in list(sys.modules.items()):  # it asks nvidia-smi
        if loaded.startswith("sglang") and hasattr(module, "get_nvgpu_memory_capacity"):
            vars(module)["get_nvgpu_memory_capacity"] = lambda *args, **kwargs: gib * 1024


def resolved(arguments: list[str]) -> dict[str, Any] | str:
    """What SGLang makes of its command line."""
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.server_args import prepare_server_args

    try:
        parsed = prepare_server_args(arguments)
        parsed.resolve_once()
        view = resolved_view(parsed)
        return {key: getattr(view, key, getattr(parsed, key, None)) for key in KEYS}
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"


def handed_on(runner: str) -> str:
    """What SGLang's layer of top-k gives an MoE runner for Qwen3-MoE: STANDARD is made where experts are captured."""
    from sglang.srt.layers.moe.topk import TopK, TopKConfig
    from sglang.srt.layers.moe.utils import MoeRunnerBackend, RoutingMethodType

    layer = TopK.__new__(TopK)
    layer.__dict__ |= {
        "topk_config": TopKConfig(top_k=8), "is_fp4_experts": False, "_runner_backend_bound": False,
    }  # fmt: skip
    layer.bind_runner_backend(MoeRunnerBackend(runner), routing_method_type=RoutingMethodType.Renormalize)
    assert layer.topk_config.output_format is not None
    return layer.topk_config.output_format.name


def read_back() -> dict[str, Any]:
    """Experts that lie in TensorRT-LLM's blocks: what the server says that it holds, and whether they lie so behind."""
    import torch
    from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

    from pipeline.engine.checksum import checksum
    from pipeline.engine.inside.held_weights import held_checksums

    method = UnquantizedFusedMoEMethod.__new__(UnquantizedFusedMoEMethod)
    torch.nn.Module.__init__(method)  # pyright: ignore[reportArgumentType]
    method.use_flashinfer_trtllm_moe, method._cache_permute_indices = True, {}
    method.process_weights_after_loading = method._maybe_apply_flashinfer_trtllm_bf16_block_layout
    experts, wide, hidden = 2, 256, 256
    layer: Any = torch.nn.Module()
    layer.num_local_experts, layer.intermediate_size_per_partition, layer.hidden_size = experts, wide, hidden
    layer.moe_runner_config = SimpleNamespace(is_gated=True)
    torch.manual_seed(0)
    loaded = {name: torch.randn(experts, *shape).bfloat16() for name, shape in
              (("w13_weight", (2 * wide, hidden)), ("w2_weight", (hidden, wide)))}  # fmt: skip
    for name in loaded:
        setattr(layer, name, torch.nn.Parameter(torch.zeros_like(loaded[name]), requires_grad=False))
    layer.quant_method = method

    def load_weights(weights):
        for name, tensor in weights:
            parameter = getattr(layer, name)
            method.maybe_restore_flashinfer_trtllm_bf16_weight_shape_for_load(layer, parameter, name)
            parameter.data.copy_(tensor)

    model: Any = torch.nn.ModuleDict({"experts": layer})
    model.load_weights = load_weights
    load_weights(loaded.items())
    method.process_weights_after_loading(layer)
    before = {name: getattr(layer, name).data.clone() for name in loaded}
    found, _ = held_checksums(model, [(name, "bfloat16", list(t.shape)) for name, t in loaded.items()])
    return {
        "in blocks": all(before[name].shape != loaded[name].shape for name in loaded),
        "held": {name: number for name, (_, number) in found.items()},
        "sent": {name: checksum(tensor) for name, tensor in loaded.items()},
        "as before": all(torch.equal(getattr(layer, name).data, before[name]) for name in loaded),
    }


def main() -> None:
    """The command."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    show(sys.argv[1])
    jobs = pickle.loads(Path(sys.argv[2]).read_bytes())
    found = {name: resolved(arguments) for name, arguments in jobs.items()}
    runners = {name: handed_on(name) for name in RUNNERS}
    Path(sys.argv[3]).write_bytes(pickle.dumps((found, runners, read_back())))


if __name__ == "__main__":
    main()
