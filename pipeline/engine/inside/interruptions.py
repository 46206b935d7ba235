"""What SGLang 0.5.23 does to requests that live through a change of weights, put right in its schedulers.

versions: with the overlap schedule a token is in flight when a scheduler stops: sampled under the old weights, and not
          among the request's tokens yet. SGLang would name the new weights as its version.
keys:     a request that waits in the queue across the change is computed under the new weights, but would look for its
          prefix under the key of the old ones. It gets the new key. So does one that arrives with an old one. One whose
          prompt has been read in part is sent back.
routes:   SGLang keeps the routes of a token with its keys and values. When it drops these (`retract`, or for want of
          memory) and computes them again, the routes are of the second pass, under other weights perhaps. Those of the
          pass that sampled are kept beside the request, and go into its answer.
ends:     an abort takes effect with the next token, whatever that is. SGLang would call an answer aborted that ends by
          itself with this token, and it would be gone on with, after its end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.engine.control import VERSION_KEY, cache_key


def install() -> None:
    """Register the hooks; call while SGLang loads its plugins."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    managers = "sglang.srt.managers"
    scheduler, results = f"{managers}.scheduler.Scheduler", f"{managers}.scheduler_components.batch_result_processor"
    HookRegistry.register(f"{scheduler}.record_weight_version_change", change_version, HookType.AROUND)
    HookRegistry.register(f"{scheduler}.handle_generate_request", renew_key, HookType.AROUND)
    HookRegistry.register(f"{scheduler}.pause_generation", send_back_half_read, HookType.AROUND)
    HookRegistry.register(f"{managers}.schedule_batch.release_req", keep_routes, HookType.AROUND)
    HookRegistry.register(f"{managers}.schedule_batch.Req.update_finish_state", end_by_itself, HookType.AROUND)
    collect = f"{results}.SchedulerBatchResultProcessor._maybe_collect_routed_experts"
    HookRegistry.register(collect, put_routes_back, HookType.AFTER)


def change_version(original: Callable[..., Any], scheduler: Any, new_version: str | None) -> Any:
    """Scheduler.record_weight_version_change: tokens in flight are of the old version, keys of the queue of the new."""
    from sglang.srt.runtime_context import get_serving

    old = get_serving().weight_version
    result = original(scheduler, new_version)
    if new_version is None or new_version == old:
        return result
    for batch, _ in getattr(scheduler, "result_queue", ()):
        for request in batch.reqs:
            if not request.finished() and not request.is_retracted and request.inflight_middle_chunks <= 0:
                _name_one_more(request, old)
    for request in scheduler.waiting_queue:
        if (request.extra_key or "").startswith(VERSION_KEY):
            request.extra_key = cache_key(new_version)
    return result


def _name_one_more(request: Any, old: str) -> None:
    """The request's next token is of the version `old`."""
    from sglang.srt.utils.weight_versions import WeightVersionEvent

    events, tokens = request.weight_version_events, len(request.output_ids)
    if events and events[-1].old_version == old and events[-1].num_output_tokens == tokens:
        events.pop()
    events.append(WeightVersionEvent(old_version=old, num_output_tokens=tokens + 1))


def renew_key(original: Callable[..., Any], scheduler: Any, received: Any, *args: Any, **kwargs: Any) -> Any:
    """Scheduler.handle_generate_request: whatever was its version when it was sent, it is computed under this one."""
    from sglang.srt.runtime_context import get_serving

    if (received.extra_key or "").startswith(VERSION_KEY):
        received.extra_key = cache_key(get_serving().weight_version)
    return original(scheduler, received, *args, **kwargs)


def send_back_half_read(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """Scheduler.pause_generation: a prompt of which a part has been read is aborted, and has not begun."""
    if request.mode == "in_place" and scheduler.chunked_req is not None:
        scheduler._pending_chunked_abort_req = scheduler.chunked_req
    return original(scheduler, request)


def keep_routes(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """release_req: keys and values of a request are dropped, and will be computed again."""
    from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

    request, capturer = kwargs["req"], get_global_experts_capturer()
    if request.return_routed_experts and capturer is not None and request.output_ids and not request.finished():
        rows = capturer.get_topk(
            req_pool_idx=request.kv.req_pool_idx,
            seqlen=len(request.origin_input_ids) + len(request.output_ids),
            req_to_token_pool=kwargs["req_to_token_pool"],
            start_len=request.routed_experts_start_len,
        )
        _put_back(request, rows)
        request.routes_of_sampling = rows
    return original(*args, **kwargs)


def put_routes_back(result: Any, processor: Any, request: Any) -> Any:
    """_maybe_collect_routed_experts: the routes of a request that has ended."""
    if request.routed_experts is not None:
        _put_back(request, request.routed_experts)
    return result


def _put_back(request: Any, rows: Any) -> None:
    """Rows of passes that sampled over those that were computed again."""
    kept = getattr(request, "routes_of_sampling", None)
    if kept is not None:
        rows[: len(kept)] = kept[: len(rows)]


def end_by_itself(original: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    """Req.update_finish_state: an answer whose last token came with an abort has ended as if there had been none."""
    abort = request.to_finish
    if abort is None or getattr(abort, "status_code", None) is not None or not request.output_ids:
        return original(request, *args, **kwargs)
    request.to_finish = None
    result = original(request, *args, **kwargs)
    if request.finished():
        return result
    request.to_finish = abort
    return original(request, *args, **kwargs)
