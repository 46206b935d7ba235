"""How many parameters a model has, in all, for one token, and on one rank of a layout.

Shapes are Megatron-Core's (0.19.2, `GPTModel`), from the fields that `megatron_ext.hf.families` sets; a test compares
the counts with those of built models, to the digit. H hidden, F width of an MLP, V vocabulary, E experts, k experts a
token, q and kv widths of all heads' queries, and keys or values; of a gated delta net, k, v and d_v widths of its keys,
its values and one value, W of its filters.

    attention, grouped-query    (q + 2 kv) H + q H                       (2405.04434, section 2.1, for the latent kind)
    with an output gate         q H more
    gated delta net             (2 k + 2 v + 2 heads) H + W (2 k + v) + v H + 2 heads + d_v    (2412.06464, section 3.4)
    MLP, gated                  3 H F
    mixture of experts          3 H F_e E + H E + 3 H F_shared
    embedding, LM head          V H each; one for both where they are tied
    biases (gpt-oss)            q + 2 kv + H, heads (sinks), E, and 2 F_e + H an expert

The routers' biases of DeepSeek-V3's kind are buffers, not parameters: `buffers` counts them.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.config import ParallelConfig
from megatron_ext.hf.description import ModelDescription


@dataclass(frozen=True)
class Count:
    """Parameters by where their gradients are reduced, and elements of buffers (float32).

    dense:  over the data- and context-parallel ranks. expert: over the ranks that hold the same experts.
    """

    dense: int = 0
    expert: int = 0
    buffers: int = 0

    @property
    def parameters(self) -> int:
        return self.dense + self.expert

    def __add__(self, other: Count) -> Count:
        return Count(self.dense + other.dense, self.expert + other.expert, self.buffers + other.buffers)


def kv_cache(model: ModelDescription, tp: int = 1) -> int:
    """Elements a token and layer in the rollout engine's KV cache, on one of `tp` GPUs. A latent is kept whole on each;
    a head is kept by one GPU at least."""
    if model.latent:
        return model.fields["kv_lora_rank"] + model.fields["qk_pos_emb_head_dim"]
    return 2 * max(1, model.kv_heads // tp) * model.head_dim


def indexer(model: ModelDescription) -> tuple[int, int]:
    """What the rollout engine holds of one layer's indexer, whole on every GPU, and the trainer does not build:
    (elements, in the dtype of the activations; bytes a token in its cache, keys in fp8 with a float32 scale)."""
    if (one := model.family.indexer) is None:
        return 0, 0
    heads, width = model.hf[one.heads], model.hf[one.width]
    matrices = model.fields["q_lora_rank"] * heads * width + model.hidden * (width + heads)
    return matrices + 2 * width, width + 4


def delta_state(model: ModelDescription, tp: int = 1) -> tuple[int, int]:
    """What the rollout engine keeps of a sequence in its gated delta nets, on one of `tp` GPUs: (elements of states,
    float32; elements of the tokens before the convolutions, in the dtype of the activations)."""
    if not model.delta_layers:
        return 0, 0
    net, before = model.delta_net, model.fields["linear_conv_kernel_dim"] - 1
    layers = len(model.delta_layers)
    states = net.value_heads * net.value_dim * net.key_dim
    return layers * states // tp, layers * before * sum(net.sections[:3]) // tp


def delta_net(model: ModelDescription, tensor: int = 1) -> int:
    """One layer's gated delta net, with its norms, on one tensor-parallel rank."""
    net, h = model.delta_net, model.hidden
    filters = model.fields["linear_conv_kernel_dim"] * sum(net.sections[:3])
    split = h * sum(net.sections) + filters + 2 * net.value_heads + net.sections[2] * h
    return h + split // tensor + net.value_dim


def attention(model: ModelDescription, tensor: int = 1) -> int:
    """One layer's, with its norms, on one tensor-parallel rank."""
    h = model.hidden
    if not model.latent:
        qkv = (model.query * (1 + model.output_gate) + 2 * model.key_value) // tensor
        width = model.query + model.key_value if model.norm_over_heads else 2 * model.head_dim
        norms = width if model.qk_norm else 0
        sinks = model.heads // tensor if model.sinks else 0
        out = model.value // tensor * h + model.biased * h
        return h + qkv * (h + model.qkv_biased) + norms + sinks + out
    f = model.fields
    q_lora, kv_lora, rope = f["q_lora_rank"], f["kv_lora_rank"], f["qk_pos_emb_head_dim"]
    query = model.query // tensor * h if q_lora is None else q_lora * h + q_lora + model.query // tensor * q_lora
    up = model.heads * (f["qk_head_dim"] + f["v_head_dim"]) // tensor * kv_lora
    return h + query + (kv_lora + rope) * h + kv_lora + up + model.value // tensor * h


def expert(model: ModelDescription, tensor: int = 1) -> int:
    """One routed expert's, on one of its tensor-parallel ranks."""
    width = model.expert_ffn // tensor
    return 3 * model.hidden * width + model.biased * (2 * width + model.hidden)


def layer(model: ModelDescription, number: int, parallel: ParallelConfig) -> Count:
    """One layer, counted from 0, on one rank."""
    t, h = parallel.tensor, model.hidden
    block = delta_net(model, t) if number in model.delta_layers else attention(model, t)
    dense = block + h  # the norm before the MLP
    if number not in model.moe_layers:
        return Count(dense + 3 * h * (model.ffn // t))
    experts = model.num_experts // parallel.expert
    gate = h if model.shared_gate else 0
    return Count(
        dense + (h + model.biased) * model.num_experts + 3 * h * (model.shared_ffn // t) + gate,
        experts * expert(model, parallel.expert_tensor or t),
        # Megatron-Core counts the tokens of each expert beside its bias
        2 * model.num_experts if model.router_biased else 0,
    )


def stage_layers(model: ModelDescription, parallel: ParallelConfig, stage: int) -> list[int]:
    """Which layers a pipeline stage holds: its chunk of each round, where stages are interleaved."""
    sizes, chunks = parallel.stage_layers(model.num_layers), parallel.virtual_pipeline or 1
    held, start = [], 0
    for _ in range(chunks):
        for s, size in enumerate(sizes):
            if s == stage:
                held += range(start, start + size // chunks)
            start += size // chunks
    return held


def rank_count(model: ModelDescription, parallel: ParallelConfig, stage: int = 0, *, value_head: bool = False) -> Count:
    """A rank of a pipeline stage. value_head: one output in the LM head's place (a critic)."""
    rows = model.padded_vocab_size(parallel.tensor) // parallel.tensor
    first, last = stage == 0, stage == parallel.pipeline - 1
    tied = model.tied_embeddings and not value_head
    count = sum((layer(model, n, parallel) for n in stage_layers(model, parallel, stage)), Count())
    ends = rows * model.hidden if first else 0
    if last:
        ends += model.hidden  # the final norm
        if value_head:
            ends += model.hidden
        elif not (tied and first):  # a tied head on another stage is a copy of the embedding
            ends += rows * model.hidden
    return count + Count(ends)


def total(model: ModelDescription) -> int:
    """All parameters. Multi-token-prediction layers are left out, as everywhere here."""
    return rank_count(model, ParallelConfig.model_validate({})).parameters


def active(model: ModelDescription) -> int:
    """Those that one token meets: of each router's experts, k. The embedding and the LM head count in full."""
    return total(model) - (model.num_experts - model.topk) * expert(model) * len(model.moe_layers)
