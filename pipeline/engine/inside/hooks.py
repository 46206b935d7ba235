"""What SGLang 0.5.23 is taught in every server of this project, on GPUs too, through its own registry of hooks."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from typing import Any

from megatron_ext.meeting import tcp_store
from pipeline.engine.control import ALIVE, HELD_WEIGHTS
from pipeline.engine.inside import interruptions, intervals, joined_answers, many_groups, own_keys, shared_prompts
from pipeline.engine.inside.held_weights import held_checksums

KEYS = ("api_key", "admin_api_key")
HIDDEN = "***"


def install() -> None:
    """Register the hooks; call while SGLang loads its plugins."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    interruptions.install()
    many_groups.install()
    intervals.install()
    joined_answers.install()
    own_keys.install()
    shared_prompts.install()
    updater = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
    HookRegistry.register("sglang.srt.utils.weight_checker.WeightChecker.handle", tell_held, HookType.AROUND)
    HookRegistry.register(f"{updater}.update_weights_from_tensor", refuse, HookType.AROUND)
    bucket = "sglang.srt.weight_sync.tensor_bucket.FlattenedTensorBucket.reconstruct_tensors"
    HookRegistry.register(bucket, own_biases, HookType.AFTER)
    results = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
    HookRegistry.register(f"{results}._maybe_collect_routed_experts", narrow_routes, HookType.AROUND)
    HookRegistry.register("torch.distributed.rendezvous._create_c10d_store", listen_at_host, HookType.AROUND)
    # /server_info, its states of the schedulers, and the log show the first; the second is what an error shows.
    HookRegistry.register("sglang.srt.server_args.ServerArgs.resolved_dict", hide_keys, HookType.AFTER)
    HookRegistry.register("sglang.srt.server_args.ServerArgs.__repr__", without_keys, HookType.AROUND)


def tell_held(original: Callable[..., Any], checker: Any, action: str, *args: Any, **kwargs: Any) -> Any:
    """WeightChecker.handle: answers two more actions. ALIVE: nothing. HELD_WEIGHTS: skip_tensor_list is one text, JSON
    of [[name, dtype, shape], ...]; of no tensors, the answer has the names of all parameters."""
    if action == ALIVE:
        return None
    if action != HELD_WEIGHTS:
        return original(checker, action, *args, **kwargs)
    (text,) = kwargs["skip_tensor_list"]
    described, model = json.loads(text), checker._get_model()
    if described:
        found, reached = held_checksums(model, described)
        answer = {name: f"{elements} {value}" for name, (elements, value) in found.items()}
    else:
        answer, reached = {}, [name for name, _ in model.named_parameters()]
    return {
        "checksums": answer | {f"parameter {name}": "" for name in reached},
        "per_gpu_checksum": "",
        "parallelism_info": checker._parallelism_info(role=kwargs["role"]).model_dump(),
    }


def own_biases(tensors: list[tuple[str, Any]], *_: Any) -> list[tuple[str, Any]]:
    """FlattenedTensorBucket.reconstruct_tensors: biases are copies. All ranks of a server map one buffer, and SGLang's
    loader of gpt-oss zeroes `down_proj_bias` where it finds it on every rank but the first, which may not have read
    it yet."""
    return [(name, tensor.clone() if name.endswith("bias") else tensor) for name, tensor in tensors]


def narrow_routes(original: Callable[..., None], processor: Any, request: Any) -> None:
    """_maybe_collect_routed_experts: a request's routes leave the scheduler in the narrowest type that holds them, for
    SGLang's int32 is four times what most models need; the client tells by the number of bytes."""
    import torch

    original(processor, request)
    routes = request.routed_experts
    if routes is not None and routes.numel() and routes.min() >= 0:  # else the client says what is wrong with it
        request.routed_experts = routes.to(torch.uint8 if routes.max() < 256 else torch.int16)


def listen_at_host(original: Callable[..., Any], host: str, port: int, rank: int, ranks: int, *args: Any) -> Any:
    """The store where the server's ranks meet listens at its own address, see `meeting.py`."""
    if rank:
        return original(host, port, rank, ranks, *args)
    return tcp_store(host, port, rank=0, ranks=ranks, timeout=args[0])


def hide_keys(settings: dict[str, Any], *_: Any) -> dict[str, Any]:
    """ServerArgs.resolved_dict: without the keys that open the server; SGLang hides those of watermarks only."""
    return settings | {name: HIDDEN for name in KEYS if settings.get(name)}


def without_keys(original: Callable[..., str], server_args: Any) -> str:
    """ServerArgs.__repr__: the same."""
    text = original(server_args)
    for name in KEYS:
        if key := getattr(server_args, name):
            text = text.replace(key, HIDDEN)
    return text


def refuse(original: Callable[..., Any], updater: Any, request: Any) -> Any:
    """update_weights_from_tensor: a tensor that does not fit is an answer, as it is when it comes by a group; SGLang
    lets it end the server."""
    from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqOutput

    try:
        return original(updater, request)
    except Exception as error:
        traceback.print_exc()
        return UpdateWeightsFromTensorReqOutput(success=False, message=f"{type(error).__name__}: {error}")
