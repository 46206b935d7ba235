"""The temperature of a teacher's log-probs in SGLang 0.5.23, which scores given tokens at temperature 1 whatever a
request says (logprob_processor.py:734). A server that only scores divides its logits instead.

It is switched on by an environment variable, because SGLang's processes take plugins and no objects.
"""

from __future__ import annotations

import os
from typing import Any

from pipeline.config.precision import TEMPERATURE_VARIABLE


def activate() -> None:
    """Called by SGLang's plugin loader in each of its processes, before the model is built."""
    if TEMPERATURE_VARIABLE not in os.environ:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    processor = "sglang.srt.layers.logits_processor.LogitsProcessor._get_logits"
    HookRegistry.register(processor, _scaled, HookType.AFTER)


def _scaled(logits: Any, *_: Any, **__: Any) -> Any:
    return logits.float() / float(os.environ[TEMPERATURE_VARIABLE])
