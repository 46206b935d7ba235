"""How much shared memory Ray's object store gets where a run starts Ray itself.

What lies there: the routes and tokens of a step, from their decoding until the trainer has them, beside those of the
steps that are sampled meanwhile.
"""

from __future__ import annotations

import shutil

import numpy as np

from megatron_ext.batch.routes import route_dtype
from megatron_ext.hf.description import ModelDescription
from pipeline.config import Config

LEAST_GB = 0.5
_A_TOKEN = 32  # bytes: id, log-prob, version, mask and what the loss reads


def object_store_gb(config: Config, model: ModelDescription) -> float:
    """GB, as ClusterConfig.object_store_gb says."""
    if config.cluster.object_store_gb is not None:
        return config.cluster.object_store_gb
    routed = config.replay.of_model(model.num_experts).any
    routes = model.num_layers * model.topk * np.dtype(route_dtype(model.num_experts)).itemsize if routed else 0
    answers = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    tokens = answers * (config.data.max_prompt_tokens + config.longest_rollout)
    needed = (2 + config.rollout.max_staleness) * tokens * (routes + _A_TOKEN) / 1e9
    return max(LEAST_GB, min(needed, shutil.disk_usage("/dev/shm").free / 2e9))
