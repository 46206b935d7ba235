"""One model of this rank: its chunks, its optimizer, its routers' replay, and samples through Megatron's schedule.

The trainer holds up to three: the policy, a frozen reference of it, and a critic. Each has a TransformerConfig and a
replay of its own, so that nothing of one is ever seen by another.
"""

from __future__ import annotations

import contextlib
import gc
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext import cpu
from megatron_ext.batch.layout import Sample, TokenLayout, plan_micro_batches
from megatron_ext.batch.micro_batch import MicroBatch, make_micro_batch
from megatron_ext.batch.replay import ChunkReplay, replaying
from megatron_ext.config import LoraConfig, OptimizerConfig, ParallelConfig, TrainerConfig, TrainerPrecision
from megatron_ext.hf.description import ModelDescription
from megatron_ext.hf.load import load_hf
from megatron_ext.logprobs.head import logprob_head
from megatron_ext.lora.attach import attach
from megatron_ext.lora.origin import Origin, origin_of
from megatron_ext.mcore import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
    get_forward_backward_func,
    get_fp8_align_size,
    get_megatron_optimizer,
    parallel_state,
)
from megatron_ext.mcore import OptimizerConfig as McoreOptimizerConfig
from megatron_ext.model.build import build_model
from megatron_ext.model.kv_cache import round_key_values
from megatron_ext.parts import RecordedRoutes

Routing = Literal["native", "record", "replay"]
Use = Callable[[MicroBatch, tuple[Tensor, ...]], tuple[Tensor, Any]]
"""What becomes of a micro-batch: from [samples, longest response] matrices to this rank's share of the loss, and
anything. For a policy the matrices are log-probs and entropies, and in an update those of named tokens, [samples,
longest response, k], where samples name some; for a critic values."""


_OFFLOADED: dict[str, Any] = {
    "optimizer_cpu_offload": True,
    "optimizer_offload_fraction": 1.0,
    "overlap_cpu_optimizer_d2h_h2d": True,
    "use_precision_aware_optimizer": True,  # else float32 weights would stay on the GPU beside those of the CPU
}


def _infinite_where_not_finite(measure: Callable[[], Any]) -> float:
    """A gradient's norm. Megatron-Core (0.19.2) looks for a NaN only where it scales the loss. Else a NaN is above no
    threshold and goes into every weight; what is infinite is above the largest number."""
    norm = float(measure())
    return norm if math.isfinite(norm) else math.inf


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


