"""What SGLang 0.5.23 needs to give its memory away on a CPU, where it has no memory saver: nothing is freed, but what
would be lost on a GPU is lost here too. A model whose weights are not sent again answers with NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_WEIGHTS = "weights"  # sglang.srt.constants.GPU_MEMORY_TYPE_WEIGHTS


def install() -> None:
    """Register it; call while SGLang loads its plugins."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    updater = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
    HookRegistry.register(f"{updater}.release_memory_occupation", lose_weights, HookType.AROUND)


def lose_weights(original: Callable[..., Any], updater: Any, request: Any) -> Any:
    """release_memory_occupation: it ends with a wait for the device, which torch takes for a GPU that is not there."""
    of_device, torch.get_device_module = torch.get_device_module, lambda *_: torch.cpu
    try:
        answer = original(updater, request)
    finally:
        torch.get_device_module = of_device
    if not request.tags or _WEIGHTS in request.tags:
        with torch.inference_mode():
            for parameter in updater.tp_worker.model_runner.model.parameters():
                if parameter.is_floating_point():
                    parameter.fill_(torch.nan)
    return answer
