"""The trainer: log-probs of samples, an update on samples, the weights as a stream. One instance a rank.

Every rank calls every method together, with the same samples; each works on its share and returns its part. Parts of
all ranks are joined by the functions of `parts`, which need no process group.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext import cpu, parallel
from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.hf.config import model_shape, read_hf_config
from megatron_ext.hf.export import Bucket, HFExporter
from megatron_ext.hf.load import load_hf
from megatron_ext.layout import Sample, TokenLayout, pad_values, plan_micro_batches, response_mask
from megatron_ext.logprobs import vocab_parallel_logprobs
from megatron_ext.mcore import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    PackedSeqParams,
    finalize_model_grads,
    get_forward_backward_func,
    get_megatron_optimizer,
    parallel_state,
)
from megatron_ext.mcore import OptimizerConfig as McoreOptimizerConfig
from megatron_ext.model import build_model
from megatron_ext.parts import LogprobPart, Metrics, UpdatePart, add_metrics
from megatron_ext.replay import ChunkReplay, replaying


@dataclass(frozen=True)
class LossBatch:
    """Whole sequences of one micro-batch, as the loss sees them.

    current_logprobs: [samples, tokens] float32 with gradient, zero behind each response.
    entropy:          [samples, tokens] float32, without gradient.
    mask:             [samples, tokens] bool.
    values:           the samples' values: [samples, tokens] or [samples] float32.
    indices:          which samples of the call these are.
    """

    current_logprobs: Tensor
    entropy: Tensor
    mask: Tensor
    values: dict[str, Tensor]
    indices: tuple[int, ...]


LossFunction = Callable[[LossBatch], tuple[Tensor, Metrics]]
"""The share of the loss that these sequences have. Shares of all micro-batches and ranks add up to the loss."""


class _ContextGather(torch.autograd.Function):
    """[t] -> [cp, t]. Every context-parallel rank computes the same loss from the whole sequence, so the gradient of
    its own part is just that part: no sum over ranks."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.rank = group.rank()
        out = x.new_empty((group.size(), *x.shape))
        dist.all_gather_into_tensor(out.view(-1, *x.shape[1:]), x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, *grads):
        return grads[0][ctx.rank], None


@dataclass
class _MicroBatch:
    """A packed micro-batch on this rank's device, or padding that keeps the ranks in step (no indices)."""

    indices: tuple[int, ...]
    samples: tuple[Sample, ...]
    layout: TokenLayout
    tokens: Tensor
    labels: Tensor
    positions: Tensor
    packed: PackedSeqParams
    routes: Tensor | None
    counted: Tensor


