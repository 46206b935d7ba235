"""A request answers by one set of keys and values to its end: those that it found in the prefix cache, and its own.

SGLang 0.5.23 publishes a prompt when it is computed. Where the cache has got the same tokens from another request
meanwhile, it gives the request those of the cache for its own: the rest of the answer is sampled over keys and values
that its first token was not sampled by, and the routes that are told are those of the other request. An expert that
rounding decides differs between two batches, so replayed routes then give other log-probs than were sampled by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def install() -> None:
    """Register the hook; call while SGLang loads its plugins. It reaches every module that has the function."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.mem_cache.common.checkpoint_kv_cache", keep_own, HookType.AROUND)


def keep_own(original: Callable[..., None], request: Any, cache: Any) -> None:
    """checkpoint_kv_cache: publishes nothing that the cache has from another by now; the request does when it ends."""
    barred = request.skip_radix_cache_insert
    if not barred and not getattr(cache, "disable", True):
        request.skip_radix_cache_insert = _cached(request, cache) > request.kv.cache_protected_len
    try:
        original(request, cache)
    finally:
        request.skip_radix_cache_insert = barred


def _cached(request: Any, cache: Any) -> int:
    """Of the tokens that it has computed, those at the front that the cache has, be it without a window's or a
    recurrent state."""
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    ids = request.full_untruncated_fill_ids[: request.extend_end]
    key = RadixKey(token_ids=ids, extra_key=request.extra_key, cache_salt=request.cache_salt)
    found = cache.match_prefix(MatchPrefixParams(key=key))
    return max(found.device_prefix_len, found.full_kv_hit_length)
