"""What one trainer rank holds, in bytes.

    weights      b a parameter                        b = 2 (bfloat16) or 4 (float32)
    gradients    4 a parameter, reduced in float32
    optimizer    12 a parameter in bfloat16 (float32 weights, two moments), 8 in float32 (two moments), divided among
                 the ranks that hold the same parameter (ZeRO stage 1, 1910.02054, section 5.1); offloaded, nothing on
                 the GPU and 16 in the machine's memory (the gradient is copied there)
    activations  what the layers of a stage keep for backward, for every micro-batch in flight: `p` of them on the first
                 of p stages, and (1 + (p-1)/(p v)) times that where stages are interleaved in v chunks (2205.05198,
                 section 4.2.3)

What a layer keeps is a sum of tensors, `kept_attention` and `kept_mlp`: 2205.05198's 34 H bytes a token, with the
attention matrix gone (an attention kernel keeps its output and one number a head), a gated MLP, grouped-query or latent
attention, and k experts a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_ext.config import LoraConfig, ParallelConfig, TrainerConfig, TrainerPrecision
from megatron_ext.hf.description import ModelDescription
from megatron_ext.logprobs.sizes import TILE, kept_scores
from pipeline.plan.counts.adapters import trained_count
from pipeline.plan.counts.parameters import Count, rank_count, stage_layers
from pipeline.plan.hardware import EFFICIENCY, Efficiency


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. host: in the machine's memory. others: all that reference, teacher and critic hold. routes:
    that are replayed."""

    weights: float
    gradients: float
    optimizer: float
    others: float
    activations: float
    head: float
    overhead: float
    host: float
    stage: int
    routes: float = 0.0

    @property
    def total(self) -> float:
        engines = self.weights + self.gradients + self.optimizer + self.others
        return engines + self.activations + self.routes + self.head + self.overhead

    def by_name(self) -> dict[str, float]:
        """The bytes on the device, by the names of `sameroute plan --json`."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "reference_and_critic": self.others,
            "activations": self.activations,
            "routes": self.routes,
            "lm_head": self.head,
            "overhead": self.overhead,
            "total": self.total,
        }


def item_bytes(precision: TrainerPrecision) -> int:
    """Of a weight or an activation."""
    return 2 if precision.weights == "bfloat16" else 4


def states(
    count: Count, parallel: ParallelConfig, precision: TrainerPrecision, trained: Count | None = None
) -> tuple[float, float, float]:
    """(weights, gradients, optimizer) of a rank with `count`. Buffers are float32 and count as weights.

    trained: what has gradients and an optimizer, if not all of it."""
    trained = count if trained is None else trained
    item = item_bytes(precision)
    dense_ranks = parallel.data * parallel.context
    expert_ranks = parallel.ranks // ((parallel.expert_tensor or parallel.tensor) * parallel.expert * parallel.pipeline)
    moments = 12 if item == 2 else 8
    weights = item * count.parameters + 4.0 * count.buffers
    return weights, 4.0 * trained.parameters, moments * (trained.dense / dense_ranks + trained.expert / expert_ranks)


def kept_attention(model: ModelDescription, *, fused: bool = True) -> int:
    """Elements a token that one attention block keeps for backward, before division by tensor parallelism.

    fused:   input and output of the norm (2 H); what the projections made (q + 2 kv) and, rotated, queries and keys
             (q + kv); the output (v). Latent attention: both latents before and after their norms, queries, keys and
             values whole (Megatron-Core pads the values of packed sequences to the queries' width), the output.
    without: each norm keeps the normalised tensor too, but one over all heads its input alone; the kernel's inputs are
             copies, its output is kept as it left the kernel and as it enters the projection.
    An output gate is kept as the projection made it, as its sigmoid, and as what it makes of the output.
    """
    extra = 0 if fused else 1
    norm = (2 + extra) * model.hidden
    if model.latent:
        f = model.fields
        latents = (2 + extra) * ((f["q_lora_rank"] or 0) + f["kv_lora_rank"]) + f["qk_pos_emb_head_dim"]
        return norm + latents + (3 + extra) * model.query + model.value
    norm += 3 * model.output_gate * model.query
    if fused:
        return norm + (model.query + 2 * model.key_value) + (model.query + model.key_value) + model.value
    normed = model.query + model.key_value
    if not model.norm_over_heads:
        normed += (model.query + 2 * model.key_value) + model.query
    return norm + model.qk_norm * normed + (model.query + 2 * model.key_value) + 2 * model.value


def kept_delta_net(model: ModelDescription, *, fused: bool = True) -> int:
    """The same of a gated delta net, of k, v widths of keys and values, r of keys repeated for every value head.

    The norm; what the projection made; queries and keys before their norm (2 k) and repeated (2 r), values, gates; of
    each head its beta, and of its decay two on the way and itself; and of the norm at the end its input, its output,
    the gate, its sigmoid and their product (v each).
    fused:   of each head a row of 64 that the kernel has inverted in its chunk (fla), too.
    without: the normalised tensors of both norms.
    """
    net = model.delta_net
    keys, values, heads = net.sections[0], net.sections[2], net.value_heads
    norm = (2 if fused else 3) * model.hidden
    inside = sum(net.sections) + 2 * keys + 2 * heads * net.key_dim + values + 4 * heads + (64 * heads if fused else 0)
    return norm + inside + (5 if fused else 6) * values


def kept_mlp(model: ModelDescription, *, sparse: bool, fused: bool = True, skew: float = 1.0) -> float:
    """The same for an MLP, its norm included.

    fused:   the norm's input and output (2 H); of each of k experts its input (H), gate and up (2 F), and what enters
             `down` (F).
    without: the normalised tensor, the activated gate and a copy of `up` too; an expert's product before its weight; of
             a gate that is clamped, what the clamp left and its sigmoid.
    skew:    tokens of this rank's experts, by the mean.
    """
    extra = 0 if fused else 1
    norm, dense = (2 + extra) * model.hidden, 3 + 2 * extra
    if not sparse:
        return norm + dense * model.ffn
    if model.clamped:
        extra *= 3
    routed = skew * model.topk * (model.hidden + (dense + extra) * model.expert_ffn)
    gated = model.hidden if model.shared_gate else 0
    return norm + routed + dense * model.shared_ffn + gated


def kept(
    model: ModelDescription,
    parallel: ParallelConfig,
    trainer: TrainerConfig,
    precision: TrainerPrecision,
    tokens: float,
    *,
    stage: int = 0,
    fused: bool = True,
    skew: float = 1.0,
) -> tuple[float, float]:
    """(bytes that a stage keeps of one micro-batch, bytes of one layer that is there while it is recomputed).

    tokens: of the micro-batch, over all context ranks. Full recomputation keeps the input of each layer; selective all
    but the inside of the (sparse) MLPs.
    """

    def block(number: int, recompute: str) -> float:
        kept_block = kept_delta_net if number in model.delta_layers else kept_attention
        attention, sparse = kept_block(model, fused=fused), number in model.moe_layers
        if recompute == "full":
            return model.hidden
        if recompute == "selective" and sparse == bool(model.moe_layers):
            # a dense MLP takes its norm along; a router's stands before what is recomputed
            norm = (2 if fused else 3) if sparse else 1
            return attention + norm * model.hidden
        return attention + kept_mlp(model, sparse=sparse, fused=fused, skew=skew)

    layers = stage_layers(model, parallel, stage)
    again = max((block(n, "none") - block(n, trainer.recompute) for n in layers), default=0.0)
    whole = sum(block(n, trainer.recompute) for n in layers)
    if stage == parallel.pipeline - 1:
        whole += (2 if fused else 3) * model.hidden  # the last norm, whose output the LM head reads
    scale = item_bytes(precision) * tokens / parallel.context / parallel.tensor
    return scale * whole, scale * again


def activations(
    model: ModelDescription,
    parallel: ParallelConfig,
    trainer: TrainerConfig,
    precision: TrainerPrecision,
    tokens: float,
    *,
    stage: int = 0,
    micro_batches: int | None = None,
    skew: float = 1.0,
) -> float:
    """Bytes of a stage at its worst moment. micro_batches: that a rank runs in a step; None: as many as stages."""
    whole, again = kept(model, parallel, trainer, precision, tokens, stage=stage, skew=skew)
    return whole * in_flight(parallel, stage, micro_batches) + again


def in_flight(parallel: ParallelConfig, stage: int, micro_batches: int | None = None) -> float:
    """Micro-batches whose activations a stage holds at once, of its whole stage. See the module."""
    p, v = parallel.pipeline, parallel.virtual_pipeline
    most = p - stage if v is None else p * (1 + (p - 1) / (p * v)) - 2 * stage / v
    return most if micro_batches is None else min(most, micro_batches)


def head(
    model: ModelDescription, parallel: ParallelConfig, precision: TrainerPrecision, tokens: int, *, frozen: bool = False
) -> float:
    """What the LM head holds above its inputs at its worst moment, backward: hidden states of the whole sequence, their
    gradient in float32 and rounded, the weight's gradient if it is not frozen, two tiles of float32 logits, and those
    that forward keeps where they are few."""
    item, t = item_bytes(precision), parallel.tensor
    rows, local = model.padded_vocab_size(t) // t, tokens / parallel.context
    gathered = item if t > 1 else 0
    tile = min(TILE["cuda"], local * rows)
    of_weight = 0 if frozen else item * rows * model.hidden
    left = 0 if frozen else kept_scores(math.ceil(local), rows, "cuda")
    return local * model.hidden * (gathered + 4 + item) + of_weight + 2 * 4 * tile + 4 * left


def rank_memory(
    model: ModelDescription,
    parallel: ParallelConfig,
    trainer: TrainerConfig,
    precision: TrainerPrecision,
    tokens: int,
    *,
    stage: int,
    micro_batches: int | None = None,
    reference: bool = False,
    critic: bool = False,
    lora: LoraConfig | None = None,
    teacher: ModelDescription | None = None,
    replay: bool = False,
    efficiency: Efficiency = EFFICIENCY,
) -> Memory:
    """A rank of a pipeline stage on a GPU. tokens: of the largest micro-batch, over all context ranks.

    lora: adapters are trained, on a model that policy, reference and critic have in common."""
    count = rank_count(model, parallel, stage)
    last = stage == parallel.pipeline - 1
    if lora is None:
        weights, gradients, optimizer = states(count, parallel, precision)
        others = weights if reference else 0.0
        critics = rank_count(model, parallel, stage, value_head=True)
    else:
        trained = trained_count(model, parallel, lora, stage)
        adapters = trained_count(model, parallel, lora.model_copy(update={"router": "frozen"}), stage)
        weights, gradients, optimizer = states(count + adapters, parallel, precision, trained)
        others = float(item_bytes(precision) * trained.parameters) if reference else 0.0
        critics = trained + Count(model.hidden if last else 0)
    if teacher is not None:
        others += states(rank_count(teacher, parallel, stage), parallel, precision)[0]
    host = 0.0
    if critic:
        of_critic = states(critics, parallel, precision)
        others += sum(of_critic[:2] if trainer.offload_optimizer else of_critic)
    if trainer.offload_optimizer:
        host, optimizer = optimizer * 16 / 12 * (2 if critic else 1), 0.0
    kept = activations(
        model, parallel, trainer, precision, tokens, stage=stage, micro_batches=micro_batches, skew=efficiency.skew
    )
    at_head = head(model, parallel, precision, tokens, frozen=lora is not None) if last else 0.0
    routes = replayed(model, parallel, tokens, stage) * in_flight(parallel, stage, micro_batches) if replay else 0.0
    held = weights + gradients + optimizer + others + kept + routes + at_head
    overhead = efficiency.reserve + efficiency.fragments * held
    return Memory(weights, gradients, optimizer, others, kept, at_head, overhead, host, stage, routes)


def replayed(model: ModelDescription, parallel: ParallelConfig, tokens: float, stage: int) -> float:
    """Bytes of a micro-batch's routes on a rank: int64, of its own tokens and the routers of its stage. tokens: over
    all context ranks."""
    routers = sum(layer in model.moe_layers for layer in stage_layers(model, parallel, stage))
    return 8.0 * model.topk * routers * tokens / parallel.context / (parallel.tensor if parallel.sequence else 1)


def worst_rank(model: ModelDescription, parallel: ParallelConfig, *args: Any, **settings: Any) -> Memory:
    """`rank_memory` of the stage that holds most."""
    ranks = (rank_memory(model, parallel, *args, stage=s, **settings) for s in range(parallel.pipeline))
    return max(ranks, key=lambda memory: memory.total)
