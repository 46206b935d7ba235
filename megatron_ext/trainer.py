"""The trainer: log-probs of samples, updates on samples, the weights as a stream. One instance a rank.

Every rank calls every method together, with the same samples; each works on its share and returns its part. Parts of
all ranks are joined by the functions of `parts`, which need no process group.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_ext import parallel
from megatron_ext.batch.layout import Sample, trained_mask
from megatron_ext.batch.micro_batch import MicroBatch
from megatron_ext.checkpoint import training
from megatron_ext.checkpoint.staged_save import StagedSave
from megatron_ext.checkpoint.training import Networks
from megatron_ext.config import LoraConfig, OptimizerConfig, ParallelConfig, TrainerConfig, TrainerPrecision
from megatron_ext.exchange import Exchange, exchanged
from megatron_ext.finite import first_output_not_finite, parameters_not_finite
from megatron_ext.hf.bucket import Bucket
from megatron_ext.hf.description import read_description
from megatron_ext.hf.export import HFExporter
from megatron_ext.host_copy import HostCopy, storages
from megatron_ext.lora.attach import merging
from megatron_ext.network import Network, Routing
from megatron_ext.parts import Metrics, NotFinite, TokenPart, UpdatePart, add_metrics


@dataclass(frozen=True)
class LossBatch:
    """Whole sequences of one micro-batch, as the loss sees them.

    quantities: [samples, tokens] float32 each with gradient, zero behind each response: for a policy its log-probs and
                its entropies, and [samples, tokens, k] of `Sample.named` where there are any; for a critic its values.
    mask:       [samples, tokens] bool: the tokens that the loss counts.
    rows:       `Sample.row` of each.
    indices:    which samples of the call these are.
    """

    quantities: tuple[Tensor, ...]
    mask: Tensor
    rows: tuple[Any, ...]
    indices: tuple[int, ...]


LossFunction = Callable[[LossBatch], tuple[Tensor, Metrics]]
"""The share of the loss that these sequences have. Shares of all micro-batches and ranks add up to the loss."""


_FULL = TrainerPrecision()


class Trainer:
    """The policy on this rank, and where asked for a frozen reference of it, a teacher and a critic beside it. Process
    groups must exist (`parallel.initialize`)."""

    def __init__(
        self,
        model_path: str | Path,
        parallel_config: ParallelConfig,
        config: TrainerConfig,
        optimizer: OptimizerConfig,
        *,
        replay: bool,
        precision: TrainerPrecision = _FULL,
        critic: OptimizerConfig | None = None,
        reference: bool = False,
        teacher: str | Path | None = None,
        load_weights: bool = True,
        lora: LoraConfig | None = None,
        seed: int = 0,
    ):
        """Build and load a Hugging Face model directory.

        replay:      whether the policy's routers can record routes and take those that samples bring.
        precision:   what it computes with; its temperature is the sampler's.
        critic:      train a value model with this optimizer: the same model, its LM head replaced by a value head.
        reference:   hold a frozen copy of the policy; `keep_reference` says of when.
        load_weights: else they are random, until `resume`.
        lora:        train adapters on the frozen model, which all that is held here has in common; None: train it.
        seed:        of the adapters.
        teacher:     hold the model of this directory too, frozen, in the same layout. No checkpoint has it.
        Raises FileNotFoundError, UnsupportedModel, ValueError or KeyError where the model does not fit.
        """
        model = read_description(model_path)

        def network(**kind) -> Network:
            built = Network(model, parallel_config, config, precision, lora=lora, seed=seed, **kind)
            if lora is not None and hasattr(self, "policy"):
                built.share(self.policy)
            elif load_weights or lora is not None:  # no checkpoint of adapters has the model
                built.load(model_path)
            return built

        self.policy = network(replay=replay and model.num_experts > 0)
        self.policy.restart_optimizer(optimizer)
        self.reference = network(trainable=False) if reference else None
        self.teacher = None
        if teacher is not None:
            self.teacher = Network(read_description(teacher), parallel_config, config, precision, trainable=False)
            self.teacher.load(teacher)
        self.critic = network(head="value") if critic is not None else None
        if self.critic is not None and critic is not None:
            self.critic.restart_optimizer(critic)
        self.exporter = HFExporter(self.policy.chunks, model, values=merging(self.policy.chunks, model))
        device = self.policy.device
        self._host = {"weights": HostCopy(device), "optimizer": HostCopy(device)}

    def restart_optimizer(self, optimizer: OptimizerConfig) -> None:
        """Begin a phase of the policy's training: these settings, no moments, the step count at 0."""
        self.policy.restart_optimizer(optimizer)

    def keep_reference(self) -> None:
        """The reference becomes the policy as it is now."""
        assert self.reference is not None
        self.reference.copy_from(self.policy)

    def logprobs(
        self, samples: Sequence[Sample], routing: Routing | None = None, exchange: Exchange | None = None
    ) -> TokenPart:
        """log pi(token) and entropy of every response token under the current weights, without gradient.

        routing: "replay" routes samples by their routes and counts agreement, "record" returns the routes that were
        taken, "native" does neither. None: "replay" where the trainer was built for it.
        exchange: parts of the computation to exchange for this once."""
        with exchanged(self.policy, exchange or Exchange()):
            return self._measure(self.policy, samples, routing or self._routing)

    def reference_logprobs(self, samples: Sequence[Sample]) -> TokenPart:
        """The same under the reference, which routes natively: its routes are part of what it says."""
        assert self.reference is not None
        return self._measure(self.reference, samples, "native")

    def teacher_logprobs(self, samples: Sequence[Sample]) -> TokenPart:
        """The same under the teacher, by routes of its own."""
        assert self.teacher is not None
        return self._measure(self.teacher, samples, "native")

    def values(self, samples: Sequence[Sample]) -> TokenPart:
        """The critic's value before every response token, without gradient."""
        assert self.critic is not None
        return self._measure(self.critic, samples, "native")

    def not_finite(self, samples: Sequence[Sample]) -> list[NotFinite]:
        """This rank's weights that are not finite, and of a forward pass of the policy the first output that is not."""
        found = first_output_not_finite(self.policy, samples, self._routing)
        return [*self.weights_not_finite(), *([] if found is None else [found])]

    def weights_not_finite(self) -> list[NotFinite]:
        """Of this rank's parts of the policy and of all models beside it; from any thread. Nothing is said while they
        are on the host."""
        if self._host["weights"].away:
            return []
        beside = {"critic": self.critic, "reference": self.reference, "teacher": self.teacher}
        return parameters_not_finite(self.policy) + [
            replace(found, name=f"{found.name} of the {whose}")
            for whose, network in beside.items()
            if network is not None
            for found in parameters_not_finite(network)
        ]

    def update(self, samples: Sequence[Sample], loss: LossFunction, skip_above: float = math.inf) -> UpdatePart:
        """One optimizer step of the policy on all samples: forward, backward, reduction, clipping, Adam.

        The answer holds the log-probs that the loss saw, which are those of the weights before the step.
        A gradient that is not finite, or whose norm is above `skip_above`, leaves the weights as they are: `skipped`.
        """
        return self._update(self.policy, samples, loss, self._routing, skip_above)

    def update_critic(self, samples: Sequence[Sample], loss: LossFunction) -> UpdatePart:
        """The same for the critic."""
        assert self.critic is not None
        return self._update(self.critic, samples, loss, "native")

    def export(self, *, everywhere: bool = True) -> Iterator[Bucket]:
        """The weights under Hugging Face names, a bucket at a time, on every rank or on rank 0 only. Every rank must
        walk it to the end."""
        return self.exporter.stream(everywhere=everywhere)

    def share(self, senders: Sequence[int]) -> Iterator[list[Bucket]]:
        """What this rank sends of the weights, see HFExporter.share. Every rank must walk it to the end."""
        return self.exporter.share(senders)

    def begin_save(self, path: Path) -> StagedSave:
        """Copy everything that resuming needs; a thread writes it into an empty directory that every rank sees."""
        return training.begin_save(path, self._networks)

    def resume(self, path: Path) -> None:
        """Become what the trainer was that saved, in whatever layout; see checkpoint.training.load."""
        training.load(path, self._networks)

    def release_memory(self, part: Literal["weights", "optimizer"]) -> None:
        """Move the weights of all models, or the states of all optimizers, to the host. Gradients go with the states
        and are not kept. Until `resume_memory` nothing that reads these may be called; of what is away already nothing
        happens."""
        if self._host[part].away:
            return
        networks = [network for _, network in self._networks.items()]
        networks += [] if self.teacher is None else [self.teacher]
        weights = [tensor for network in networks for tensor in network.weight_tensors]
        if part == "weights":
            self._host[part].take(weights)
        else:
            own = {storage._cdata for storage in storages(weights, self.policy.device)}
            moments = [t for n in networks for t in n.optimizer_tensors if t.untyped_storage()._cdata not in own]
            self._host[part].take(moments, dropped=[t for n in networks for t in n.gradient_buffers])
        if self.policy.device.type == "cuda":
            gc.collect()
            torch.cuda.ipc_collect()  # buckets that servers have read
            torch.cuda.empty_cache()

    def resume_memory(self, part: Literal["weights", "optimizer"]) -> None:
        """Everything of it as it was, gradients as zeros; nothing happens where it is there."""
        if self._host[part].away:
            self._host[part].give_back()

    @property
    def _networks(self) -> Networks:
        return Networks(self.policy, self.critic, self.reference)

    @property
    def _routing(self) -> Routing:
        return "replay" if self.policy.replays else "native"

    @staticmethod
    def _measure(network: Network, samples: Sequence[Sample], routing: Routing) -> TokenPart:
        seen: dict[int, tuple[Tensor, ...]] = {}

        def collect(batch: MicroBatch, quantities: tuple[Tensor, ...]):
            _collect(seen, batch, quantities)
            return quantities[0].new_zeros(()), {}

        routes = network.forward(samples, collect, routing)
        return _token_part(network, samples, seen, routes if parallel.is_reporter(any_stage=True) else {})

    @staticmethod
    def _update(
        network: Network,
        samples: Sequence[Sample],
        loss: LossFunction,
        routing: Routing,
        skip_above: float = math.inf,
    ) -> UpdatePart:
        metrics: Metrics = {}
        seen: dict[int, tuple[Tensor, ...]] = {}

        def share(batch: MicroBatch, quantities: tuple[Tensor, ...]):
            _collect(seen, batch, quantities[:2])
            mask = trained_mask(batch.samples).to(network.device)
            rows = tuple(sample.row for sample in batch.samples)
            value, measured = loss(LossBatch(quantities, mask, rows, batch.indices))
            if parallel.is_reporter():
                add_metrics(metrics, {"loss/objective": (float(value.detach()), 0.0, "sum")} | measured)
            return value, {}

        norm, rate, skipped = network.step(samples, share, routing, skip_above)
        return UpdatePart(metrics, norm, rate, skipped, _token_part(network, samples, seen, {}))


def _collect(seen: dict[int, tuple[Tensor, ...]], batch: MicroBatch, quantities: tuple[Tensor, ...]) -> None:
    """Keep a micro-batch's [samples, tokens] matrices, where this rank speaks for its replica."""
    if parallel.is_reporter():
        rows = zip(*(q.detach().cpu().unbind() for q in quantities), strict=True)
        seen |= dict(zip(batch.indices, rows, strict=True))


def _token_part(network: Network, samples: Sequence[Sample], seen: dict[int, tuple[Tensor, ...]], routes) -> TokenPart:
    kinds = len(next(iter(seen.values()), ()))
    quantities = tuple(
        {i: rows[k][: samples[i].response_length].numpy().copy() for i, rows in seen.items()} for k in range(kinds)
    )
    routing = {layer: counts for replay in network.replays for layer, counts in replay.take_counts().items()}
    return TokenPart(quantities, routing, routes)
