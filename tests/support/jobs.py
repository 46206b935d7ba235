"""What the trainer tests run on each rank, and the samples they run it on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_ext.batch.layout import Sample
from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.parts import merge_routing, merge_tokens, merge_update
from tests.support.ranks import run_ranks

LAYERS, EXPERTS, TOPK, SAMPLES = 4, 8, 2, 12


def make_samples(
    *, routes: bool, vocab_size: int = 512, without_routes: tuple[int, ...] = (), experts: int = EXPERTS
) -> list[Sample]:
    """Prompts of 3 to 8 and responses of 1 to 16 random tokens, each with a weight, with random routes if asked."""
    tokens, route = np.random.default_rng(0), np.random.default_rng(1)
    out = []
    for i in range(SAMPLES):
        prompt, response = int(tokens.integers(3, 9)), int(tokens.integers(1, 17))
        ids = tokens.integers(0, vocab_size, prompt + response).astype(np.int32)
        rows = np.argsort(route.random((len(ids) - 1, LAYERS, experts)), -1)[..., :TOPK].astype(np.uint8)
        values: dict[str, Any] = {"weight": float(tokens.normal())}
        out.append(Sample(ids, prompt, values, rows if routes and i not in without_routes else None))
    return out


def weighted_likelihood(batch):
    """A loss with a denominator of its own, and a mean, a sum and a max to reduce."""
    import torch

    per_sequence = -(batch.quantities[0] * batch.mask).sum(1) * torch.tensor([row["weight"] for row in batch.rows])
    lengths = batch.mask.sum(1)
    metrics = {
        "length": (float(lengths.sum()), float(len(lengths)), "mean"),
        "sequences": (float(len(lengths)), 0.0, "sum"),
        "longest": (float(lengths.max()), 0.0, "max"),
    }
    return per_sequence.sum() / SAMPLES, metrics


def keep_gradients(network) -> None:
    """From now on a step leaves the weights as they are and the reduced gradients where they are."""
    network.optimizer.step = lambda: (True, 0.0, None)


def whole_gradients(network) -> dict[str, np.ndarray]:
    """The gradients of the last step under Hugging Face names (a value head's under its own), whole on rank 0."""
    import torch
    import torch.distributed as dist

    from megatron_ext.hf.export import HFExporter

    for model in network.models:  # a distributed optimizer has reduced each rank's shard of a bucket, no more
        for buffer in (*model.buffers, *model.expert_parallel_buffers):
            group = buffer.data_parallel_group
            if group.size() > 1:
                for bucket in buffer.buckets:
                    shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)
    if not hasattr(network, "gradients"):  # an exporter of the gradients' own memory, which stays where it is
        network.gradients = HFExporter(network.chunks, network.model, value_head=network.head == "value")
        network.gradients.parameters = [
            (n, torch.nn.Parameter(p.main_grad if p.requires_grad else torch.zeros_like(p)), m)  # a router's bias
            for n, p, m in network.gradients.parameters
        ]
    stream = network.gradients.stream(everywhere=False)
    out = {name: tensor.numpy().copy() for bucket in stream for name, tensor in bucket}
    if network.head == "value" and network.chunks[-1].post_process:
        out["value_head"] = network.chunks[-1].output_layer.weight.main_grad.numpy().copy()
    return out


@dataclass(frozen=True)
class Outcome:
    """Joined answers of all ranks to: log-probs, one update, log-probs again, the weights."""

    before: np.ndarray
    after: np.ndarray
    routing: np.ndarray
    update: dict[str, float]
    weights: dict[str, np.ndarray]


def one_update(config: ParallelConfig, model: str, trainer: TrainerConfig, samples: list[Sample], replay: bool):
    """Runs on a rank."""
    import torch

    from megatron_ext.trainer import Trainer

    it = Trainer(model, config, trainer, OptimizerConfig(lr=1e-3), replay=replay)
    before, update, after = it.logprobs(samples), it.update(samples, weighted_likelihood), it.logprobs(samples)
    weights = {name: tensor.numpy().copy() for bucket in it.export() for name, tensor in bucket}
    return before, update, after, weights if torch.distributed.get_rank() == 0 else {}


def joined(parts, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs of all samples, one after another, and routing counts by layer, of all ranks' parts."""
    return np.concatenate(merge_tokens(parts, count)[0]), merge_routing(parts)


def outcome(config: ParallelConfig, model: str, trainer: TrainerConfig, samples: list[Sample], replay: bool) -> Outcome:
    """`one_update` on all ranks of a layout."""
    answers = run_ranks(one_update, config, str(model), trainer, samples, replay)
    before, routing = joined([a[0] for a in answers], len(samples))
    after, _ = joined([a[2] for a in answers], len(samples))
    update = merge_update([a[1] for a in answers])
    return Outcome(before, after, routing, update, answers[0][3])
