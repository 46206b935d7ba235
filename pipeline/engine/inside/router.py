"""Router logits in float32 in SGLang 0.5.23, on any device, as Megatron-Core makes them under `precision.router: fp32`.

SGLang's routers are linear layers in the dtype of the weights, so bfloat16 weights make bfloat16 logits. Here the same
product keeps its float32 sums; `Family.server_router` says what kind of layer a family's
is. The server switches it on by an environment variable, because
SGLang's processes take plugins and no objects.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from megatron_ext.hf.families import FAMILIES
from pipeline.config.precision import ROUTER_VARIABLE

if TYPE_CHECKING:
    import torch


def activate() -> None:
    """Called by SGLang's plugin loader in each of its processes, before the model is built."""
    if os.environ.get(ROUTER_VARIABLE) != "fp32":
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.model_executor.model_runner.ModelRunner.load_model", _after_load, HookType.AFTER)


def _after_load(result: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    import torch

    # For GLM SGLang lets matrix products of float32, which are its routers', be TF32 (model_overrides/glm4_moe.py:46).
    torch.set_float32_matmul_precision("highest")
    make_routers_float32(runner.model)
    return result


def make_routers_float32(model: torch.nn.Module) -> None:
    """Every router of a loaded SGLang model. Raises RuntimeError for one of a kind that is not known."""
    import torch
    from sglang.srt.layers.linear import ReplicatedLinear
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    def logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if x.is_cuda and weight.dtype != torch.float32:
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        return x.float() @ weight.float().t()

    class Float32Logits(UnquantizedLinearMethod):
        def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            return logits(x, layer.weight) if bias is None else logits(x, layer.weight) + bias.float()

    kinds = {family.server_router.layer: family.server_router.kind for family in FAMILIES.values()}
    changed = 0
    for name, block in model.named_modules():
        gate: Any = getattr(block, "gate", None) or getattr(block, "router", None)
        if gate is None or not hasattr(block, "experts"):
            continue
        layer = ReplicatedLinear if issubclass(type(gate), ReplicatedLinear) else type(gate)
        kind = kinds.get(f"{layer.__module__.rpartition('.')[2]}.{layer.__name__}")
        if kind == "linear":
            gate.quant_method = Float32Logits()
            gate._use_tinygemm = False  # gpt-oss's kernel rounds
        elif kind == "own" and not getattr(gate, "use_intel_amx_backend", False):  # packs its weight
            if gate.weight.dtype != torch.float32:
                gate.forward = lambda x, *_, gate=gate, **__: logits(x, gate.weight)
        elif kind != "float32":
            raise RuntimeError(
                f"the router of {name} is a {type(gate).__name__}, whose logits sameroute cannot make in float32; set "
                "precision.router=bf16"
            )
        changed += 1
    logging.getLogger(__name__).info("router logits of %d layers in float32", changed)