class Trainer:
    """Megatron-Core model, optimizer and replay of this rank. Process groups must exist (`parallel.initialize`)."""

    def __init__(
        self,
        model_path: str | Path,
        parallel_config: ParallelConfig,
        config: TrainerConfig,
        optimizer: OptimizerConfig,
        *,
        replay: bool,
        temperature: float = 1.0,
        load_weights: bool = True,
    ):
        """Build and load a Hugging Face model directory.

        replay:       whether samples bring routes that the routers must take.
        temperature:  of every log-prob, the sampler's.
        Raises FileNotFoundError, UnsupportedModel, ValueError or KeyError where the model does not fit.
        """
        self.parallel, self.config, self.temperature = parallel_config, config, temperature
        self.hf = read_hf_config(model_path)
        self.shape = model_shape(self.hf, parallel_config.tensor)
        self.replay = replay and self.shape.num_experts > 0
        self.mcore_config, chunks = build_model(self.hf, parallel_config, config, replay=self.replay)
        self.replays = [ChunkReplay(c) for c in chunks] if self.replay else []
        if load_weights:
            load_hf(chunks, self.hf, self.shape, model_path)
        self.chunks = chunks
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.models = [
            DistributedDataParallel(config=self.mcore_config, ddp_config=ddp, module=c, disable_bucketing=i > 0)
            for i, c in enumerate(chunks)
        ]
        self.restart_optimizer(optimizer)
        self.exporter = HFExporter(self.chunks, self.hf, self.shape)
        self.device = torch.device("cpu") if cpu.needed() else torch.device("cuda", torch.cuda.current_device())

    def restart_optimizer(self, optimizer: OptimizerConfig) -> None:
        """Begin a phase of training: these settings, no moments, the step count at 0."""
        self.optimizer_config, self.steps = optimizer, 0
        self.optimizer = get_megatron_optimizer(
            McoreOptimizerConfig(
                optimizer="adam",
                lr=optimizer.lr,
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.beta1,
                adam_beta2=optimizer.beta2,
                adam_eps=optimizer.eps,
                clip_grad=optimizer.clip_grad,
                bf16=self.config.dtype == "bfloat16",
                params_dtype=self.mcore_config.params_dtype,
                use_distributed_optimizer=True,
            ),
            self.models,
        )
        self.mcore_config.finalize_model_grads_func = finalize_model_grads
        self.mcore_config.grad_scale_func = self.optimizer.scale_loss

    def logprobs(self, samples: Sequence[Sample]) -> LogprobPart:
        """log pi(token) and entropy of every response token under the current weights, without gradient.

        With replay on, samples with routes are routed by them, and agreement is counted."""
        seen = LogprobPart()

        def collect(batch: _MicroBatch, output: Tensor):
            if batch.indices:
                self._collect(seen, batch, *self._responses(batch, output))
            return output.new_zeros(()), {}

        with torch.no_grad(), replaying(self.replays):
            self._run(samples, collect, forward_only=True)
        self._take_counts(seen)
        return seen

    def update(self, samples: Sequence[Sample], loss: LossFunction) -> UpdatePart:
        """One optimizer step on all samples: forward, backward, reduction, clipping, Adam.

        The answer holds the log-probs that the loss saw, which are those of the weights before the step.
        A gradient that is not finite leaves the weights as they are: `skipped`.
        """
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        metrics: Metrics = {}
        seen = LogprobPart()

        def share(batch: _MicroBatch, output: Tensor):
            if not batch.indices:
                return output.sum() * 0.0, {}
            logprobs, entropy = self._responses(batch, output)
            self._collect(seen, batch, logprobs.detach(), entropy.detach())
            values = {name: pad_values(batch.samples, name).to(self.device) for name in batch.samples[0].values}
            mask = response_mask([s.response_length for s in batch.samples]).to(self.device)
            value, measured = loss(LossBatch(logprobs, entropy.detach(), mask, values, batch.indices))
            if parallel.is_reporter():
                add_metrics(metrics, {"loss/objective": (float(value.detach()), 0.0, "sum")} | measured)
            return value, {}

        with replaying(self.replays):
            self._run(samples, share, forward_only=False)
        self._take_counts(seen)
        rate = self._set_rate()
        done, norm, _ = self.optimizer.step()
        self.steps += 1
        return UpdatePart(metrics, float(norm or 0.0), rate, not done, seen)

    def export(self) -> Iterator[Bucket]:
        """The weights under Hugging Face names, a bucket at a time. Every rank must walk it to the end."""
        return self.exporter.stream()

    @staticmethod
    def _collect(seen: LogprobPart, batch: _MicroBatch, logprobs: Tensor, entropy: Tensor) -> None:
        """Add a micro-batch's [samples, tokens] matrices, where this rank speaks for its replica."""
        if not parallel.is_reporter():
            return
        lengths = [s.response_length for s in batch.samples]
        for rows, matrix in ((seen.logprobs, logprobs), (seen.entropy, entropy)):
            for row, n, index in zip(matrix.cpu().numpy(), lengths, batch.indices, strict=True):
                rows[index] = row[:n].copy()

    def _take_counts(self, seen: LogprobPart) -> None:
        """Move the routers' counters into an answer."""
        for replay in self.replays:
            for layer, (replayed, agreed, fallen) in replay.take_counts().items():
                seen.routing[layer] = (int(replayed), int(agreed), int(fallen))

    def _set_rate(self) -> float:
        rate = self.optimizer_config.rate(self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _run(self, samples: Sequence[Sample], use: Callable, *, forward_only: bool) -> None:
        """All micro-batches of this data-parallel rank through Megatron's schedule."""
        plan = plan_micro_batches(
            [s.input_length for s in samples],
            token_budget=self.config.micro_batch_tokens,
            dp_size=parallel_state.get_data_parallel_world_size(),
            multiple_of=self.parallel.pipeline if self.parallel.virtual_pipeline else 1,
        )[parallel_state.get_data_parallel_rank()]
        batches = [self._pack(indices, samples) for indices in plan]
        # Exactly one denominator over all ranks and micro-batches: the loss brings its own, global one.
        first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        recompute = not forward_only and self.config.recompute != "none"

        def step(iterator: Iterator[tuple[int, _MicroBatch]], model):
            number, batch = next(iterator)
            chunk = model
            while hasattr(chunk, "module"):
                chunk = chunk.module
            replay = self.replays[chunk.vp_stage or 0] if self.replays else None
            if replay is not None and batch.routes is not None:
                replay.set(batch.routes, batch.counted, recompute=recompute)
            output = model(batch.tokens, batch.positions, None, packed_seq_params=batch.packed)
            if replay is not None and recompute:
                replay.switch_in_backward(output)
            if chunk.post_process:
                logprobs, entropy = vocab_parallel_logprobs(
                    output[0],
                    batch.labels,
                    vocab_size=self.shape.vocab_size,
                    group=parallel_state.get_tensor_model_parallel_group(),
                    temperature=self.temperature,
                )
                output = torch.stack([logprobs, entropy])
            return output, partial(finish, number, batch)

        def finish(number: int, batch: _MicroBatch, output: Tensor):
            value, measured = use(batch, output)
            return value, torch.tensor(int(first and number == 0), dtype=torch.int, device=self.device), measured

        iterators = [iter(list(enumerate(batches))) for _ in self.models]
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if len(self.models) > 1 else iterators[0],
            model=self.models if len(self.models) > 1 else self.models[0],
            num_microbatches=len(batches),
            seq_length=max(b.layout.total for b in batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _pack(self, indices: Sequence[int], samples: Sequence[Sample]) -> _MicroBatch:
        chosen = tuple(samples[i] for i in indices)
        # Ranks meet in collectives, so a rank without samples runs one padding sequence that nothing reads.
        lengths = tuple(s.input_length for s in chosen) or (1,)
        layout = TokenLayout(
            lengths,
            cp_size=parallel_state.get_context_parallel_world_size(),
            cp_rank=parallel_state.get_context_parallel_rank(),
            sequence_parallel_size=self.parallel.tensor if self.parallel.sequence else 1,
            sequence_parallel_rank=parallel_state.get_tensor_model_parallel_rank() if self.parallel.sequence else 0,
        )
        inputs = [s.tokens[:-1].astype(np.int64) for s in chosen] or [np.zeros(1, np.int64)]
        labels = [s.tokens[1:].astype(np.int64) for s in chosen] or [np.zeros(1, np.int64)]
        cu, longest = layout.cu_seqlens.to(self.device), max(layout.padded_lengths)
        counted = layout.slice_sequence(layout.is_token & bool(chosen))
        routes = self._routes(chosen, layout) if self.replay else None
        return _MicroBatch(
            indices=tuple(indices),
            samples=chosen,
            layout=layout,
            tokens=layout.slice_context(layout.pack(inputs)).to(self.device)[None],
            labels=layout.slice_context(layout.pack(labels)).to(self.device),
            positions=layout.slice_context(layout.positions).to(self.device)[None],
            packed=PackedSeqParams(
                qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=longest, max_seqlen_kv=longest
            ),
            routes=None if routes is None else routes.to(self.device),
            counted=counted.to(self.device),
        )

    def _routes(self, samples: Sequence[Sample], layout: TokenLayout) -> Tensor:
        """[this rank's tokens, layers, topk] int16, -1 where there is no row to replay."""
        width = (self.shape.num_layers, self.shape.topk)
        rows = []
        for n, sample in itertools.zip_longest(layout.lengths, samples):
            if sample is None or sample.routes is None:
                rows.append(np.full((n, *width), -1, np.int16))
                continue
            if sample.routes.shape[1:] != width:
                raise ValueError(f"routes of shape {sample.routes.shape} for {width[0]} layers, top {width[1]}")
            if width[1] > 1:
                ordered = np.sort(sample.routes[:, self.shape.moe_layers], -1)
                repeated = ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]
                if repeated.size:
                    raise ValueError(f"a route names expert {repeated[0]} twice for one token")
            rows.append(sample.routes.astype(np.int16))
        return layout.slice_sequence(layout.pack(rows, fill=-1))

    def _responses(self, batch: _MicroBatch, output: Tensor) -> tuple[Tensor, Tensor]:
        """[2, this rank's tokens] -> log-probs and entropy, [samples, longest response] each."""
        whole = []
        for part in output:
            group = parallel_state.get_context_parallel_group()
            parts = _ContextGather.apply(part, group) if group.size() > 1 else part[None]
            packed = batch.layout.merge_context(parts)
            whole.append(batch.layout.responses(packed, [s.response_length for s in batch.samples]))
        return whole[0], whole[1]
