"""A stream that asked for so many tokens at a time says nothing before it has as many, or has ended.

SGLang 0.5.23 sends the first token of each at once, and of short answers that is half of all that it sends. Here a
server's scheduler passes such requests over as long as they have too little to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def install() -> None:
    """Register the hook; call while SGLang loads its plugins."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    streamer = "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"
    HookRegistry.register(f"{streamer}._stream_output_generation", send_intervals, HookType.AROUND)


def send_intervals(
    original: Callable[..., Any], streamer: Any, requests: Sequence[Any], *args: Any, **kwargs: Any
) -> Any:
    """_stream_output_generation: of those alone that have something to say."""
    return original(streamer, [request for request in requests if not _waits(request)], *args, **kwargs)


def _waits(request: Any) -> bool:
    interval = request.sampling_params.stream_interval if request.stream else None
    if interval is None or request.finished():
        return False
    return len(request.output_ids) - request.send_token_offset < interval
