"""Router logits in float32 in SGLang 0.5.23, on any device, as Megatron-Core makes them under `precision.router: fp32`.

SGLang's routers are linear layers in the dtype of the weights, so bfloat16 weights make bfloat16 logits. Here the same
product keeps its float32 sums. The server switches it on by an environment variable, because SGLang's processes take
plugins and no objects.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from pipeline.precision import ROUTER_VARIABLE

if TYPE_CHECKING:
    import torch


def activate() -> None:
    """Called by SGLang's plugin loader in each of its processes, before the model is built."""
    if os.environ.get(ROUTER_VARIABLE) != "fp32":
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.model_executor.model_runner.ModelRunner.load_model", _after_load, HookType.AFTER)


def _after_load(result: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    make_routers_float32(runner.model)
    return result


def make_routers_float32(model: torch.nn.Module) -> None:
    """Every router of a loaded SGLang model. Raises RuntimeError for one that is no plain linear layer."""
    import torch
    from sglang.srt.layers.linear import ReplicatedLinear
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    class Float32Logits(UnquantizedLinearMethod):
        def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            if x.is_cuda:
                return torch.mm(x, layer.weight.t(), out_dtype=torch.float32)
            return x.float() @ layer.weight.float().t()

    changed = 0
    for name, block in model.named_modules():
        if not (hasattr(block, "gate") and hasattr(block, "experts")):
            continue
        gate: Any = block.gate
        if not isinstance(gate, ReplicatedLinear) or gate.bias is not None:
            raise RuntimeError(
                f"{name}.gate is a {type(gate).__name__}, whose logits sameroute cannot make in float32; set "
                "precision.router=bf16"
            )
        gate.quant_method = Float32Logits()
        changed += 1
    logging.getLogger(__name__).info("router logits of %d layers in float32", changed)
