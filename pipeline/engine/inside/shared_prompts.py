"""Of requests with one prompt that come together one reads it; the others follow when its keys and values are there.

SGLang 0.5.23 puts all of them in one prefill, where each computes the whole prompt: n times the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

WORTH = 2
"""Tokens of a prompt that are not in the prefix cache, from which on others wait: its last is computed by each."""

_IDS, _WAITED = "_sameroute_ids", "_sameroute_waited"


def install() -> None:
    """Register the hook; call while SGLang loads its plugins."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    HookRegistry.register(f"{scheduler}._get_new_batch_prefill_raw", one_reads, HookType.AROUND)


def one_reads(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """_get_new_batch_prefill_raw: sees those alone that need not wait; all keep their places."""
    before = scheduler.waiting_queue
    cached = not getattr(scheduler.tree_cache, "disable", True)
    held = set(map(id, held_back(scheduler))) if cached and before else set[int]()
    if not held:
        return original(scheduler, *args, **kwargs)
    scheduler.waiting_queue = [request for request in before if id(request) not in held]
    try:
        return original(scheduler, *args, **kwargs)
    finally:
        after, known = scheduler.waiting_queue, set(map(id, before))
        left = held.union(map(id, after))
        new = [request for request in after if id(request) not in known]
        scheduler.waiting_queue = [request for request in before if id(request) in left] + new


def held_back(scheduler: Any) -> list[Any]:
    """Requests that wait while another one reads their prompt, or is about to. Those that have waited go together: not
    every model's cache finds a whole prompt again."""
    waiting = {id(request) for request in scheduler.waiting_queue}
    batch = scheduler.last_batch
    under_way = [scheduler.chunked_req, *(() if batch is None else batch.reqs)]
    reading = [r for r in under_way if r is not None and id(r) not in waiting and not r.output_ids and not r.finished()]
    waits: dict[Any, bool | None] = dict.fromkeys(map(_prompt, reading), True)
    held = []
    for request in scheduler.waiting_queue:
        if request.output_ids:  # it was under way before
            continue
        prompt = _prompt(request)
        if prompt not in waits:
            waits[prompt] = False if getattr(request, _WAITED, None) == prompt else None
            continue
        if waits[prompt] is None:
            waits[prompt] = _unread(request, scheduler.tree_cache) >= WORTH
        if waits[prompt]:
            setattr(request, _WAITED, prompt)
            held.append(request)
    return held


def _prompt(request: Any) -> Any:
    """Equal for those whose keys and values are the same; another after a change of weights."""
    ids = getattr(request, _IDS, None)
    if ids is None:
        ids = np.asarray(request.origin_input_ids, np.int64).tobytes()
        setattr(request, _IDS, ids)
    return ids, request.extra_key, request.cache_salt, request.lora_id


def _unread(request: Any, tree: Any) -> int:
    """Tokens of its prompt that are not in the prefix cache."""
    from sglang.srt.mem_cache.common import match_kv_cache

    found = match_kv_cache(request, tree, request.origin_input_ids)
    return len(request.origin_input_ids) - found.device_prefix_len
