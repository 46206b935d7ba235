"""Qwen3-Next, as SGLang has it, but for its gated delta nets, and the gate of its shared expert, Qwen2-MoE's."""

from typing import Any

import torch
from sglang.srt.models import qwen3_next
from sglang.srt.models.qwen3_next import EntryClass

from pipeline.engine.inside.cpu import delta_nets
from pipeline.engine.inside.cpu.models import qwen2_moe  # noqa: F401  (replaces that gate)

__all__ = ["EntryClass"]

_init = qwen3_next.Qwen3GatedDeltaNet.__init__


def on_the_cpu(net: Any, *args: Any, **kwargs: Any) -> None:
    """Qwen3GatedDeltaNet.__init__: it asks torch for the device, which takes it for a GPU that is not there."""
    of_device, torch.get_device_module = torch.get_device_module, lambda *_: torch.cpu
    try:
        _init(net, *args, **kwargs)
    finally:
        torch.get_device_module = of_device


qwen3_next.Qwen3GatedDeltaNet.__init__ = on_the_cpu  # pyright: ignore[reportAttributeAccessIssue]
delta_nets.install()