class Network:
    """A model on this rank. Process groups must exist (`parallel.initialize`)."""

    def __init__(
        self,
        model: ModelDescription,
        parallel_config: ParallelConfig,
        config: TrainerConfig,
        precision: TrainerPrecision,
        *,
        head: Literal["lm", "value"] = "lm",
        trainable: bool = True,
        replay: bool = False,
        lora: LoraConfig | None = None,
        seed: int = 0,
    ):
        """Build it, with random weights.

        head:        "lm" gives log-probs and entropies of tokens, "value" one number a token.
        trainable:   whether it has gradients; then `restart_optimizer` before the first step.
        replay:      whether its routers can record and replay routes.
        lora:        train adapters in its place, which begin as `seed` says; None: train it.
        Raises UnsupportedModel, LoraError or ValueError where the model cannot be built so.
        """
        self.model, self.parallel, self.config, self.lora = model, parallel_config, config, lora
        self.head, self.trainable, self.precision = head, trainable, precision
        self.label_shift = 0  # anything else is a diagnosis' doing
        self.origin: Origin | None = None  # of adapters, once the model is loaded
        self.mcore_config, self.chunks = build_model(
            model, parallel_config, config, precision, head=head, replay=replay
        )
        round_key_values(self.chunks, precision.kv_cache)
        if lora is not None:
            attach(self.chunks, model, lora, seed=seed, value_head=head == "value")
        self.replays = [ChunkReplay(c, config.replay_floor) for c in self.chunks] if replay else []
        self.models: list[Any] = list(self.chunks)
        if trainable:
            ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
            self.models = [
                DistributedDataParallel(config=self.mcore_config, ddp_config=ddp, module=c, disable_bucketing=i > 0)
                for i, c in enumerate(self.chunks)
            ]
        self.optimizer: Any = None
        self.device = torch.device("cpu") if cpu.needed() else torch.device("cuda", torch.cuda.current_device())

    def load(self, path: str | Path) -> None:
        """The weights of a Hugging Face directory; a value head has none and keeps its own. Errors as in load_hf."""
        load_hf(self.chunks, self.model, path, value_head=self.head == "value")
        if self.lora is not None:
            self.origin = origin_of(Path(path), self.lora)

    @torch.no_grad()
    def copy_from(self, other: Network) -> None:
        """The weights of another network of the same shape and layout."""
        for mine, theirs in zip(self.chunks, other.chunks, strict=True):
            for tensors in ("parameters", "buffers"):  # a router's bias is a buffer
                for a, b in zip(getattr(mine, tensors)(), getattr(theirs, tensors)(), strict=True):
                    if a.data_ptr() != b.data_ptr():
                        a.copy_(b)

    @torch.no_grad()
    def share(self, other: Network) -> None:
        """What is frozen here becomes that of another network of the same layout, in the same memory."""
        for mine, theirs in zip(self.chunks, other.chunks, strict=True):
            parameters, buffers = dict(theirs.named_parameters()), dict(theirs.named_buffers())
            for name, parameter in mine.named_parameters():
                if not parameter.requires_grad:
                    parameter.data = parameters[name].data
            for name, buffer in mine.named_buffers():
                buffer.copy_(buffers[name])

    def restart_optimizer(self, optimizer: OptimizerConfig) -> None:
        """Begin a phase of training: these settings, no moments, the step count at 0."""
        self.optimizer_config, self.steps = optimizer, 0
        self._drop_optimizer()
        self.optimizer = get_megatron_optimizer(
            McoreOptimizerConfig(
                optimizer="adam",
                lr=optimizer.lr,
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.beta1,
                adam_beta2=optimizer.beta2,
                adam_eps=optimizer.eps,
                clip_grad=optimizer.clip_grad,
                bf16=self.precision.weights == "bfloat16",
                params_dtype=self.mcore_config.params_dtype,
                use_distributed_optimizer=True,
                **(_OFFLOADED if self.config.offload_optimizer else {}),
            ),
            self.models,
        )
        self.mcore_config.finalize_model_grads_func = finalize_model_grads
        self.mcore_config.grad_scale_func = self.optimizer.scale_loss
        self.optimizer.get_grad_norm = partial(_infinite_where_not_finite, self.optimizer.get_grad_norm)

    @property
    def weight_tensors(self) -> Iterator[Tensor]:
        """Parameters and buffers."""
        for chunk in self.chunks:
            yield from chunk.parameters()
            yield from chunk.buffers()

    @property
    def optimizer_tensors(self) -> Iterator[Tensor]:
        """What the optimizer holds, and the weights where it updates these themselves; nothing before it was begun."""
        parts = getattr(self.optimizer, "chained_optimizers", [self.optimizer] if self.optimizer else [])
        for inner in (part.optimizer for part in parts if not part.is_stub_optimizer):
            for group in inner.param_groups:
                yield from group["params"]
            for state in inner.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))

    @property
    def gradient_buffers(self) -> Iterator[Tensor]:
        """Megatron-Core's buffers of them; a step begins by zeroing these."""
        for model in self.models if self.trainable else ():
            yield from (buffer.grad_data for buffer in model.buffers + model.expert_parallel_buffers)

    def _drop_optimizer(self) -> None:
        """Of two there would be float32 weights and moments twice."""
        self.optimizer = self.mcore_config.grad_scale_func = None
        gc.collect()  # its parts refer to each other

    def forward(self, samples: Sequence[Sample], use: Use, routing: Routing) -> RecordedRoutes:
        """Every sample through the model, without gradient. Returns what the routers recorded, if they were to."""
        with torch.no_grad():
            return self._run(samples, use, routing, forward_only=True)

    def step(
        self, samples: Sequence[Sample], use: Use, routing: Routing, skip_above: float = math.inf
    ) -> tuple[float, float, bool]:
        """Forward, backward, reduction, clipping, Adam: one optimizer step on all samples.

        Returns (gradient norm before clipping, learning rate, skipped: a gradient that is not finite, or whose norm is
        above `skip_above`, leaves the weights as they are)."""
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._run(samples, use, routing, forward_only=False)
        rate = self.optimizer_config.rate(self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for part in self.optimizer.chained_optimizers:
            part.config.grad_norm_skip_threshold = min(skip_above, sys.float_info.max)
        done, norm, _ = self.optimizer.step()
        self.steps += 1
        return float(norm) if norm is not None and math.isfinite(norm) else 0.0, rate, not done

    @property
    def recomputes_routers(self) -> bool:
        """Whether backward runs the routers a second time."""
        granularity, modules = self.mcore_config.recompute_granularity, self.mcore_config.recompute_modules or []
        return granularity == "full" or (granularity == "selective" and "moe" in modules)

    def _run(self, samples: Sequence[Sample], use: Use, routing: Routing, *, forward_only: bool) -> RecordedRoutes:
        """All micro-batches of this data-parallel rank through Megatron's schedule."""
        if routing != "native" and not self.replays:
            raise ValueError(f"a network built without replay cannot {routing} routes")
        batches = self.micro_batches(samples, replay=routing == "replay")
        # Exactly one denominator over all ranks and micro-batches: the loss brings its own, global one.
        first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        requeue = not forward_only and self.recomputes_routers
        recorded: list[dict[int, Tensor]] = [{} for _ in batches]

        def step(iterator: Iterator[tuple[int, MicroBatch]], model):
            number, batch = next(iterator)
            chunk = model
            while hasattr(chunk, "module"):
                chunk = chunk.module
            replay = self.replays[chunk.vp_stage or 0] if self.replays else None
            if replay is not None and routing == "replay":
                assert batch.routes is not None
                replay.set(batch.routes, batch.counted, recompute=requeue)
            elif replay is not None and routing == "record":
                replay.record()
            output = model(
                batch.tokens,
                batch.positions,
                None,
                packed_seq_params=batch.packed,
                output_processor=self._head(batch, learns=not forward_only),
            )
            if chunk.post_process and self.head == "value":
                output = (output.flatten().float(),)
            if replay is not None and routing == "replay" and requeue:
                for part in output if chunk.post_process else (output,):
                    replay.switch_in_backward(part)
            elif replay is not None and routing == "record":
                recorded[number] |= replay.take_recorded()
            return output, partial(finish, number, batch)

        def finish(number: int, batch: MicroBatch, output: tuple[Tensor, ...]):
            if batch.indices:
                value, measured = use(batch, self._responses(batch, output))
            else:
                value, measured = output[0].sum() * 0.0, {}
            return value, torch.tensor(int(first and number == 0), dtype=torch.int, device=self.device), measured

        iterators = [iter(list(enumerate(batches))) for _ in self.models]
        with replaying(self.replays) if self.replays else contextlib.nullcontext():
            get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=iterators if len(self.models) > 1 else iterators[0],
                model=self.models if len(self.models) > 1 else self.models[0],
                num_microbatches=len(batches),
                seq_length=max(b.layout.total // b.layout.rows for b in batches),
                micro_batch_size=max(b.layout.rows for b in batches),
                forward_only=forward_only,
            )
        return self._gather_recorded(batches, recorded) if routing == "record" else {}

    def micro_batches(self, samples: Sequence[Sample], *, replay: bool) -> list[MicroBatch]:
        """This data-parallel rank's share of the samples, as many micro-batches as every other rank has.

        Raises ValueError for a sample that is too long for what is built of the model.
        """
        if why := self.model.too_long(max((s.input_length for s in samples), default=0)):
            raise ValueError(f"{why}; leave out what is longer")
        plan = plan_micro_batches(
            [s.input_length for s in samples],
            token_budget=self.config.micro_batch_tokens,
            dp_size=parallel_state.get_data_parallel_world_size(),
            multiple_of=self.parallel.pipeline if self.parallel.virtual_pipeline else 1,
        )[parallel_state.get_data_parallel_rank()]
        batches = []
        for indices in plan:
            layout = TokenLayout(
                tuple(samples[i].input_length for i in indices) or (1,),
                cp_size=parallel_state.get_context_parallel_world_size(),
                cp_rank=parallel_state.get_context_parallel_rank(),
                sequence_parallel_size=self.parallel.tensor if self.parallel.sequence else 1,
                sequence_parallel_rank=parallel_state.get_tensor_model_parallel_rank() if self.parallel.sequence else 0,
                packed=self.config.packing,
                align=get_fp8_align_size(self.mcore_config.fp8_recipe) if self.mcore_config.fp8 else 1,
            )
            routed = self.model if replay else None
            batches.append(make_micro_batch(indices, samples, layout, self.device, routed, self.label_shift))
        return batches

    def _head(self, batch: MicroBatch, *, learns: bool) -> Callable[..., tuple[Tensor, ...]] | None:
        """What the last stage answers in place of logits. learns: a loss reads it."""
        if self.head == "value":
            return None
        return logprob_head(
            batch.labels,
            vocab_size=self.model.vocab_size,
            temperature=self.precision.temperature,
            head=self.precision.head,
            kept=batch.kept,
            named=batch.named if learns else None,
            answered=batch.answered,
        )

    def _responses(self, batch: MicroBatch, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """[this rank's tokens] each -> [samples, longest response] each, whole on every context rank."""
        group = parallel_state.get_context_parallel_group()
        lengths = [s.response_length for s in batch.samples]
        whole = []
        for part in output:
            parts = _ContextGather.apply(part, group) if group.size() > 1 else part[None]
            whole.append(batch.layout.responses(batch.layout.merge_context(parts), lengths))
        return tuple(whole)

    def _gather_recorded(self, batches: list[MicroBatch], recorded: list[dict[int, Tensor]]) -> RecordedRoutes:
        """Routes of whole samples from the parts of the sequence- and context-parallel ranks."""
        out: RecordedRoutes = {}
        sequence = parallel_state.get_tensor_model_parallel_group() if self.parallel.sequence else None
        for batch, layers in zip(batches, recorded, strict=True):
            if not layers:
                continue  # a pipeline stage of dense layers
            part = torch.stack([layers[layer] for layer in sorted(layers)], 1).to(torch.int16)
            for group in (sequence, parallel_state.get_context_parallel_group()):
                size = 1 if group is None else group.size()
                whole = part.new_empty((size, *part.shape))
                # int16 is no type that every backend gathers; bytes are.
                if size > 1:
                    dist.all_gather_into_tensor(
                        whole.view(torch.uint8).flatten(), part.view(torch.uint8).flatten(), group
                    )
                part = whole if size > 1 else part[None]
            rows = batch.layout.merge_sequence(part).cpu().numpy()
            for index, start, n in zip(batch.indices, batch.layout.starts, batch.layout.lengths, strict=False):
                out[index] = (tuple(sorted(layers)), rows[start : start + n].copy())
        return out
