"""What a server receives of several senders at once: one bucket each, by the group of each.

SGLang (0.5.23) takes one broadcast a request, and one request after another. Requests of several senders would reach
two servers in different orders, and each would wait in a broadcast for the other; or one sender at a time would send.
So one request names the tensors of all, and here all broadcasts of it begin before one is waited for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any


def install() -> None:
    """Register the hook; call while SGLang loads its plugins."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    updater = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
    HookRegistry.register(f"{updater}.receive_weights_from_distributed", receive, HookType.AROUND)


def receive(original: Callable[..., Any], updater: Any, **request: Any) -> Any:
    """WeightUpdater.receive_weights_from_distributed: group_name may be JSON of [[group, tensors], ...], and the names,
    dtypes and shapes are those of all senders, one after another."""
    if not request["group_name"].startswith("["):
        return original(updater, **request)
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    names, dtypes, shapes = (request[key] for key in ("names", "dtypes", "shapes"))
    buckets, works = [], []
    for group, part in parts(json.loads(request["group_name"])):
        bucket = FlattenedTensorBucket.empty(names[part], dtypes[part], shapes[part], updater.device)
        works.append(_begin(bucket.get_flattened_tensor(), updater._model_update_group[group]))
        buckets.append(bucket)
    for work in works:
        work.wait()
    return [pair for bucket in buckets for pair in bucket.reconstruct_tensors()]


def parts(groups: Sequence[tuple[str, int]]) -> list[tuple[str, slice]]:
    """(group, where its tensors stand among those of all) of each sender."""
    out, end = [], 0
    for group, tensors in groups:
        out.append((group, slice(end, end + tensors)))
        end += tensors
    return out


def _begin(flat: Any, group: Any) -> Any:
    import torch.distributed as dist

    return dist.broadcast(flat, src=0, group=group, async_op=True)
