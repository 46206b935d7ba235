"""Which matrices of a model have adapters: rows of its family's table, chosen by name. Neither torch nor Megatron is
here, so that a configuration is checked with it.

An adapter belongs to a matrix as Hugging Face has it: queries, keys and values have one each, though Megatron-Core
holds the three in one parameter. Gated delta nets (Qwen3-Next, Qwen3.5) have none: what projects their input is joined
by heads, six sections in one parameter, and stays frozen with the rest of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ext.config import LoraConfig
from megatron_ext.hf.description import ModelDescription
from megatron_ext.hf.tables import Match, Row

GROUPS = ("attention", "dense", "experts", "shared_experts")


class LoraError(ValueError):
    """The model has no such projections, or none that adapters fit; the message says which it has."""


@dataclass(frozen=True)
class Target:
    """A row of the table, and which of its Hugging Face tensors have an adapter, by their place in `row.hf`."""

    row: Row
    parts: tuple[int, ...]


def projection(hf_name: str) -> str:
    """ "q_proj" of "model.layers.0.self_attn.q_proj.weight": what PEFT's target_modules name."""
    return hf_name.removesuffix(".weight").rpartition(".")[2]


def choose_targets(model: ModelDescription, lora: LoraConfig) -> list[Target]:
    """Raises LoraError for a name that no projection of the model has."""
    rows = [row for row in model.family.table if row.quantised and _built(row, model)]
    wanted = {"all"} if lora.targets == "all" else set(lora.targets)
    known = {name for row in rows for name in _names(row)} | {group_of(row) for row in rows}
    if unknown := sorted(wanted - known - {"all"}):
        raise LoraError(
            f"lora.targets: {model.model_type} has no {', '.join(unknown)}; there are all, "
            f"{', '.join(g for g in GROUPS if g in known)}, {', '.join(sorted(known - set(GROUPS)))}"
        )
    chosen = []
    for row in rows:
        whole = not wanted.isdisjoint({"all", group_of(row)})
        parts = tuple(i for i, name in enumerate(_names(row)) if whole or name in wanted)
        if parts:
            chosen.append(Target(row, parts))
    return chosen


def group_of(row: Row) -> str:
    """Which of GROUPS a matrix belongs to."""
    if row.expert:
        return "experts"
    if ".self_attention." in row.megatron:
        return "attention"
    return "shared_experts" if ".shared_experts." in row.megatron else "dense"


def _names(row: Row) -> list[str]:
    return [projection(name) for name in row.hf]


def _built(row: Row, model: ModelDescription) -> bool:
    """Whether the model has a parameter of this row that adapters fit: tables have rows for all models of a family."""
    if "linear_q_" in row.megatron:  # latent attention has a latent of queries, or none
        return ("linear_q_proj" in row.megatron) == (model.fields["q_lora_rank"] is None)
    if group_of(row) == "attention":
        return ".self_attention.linear_" in row.megatron  # else of a gated delta net
    return {
        "experts": bool(model.moe_layers),
        "shared_experts": bool(model.moe_layers) and model.shared_ffn > 0,
        "dense": len(model.moe_layers) < model.num_layers,
    }[group_of(row)]


def layer_name(match: Match) -> str:
    """Of the linear layer that a weight belongs to, in the whole model: "decoder.layers.3.mlp.experts.linear_fc1"."""
    return match.row.megatron.rpartition(".weight")[0].format(layer=match.layer)


def layers_with(row: Row, model: ModelDescription) -> Iterator[int]:
    """The layers, counted from 0, that have a parameter of this row."""
    kind = group_of(row)
    for layer in range(model.num_layers):
        attends, sparse = layer not in model.delta_layers, layer in model.moe_layers
        if attends if kind == "attention" else sparse == (kind != "dense"):
            yield layer
