"""Which Hugging Face tensors make which Megatron parameter, one table a family.

Patterns hold `{layer}` and `{expert}`, both counted over the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.hf.transforms import QKV, GateUp, Replicated, Split, Transform, Vocabulary


@dataclass(frozen=True)
class Row:
    """One line of a table: a Megatron parameter, its Hugging Face tensors, and what lies between."""

    megatron: str
    hf: tuple[str, ...]
    transform: Transform

    @property
    def expert(self) -> bool:
        """Whether the parameter belongs to a routed expert, so that expert groups hold its shards."""
        return "{expert}" in self.megatron

    def hf_names(self, layer: int | None, expert: int | None) -> list[str]:
        return [name.format(layer=layer, expert=expert) for name in self.hf]


_LAYER, _HF = "decoder.layers.{layer}.", "model.layers.{layer}."

_EMBEDDING = Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary())
LM_HEAD = Row("output_layer.weight", ("lm_head.weight",), Vocabulary())
_FINAL_NORM = Row("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated())

_ATTENTION = (
    Row(
        _LAYER + "self_attention.linear_qkv.layer_norm_weight",
        (_HF + "input_layernorm.weight",),
        Replicated(),
    ),
    Row(
        _LAYER + "self_attention.linear_qkv.weight",
        tuple(_HF + f"self_attn.{p}_proj.weight" for p in "qkv"),
        QKV(),
    ),
    Row(_LAYER + "self_attention.q_layernorm.weight", (_HF + "self_attn.q_norm.weight",), Replicated()),
    Row(_LAYER + "self_attention.k_layernorm.weight", (_HF + "self_attn.k_norm.weight",), Replicated()),
    Row(_LAYER + "self_attention.linear_proj.weight", (_HF + "self_attn.o_proj.weight",), Split(1)),
)

_DENSE_MLP = (
    Row(_LAYER + "mlp.linear_fc1.layer_norm_weight", (_HF + "post_attention_layernorm.weight",), Replicated()),
    Row(_LAYER + "mlp.linear_fc1.weight", (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"), GateUp()),
    Row(_LAYER + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), Split(1)),
)

_EXPERT = _HF + "mlp.experts.{expert}."
_MOE = (
    Row(_LAYER + "pre_mlp_layernorm.weight", (_HF + "post_attention_layernorm.weight",), Replicated()),
    Row(_LAYER + "mlp.router.weight", (_HF + "mlp.gate.weight",), Replicated()),
    Row(
        _LAYER + "mlp.experts.linear_fc1.weight{expert}",
        (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
        GateUp(),
    ),
    Row(_LAYER + "mlp.experts.linear_fc2.weight{expert}", (_EXPERT + "down_proj.weight",), Split(1)),
)

TABLES: dict[str, tuple[Row, ...]] = {
    "qwen3": (_EMBEDDING, *_ATTENTION, *_DENSE_MLP, _FINAL_NORM, LM_HEAD),
    "qwen3_moe": (_EMBEDDING, *_ATTENTION, *_MOE, _FINAL_NORM, LM_HEAD),
}


@dataclass(frozen=True)
class Match:
    """A Megatron parameter found in its table. layer and expert are global, None where the name has none."""

    row: Row
    layer: int | None
    expert: int | None

    @property
    def hf_names(self) -> list[str]:
        return self.row.hf_names(self.layer, self.expert)


def _regex(row: Row) -> re.Pattern[str]:
    escaped = re.escape(row.megatron)
    return re.compile(escaped.replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)"))


def match_parameters(family: str, names: Sequence[str], *, tied_embeddings: bool) -> dict[str, Match]:
    """Find each global parameter name in the family's table.

    With tied embeddings the LM head reads the embedding's tensor. Raises KeyError listing every name that no row
    matches.
    """
    rows = [(row, _regex(row)) for row in TABLES[family]]
    found: dict[str, Match] = {}
    for name in names:
        for row, pattern in rows:
            hit = pattern.fullmatch(name)
            if hit:
                groups = {k: int(v) for k, v in hit.groupdict().items()}
                if row is LM_HEAD and tied_embeddings:
                    row = Row(LM_HEAD.megatron, _EMBEDDING.hf, LM_HEAD.transform)
                found[name] = Match(row, groups.get("layer"), groups.get("expert"))
                break
    unknown = [n for n in names if n not in found]
    if unknown:
        raise KeyError(f"parameters without a row in the {family} table: {', '.join(unknown)}")
    return found
