"""The nearest layout that fits: sizes of the trainer and of a server are varied, the nearest to the given one wins.

Nearness counts what has to change: a factor of two in the number of nodes counts most, since it is money, then
recomputation or a smaller micro-batch, which cost time, then how a model is divided, which costs little.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from megatron_ext.hf.description import ModelDescription
from pipeline.config import Config
from pipeline.plan.plan import Plan, make_plan

_TIMES_NODES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Proposal:
    """overrides: for the command line. plan: what they lead to."""

    overrides: tuple[str, ...]
    plan: Plan


def nearest(plan: Plan, mean_response: float | None = None) -> Proposal | None:
    """The nearest layout that fits on the same kind of GPU, or None where none of those looked at does."""
    within, spanning = _server_sizes(plan.config, plan.model)
    servers = [t for t in within if _server_fits(plan, t, mean_response)]
    servers = servers or [t for t in spanning if _server_fits(plan, t, mean_response)]
    variants = sorted(_variants(plan.config, plan.model, servers, _contexts(plan)), key=lambda v: v[0])
    for _, config in variants:
        try:
            candidate = make_plan(config, plan.model, plan.gpu.name, mean_response=mean_response, quick=True)
        except ValueError:  # the model does not divide into this one
            continue
        if candidate.fits:
            whole = make_plan(config, plan.model, plan.gpu.name, mean_response=mean_response)
            return Proposal(tuple(differences(plan.config, config)), whole)
    return None


def _server_sizes(config: Config, model: ModelDescription) -> tuple[list[int], list[int]]:
    """(On one machine, on several): GPUs of a server."""
    least, machine = config.server.tensor_parallel, config.cluster.gpus_per_node
    several = [machine * n for n in (2, 4, 8) if not config.cluster.colocated and model.heads % (machine * n) == 0]
    return [t for t in (1, 2, 4, 8) if least <= t <= machine], [t for t in several if least <= t]


def _server_fits(plan: Plan, gpus: int, mean_response: float | None) -> bool:
    """Whether so many GPUs hold the model and a sequence, which no other part of a layout changes."""
    server = plan.config.server.model_copy(update={"tensor_parallel": gpus})
    config = plan.config.model_copy(update={"server": server})
    return make_plan(config, plan.model, plan.gpu.name, mean_response=mean_response, quick=True).server.fits


def differences(old: Config, new: Config) -> Iterator[str]:
    """Overrides that lead from one configuration to the other."""
    for section in ("cluster", "parallel", "trainer", "server"):
        before, after = getattr(old, section), getattr(new, section)
        for name in type(before).model_fields:
            if getattr(before, name) != getattr(after, name):
                value = getattr(after, name)
                text = json.dumps(value) if value is None or isinstance(value, bool) else value  # 1 == True
                yield f"{section}.{name}={text}"


def _contexts(plan: Plan) -> list[int]:
    """Ranks that share a sequence: more where its activations are a large part of what a rank holds."""
    now = plan.config.parallel.context
    large = plan.memory.activations + plan.memory.head > plan.gpu.memory / 4
    return [now * times for times in ((1, 2, 4, 8) if large else (1,))]


def _variants(
    config: Config, model: ModelDescription, servers: list[int], contexts: list[int]
) -> Iterator[tuple[float, Config]]:
    old = config.parallel
    heads = math.gcd(model.heads, model.kv_heads)
    tensors = [t for t in (1, 2, 4, 8) if heads % t == 0]
    pipelines = [p for p in (1, 2, 4, 8, 16) if p <= model.num_layers]
    experts = [e for e in (1, 2, 4, 8, 16, 32, 64) if model.num_experts % e == 0] if model.moe_layers else [1]
    recomputes = [config.trainer.recompute] + (["full"] if config.trainer.recompute != "full" else [])
    shares = sorted({config.parallel.ranks / (config.cluster.nodes * config.cluster.gpus_per_node), 0.5, 0.75})
    offloads = [config.trainer.offload_optimizer] + (
        [True] if config.precision.weights == "bfloat16" and not config.trainer.offload_optimizer else []
    )
    for times, share, t, p, e, c, s, recompute, offload in itertools.product(
        _TIMES_NODES, shares, tensors, pipelines, experts, contexts, servers, recomputes, offloads
    ):
        nodes = config.cluster.nodes * times
        ranks = int(nodes * config.cluster.gpus_per_node * min(share, 1.0))
        if ranks < 1 or ranks % (t * p * c) or ranks % (e * p):
            continue
        cluster = {"nodes": nodes, "colocated": config.cluster.colocated and times == 1}  # turns are of one machine
        cost = (
            8 * math.log2(times)
            + 3 * (offload != config.trainer.offload_optimizer)
            + 2 * (recompute != config.trainer.recompute)
            + abs(math.log2(t / old.tensor))
            + abs(math.log2(p / old.pipeline))
            + 0.9 * abs(math.log2(c / old.context))
            + 0.5 * abs(math.log2(e / old.expert))
            + 0.5 * abs(math.log2(s / config.server.tensor_parallel))
            + abs(math.log2(ranks / old.ranks / times))
        )
        parallel = {
            "ranks": ranks,
            "tensor": t,
            "sequence": t > 1,
            "pipeline": p,
            "context": c,
            "expert": e,
            "expert_tensor": 1 if t > 1 else old.expert_tensor,
        } | _ends(model.num_layers, p)
        try:
            yield (
                cost,
                config.model_copy(
                    update={
                        "cluster": config.cluster.model_copy(update=cluster),
                        "parallel": type(old).model_validate(parallel),
                        "trainer": config.trainer.model_copy(
                            update={"recompute": recompute, "offload_optimizer": offload}
                        ),
                        "server": config.server.model_copy(update={"tensor_parallel": s}),
                    }
                ),
            )
        except ValidationError:
            continue


def _ends(layers: int, stages: int) -> dict[str, int]:
    """A last stage of its own size where the layers do not divide."""
    if layers % stages == 0:
        return {}
    last = layers - (stages - 1) * math.ceil(layers / stages)
    return (
        {"last_stage_layers": last} if last >= 1 else {"last_stage_layers": layers - (stages - 1) * (layers // stages)}
    )
