"""Of requests that come together and begin alike one reads that; the others follow when its keys and values are there.

SGLang 0.5.23 puts all of them in one prefill, where each computes its whole prompt: n times the work. And of what two
compute at once the cache can have but one copy (`own_keys.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

WORTH = 2
"""Tokens of a prompt that are not in the prefix cache, from which on others wait: its last is computed by each."""

_IDS, _WAITED = "_sameroute_ids", "_sameroute_waited"
_BYTES = np.dtype(np.int64).itemsize


def install() -> None:
    """Register the hook; call while SGLang loads its plugins."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    HookRegistry.register(f"{scheduler}._get_new_batch_prefill_raw", one_reads, HookType.AROUND)


def one_reads(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """_get_new_batch_prefill_raw: sees those alone that need not wait; all keep their places."""
    before, cached = scheduler.waiting_queue, not getattr(scheduler.tree_cache, "disable", True)
    held = set(map(id, held_back(scheduler))) if cached and before and not _full(scheduler) else set[int]()
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


def _full(scheduler: Any) -> bool:
    """Whether SGLang takes nobody in now, so that nobody need be looked at."""
    others = scheduler.enable_priority_preemption or scheduler.is_hybrid_swa or scheduler.chunked_req is not None
    return scheduler.running_batch.batch_is_full and not scheduler.running_batch.is_empty() and not others


def held_back(scheduler: Any) -> list[Any]:
    """Requests whose next unread token another one reads that begins alike, or is about to. When that has read it, the
    rest of a prompt may have another reader; but not where the cache does not find what was read, as with some models.
    """
    waiting = {id(request) for request in scheduler.waiting_queue}
    batch = scheduler.last_batch
    under_way = [scheduler.chunked_req, *(() if batch is None else batch.reqs)]
    readers = {
        _head(request, request.kv.cache_protected_len): id(request)
        for request in under_way
        if request is not None and id(request) not in waiting and not request.output_ids and not request.finished()
    }
    known: dict[Any, int] = {}
    held = []
    for request in scheduler.waiting_queue:
        if request.output_ids:  # it was under way before
            continue
        length = len(request.origin_input_ids)
        prompt = _head(request, length)
        if prompt not in known:
            known[prompt] = _cached(request, scheduler.tree_cache)
        cached = known[prompt]
        if length - cached < WORTH:
            continue
        reader = readers.setdefault(_head(request, cached), id(request))
        before = getattr(request, _WAITED, None)  # for whom, and what the cache had then
        if reader != id(request) and (
            before is None or before[0] == reader or before[1] != (cached, request.extra_key)
        ):
            setattr(request, _WAITED, (reader, (cached, request.extra_key)))
            held.append(request)
    return held


def _head(request: Any, cached: int) -> Any:
    """Equal for those that read the same token next, after as many and the same in the cache under the same weights."""
    ids = getattr(request, _IDS, None)
    if ids is None:
        ids = np.asarray(request.origin_input_ids, np.int64).tobytes()
        setattr(request, _IDS, ids)
    return ids[: (cached + 1) * _BYTES], request.extra_key, request.cache_salt, request.lora_id


def _cached(request: Any, tree: Any) -> int:
    """Tokens of its prompt that are in the prefix cache."""
    from sglang.srt.mem_cache.common import match_kv_cache

    return match_kv_cache(request, tree, request.origin_input_ids).device_prefix_len
