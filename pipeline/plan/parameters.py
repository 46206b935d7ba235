"""How many parameters a model has, in all, for one token, and on one rank of a layout.

Shapes are Megatron-Core's (0.19.2, `GPTModel`), from the fields that `megatron_ext.hf.families` sets; a test compares
the counts with those of built models, to the digit. H hidden, F width of an MLP, V vocabulary, E experts, k experts a
token, q and kv widths of all heads' queries, and keys or values.

    attention, grouped-query    (q + 2 kv) H + q H                       (2405.04434, section 2.1, for the latent kind)
    MLP, gated                  3 H F
    mixture of experts          3 H F_e E + H E + 3 H F_shared
    embedding, LM head          V H each; one for both where they are tied
    biases (gpt-oss)            q + 2 kv + H, heads (sinks), E, and 2 F_e + H an expert

The routers' biases of DeepSeek-V3's kind are buffers, not parameters: `buffers` counts them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_ext.config import ParallelConfig
from megatron_ext.hf.description import ModelShape, model_shape
from megatron_ext.hf.families import FAMILIES


@dataclass(frozen=True)
class Architecture:
    """What formulas need of a model, under one name for all families. Widths in elements.

    query, value: of all heads together (`value` is what the output projection reads).
    kv_cache:     elements a token and layer in the rollout engine's KV cache, on one of `tp` GPUs: `kv_cache(tp)`.
    ffn, expert_ffn, shared_ffn: widths of a dense MLP, of one expert, of all shared experts together (0: none).
    """

    shape: ModelShape
    hidden: int
    heads: int
    kv_heads: int
    query: int
    key_value: int
    value: int
    ffn: int
    expert_ffn: int
    shared_ffn: int
    fields: dict[str, Any] = field(repr=False)

    @property
    def latent(self) -> bool:
        """Multi-head latent attention."""
        return bool(self.fields.get("multi_latent_attention"))

    @property
    def biased(self) -> bool:
        """Every linear layer but the LM head has a bias."""
        return bool(self.fields.get("add_bias_linear"))

    @property
    def layers(self) -> int:
        return self.shape.num_layers

    @property
    def moe(self) -> int:
        """Layers with a router."""
        return len(self.shape.moe_layers)

    def kv_cache(self, tp: int = 1) -> int:
        """Elements a token and layer on one GPU. A latent is kept whole on each; a head is kept by one GPU at least."""
        if self.latent:
            return self.fields["kv_lora_rank"] + self.fields["qk_pos_emb_head_dim"]
        return 2 * max(1, self.kv_heads // tp) * (self.key_value // self.kv_heads)


def architecture(hf: dict[str, Any]) -> Architecture:
    """Of a Hugging Face config. Raises UnsupportedModel."""
    shape = model_shape(hf)
    fields = FAMILIES[shape.family].fields(hf)
    heads, kv_heads = hf["num_attention_heads"], hf["num_key_value_heads"]
    if fields.get("multi_latent_attention"):
        query = heads * (fields["qk_head_dim"] + fields["qk_pos_emb_head_dim"])
        key_value, value = query, heads * fields["v_head_dim"]
    else:
        head = hf.get("head_dim") or hf["hidden_size"] // heads
        query, key_value, value = heads * head, kv_heads * head, heads * head
    return Architecture(
        shape=shape,
        hidden=hf["hidden_size"],
        heads=heads,
        kv_heads=kv_heads,
        query=query,
        key_value=key_value,
        value=value,
        ffn=hf["intermediate_size"],
        expert_ffn=fields.get("moe_ffn_hidden_size", 0) if shape.num_experts else 0,
        shared_ffn=fields.get("moe_shared_expert_intermediate_size", 0),
        fields=fields,
    )


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


def attention(a: Architecture, tensor: int = 1) -> int:
    """One layer's, with its norms, on one tensor-parallel rank."""
    h, f = a.hidden, a.fields
    if not a.latent:
        qkv = (a.query + 2 * a.key_value) // tensor
        norms = 2 * (a.query // a.heads) if f.get("qk_layernorm") else 0
        sinks = a.heads // tensor if f.get("softmax_type") == "learnable" else 0
        out = a.value // tensor * h + a.biased * h
        return h + qkv * (h + bool(f.get("add_qkv_bias") or a.biased)) + norms + sinks + out
    q_lora, kv_lora, rope = f["q_lora_rank"], f["kv_lora_rank"], f["qk_pos_emb_head_dim"]
    query = a.query // tensor * h if q_lora is None else q_lora * h + q_lora + a.query // tensor * q_lora
    up = a.heads * (f["qk_head_dim"] + f["v_head_dim"]) // tensor * kv_lora
    return h + query + (kv_lora + rope) * h + kv_lora + up + a.value // tensor * h


def expert(a: Architecture, tensor: int = 1) -> int:
    """One routed expert's, on one of its tensor-parallel ranks."""
    return 3 * a.hidden * (a.expert_ffn // tensor) + a.biased * (2 * (a.expert_ffn // tensor) + a.hidden)


def layer(a: Architecture, number: int, parallel: ParallelConfig) -> Count:
    """One layer, counted from 0, on one rank."""
    t, h = parallel.tensor, a.hidden
    dense = attention(a, t) + h  # the norm before the MLP
    if number not in a.shape.moe_layers:
        return Count(dense + 3 * h * (a.ffn // t))
    experts = a.shape.num_experts // parallel.expert
    gate = h if a.fields.get("moe_shared_expert_gate") else 0
    return Count(
        dense + (h + a.biased) * a.shape.num_experts + 3 * h * (a.shared_ffn // t) + gate,
        experts * expert(a, parallel.expert_tensor or t),
        # Megatron-Core counts the tokens of each expert beside its bias
        2 * a.shape.num_experts if a.fields.get("moe_router_enable_expert_bias") else 0,
    )


def stage_layers(a: Architecture, parallel: ParallelConfig, stage: int) -> list[int]:
    """Which layers a pipeline stage holds: its chunk of each round, where stages are interleaved."""
    sizes, chunks = parallel.stage_layers(a.layers), parallel.virtual_pipeline or 1
    held, start = [], 0
    for _ in range(chunks):
        for s, size in enumerate(sizes):
            if s == stage:
                held += range(start, start + size // chunks)
            start += size // chunks
    return held


def rank_count(hf: dict[str, Any], parallel: ParallelConfig, stage: int = 0, *, value_head: bool = False) -> Count:
    """A rank of a pipeline stage. value_head: one output in the LM head's place (a critic)."""
    a = architecture(hf)
    rows = model_shape(hf, parallel.tensor).padded_vocab_size // parallel.tensor
    first, last = stage == 0, stage == parallel.pipeline - 1
    tied = a.shape.tied_embeddings and not value_head
    count = sum((layer(a, n, parallel) for n in stage_layers(a, parallel, stage)), Count())
    ends = rows * a.hidden if first else 0
    if last:
        ends += a.hidden  # the final norm
        if value_head:
            ends += a.hidden
        elif not (tied and first):  # a tied head on another stage is a copy of the embedding
            ends += rows * a.hidden
    return count + Count(ends)


def total(hf: dict[str, Any]) -> int:
    """All parameters. Multi-token-prediction layers are left out, as everywhere here."""
    return rank_count(hf, ParallelConfig.model_validate({})).parameters


def active(hf: dict[str, Any]) -> int:
    """Those that one token meets: of each router's experts, k. The embedding and the LM head count in full."""
    a = architecture(hf)
    return total(hf) - (a.shape.num_experts - a.shape.topk) * expert(a) * a.moe
