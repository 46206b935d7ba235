"""Which Hugging Face tensors make which Megatron parameter: what a row is, and the rows that families share.

Patterns hold `{layer}` and `{expert}`, both counted over the whole model. A table may have rows that a given model has
no parameter for (a bias it does without, dense layers): a row counts where Megatron-Core built its parameter.

Where only the Megatron name holds `{expert}`, Hugging Face packs all experts of a layer in one tensor, along its first
dimension. The transform sees the part of one: it is cut out on the way in, and `packed.py` joins the parts on the way
out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.hf.transforms import QKV, GateUp, Replicated, Split, Transform, Vocabulary


@dataclass(frozen=True)
class Row:
    """One line of a table: a Megatron parameter or buffer, its Hugging Face tensors, and what lies between."""

    megatron: str
    hf: tuple[str, ...]
    transform: Transform

    @property
    def expert(self) -> bool:
        """Whether the parameter belongs to a routed expert, so that expert groups hold its shards."""
        return "{expert}" in self.megatron

    @property
    def quantised(self) -> bool:
        """Whether an engine with quantised weights holds it in fewer bits: the matrices of attention and of MLPs."""
        name = self.megatron.removesuffix("{expert}")
        kept = (
            "router.",
            "embedding.",
            "output_layer.",
            "gate_weight",
            "layernorm",
            "layer_norm_weight",
            "softmax_offset",
            "conv1d.",
            "out_norm.",
        )
        return name.endswith("weight") and not any(part in name for part in kept)

    @property
    def packed(self) -> bool:
        """Whether a Hugging Face tensor holds all experts of a layer."""
        return self.expert and "{expert}" not in self.hf[0]

    def hf_names(self, layer: int | None, expert: int | None) -> list[str]:
        return [name.format(layer=layer, expert=expert) for name in self.hf]


LAYER, HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."

EMBEDDING = Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary())
LM_HEAD = Row("output_layer.weight", ("lm_head.weight",), Vocabulary())
FINAL_NORM = Row("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated())
ENDS = (EMBEDDING, FINAL_NORM, LM_HEAD)

_QKV, _HF_ATTENTION = LAYER + "self_attention.linear_qkv.", HF_LAYER + "self_attn."
ATTENTION = (
    Row(_QKV + "layer_norm_weight", (HF_LAYER + "input_layernorm.weight",), Replicated()),
    Row(_QKV + "weight", tuple(_HF_ATTENTION + f"{p}_proj.weight" for p in "qkv"), QKV()),
    Row(_QKV + "bias", tuple(_HF_ATTENTION + f"{p}_proj.bias" for p in "qkv"), QKV()),
    Row(LAYER + "self_attention.q_layernorm.weight", (_HF_ATTENTION + "q_norm.weight",), Replicated()),
    Row(LAYER + "self_attention.k_layernorm.weight", (_HF_ATTENTION + "k_norm.weight",), Replicated()),
    Row(LAYER + "self_attention.linear_proj.weight", (_HF_ATTENTION + "o_proj.weight",), Split(1)),
    Row(LAYER + "self_attention.linear_proj.bias", (_HF_ATTENTION + "o_proj.bias",), Replicated()),
    Row(LAYER + "self_attention.core_attention.softmax_offset", (_HF_ATTENTION + "sinks",), Split(0)),
)


def gated_mlp(megatron: str, hf: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")):
    """The two rows of a gated MLP. `hf` names its module, `names` its projections: gate, up, down."""
    gate, up, down = (f"{hf}{name}.weight" for name in names)
    index = "{expert}" if "{expert}" in hf else ""
    return (
        Row(f"{megatron}linear_fc1.weight{index}", (gate, up), GateUp()),
        Row(f"{megatron}linear_fc2.weight{index}", (down,), Split(1)),
    )


_MLP_NORM = (HF_LAYER + "post_attention_layernorm.weight",)
DENSE_MLP = (
    Row(LAYER + "mlp.linear_fc1.layer_norm_weight", _MLP_NORM, Replicated()),
    *gated_mlp(LAYER + "mlp.", HF_LAYER + "mlp."),
)
MOE_NORM = Row(LAYER + "pre_mlp_layernorm.weight", _MLP_NORM, Replicated())
MOE = (
    MOE_NORM,
    Row(LAYER + "mlp.router.weight", (HF_LAYER + "mlp.gate.weight",), Replicated()),
    *gated_mlp(LAYER + "mlp.experts.", HF_LAYER + "mlp.experts.{expert}."),
)


@dataclass(frozen=True)
class Match:
    """A Megatron parameter found in its table. layer and expert are global, None where the name has none."""

    row: Row
    layer: int | None
    expert: int | None

    @property
    def hf_names(self) -> list[str]:
        return self.row.hf_names(self.layer, self.expert)

    @property
    def part(self) -> int | None:
        """Which expert's part of its Hugging Face tensors it is; None: they are its alone."""
        return self.expert if self.row.packed else None


def _regex(row: Row) -> re.Pattern[str]:
    escaped = re.escape(row.megatron)
    return re.compile(escaped.replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)"))


def match_parameters(table: Sequence[Row], names: Sequence[str], *, tied_embeddings: bool) -> dict[str, Match]:
    """Find each global parameter name in a table.

    With tied embeddings the LM head reads the embedding's tensor. Raises KeyError listing every name that no row
    matches.
    """
    rows = [(row, _regex(row)) for row in table]
    found: dict[str, Match] = {}
    for name in names:
        for row, pattern in rows:
            hit = pattern.fullmatch(name)
            if hit:
                groups = {k: int(v) for k, v in hit.groupdict().items()}
                if row is LM_HEAD and tied_embeddings:
                    row = Row(LM_HEAD.megatron, EMBEDDING.hf, LM_HEAD.transform)
                found[name] = Match(row, groups.get("layer"), groups.get("expert"))
                break
    unknown = [n for n in names if n not in found]
    if unknown:
        raise KeyError(f"parameters without a row in the model family's table: {', '.join(unknown)}")
    return found
