"""What a model is: one object for all that ask, made from its config.json alone. Neither torch nor Megatron is here."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_ext.hf.config_json import num_experts, read_hf_config, rope_settings, wrong_fields
from megatron_ext.hf.families import FAMILIES
from megatron_ext.hf.families.family import Family
from megatron_ext.hf.transforms import DeltaHeads

_SERVER_ALONE = {"final_logit_softcapping": None, "use_fope": False, "video_rope": False}
"""What `Family.server_alone` says, of every family: SGLang 0.5.23, layers/logits_processor.py:490, and of the rotary
embedding layers/rotary_embedding/factory.py."""


class UnsupportedModel(ValueError):
    """The Hugging Face model is of a family, or has a feature, that is not built here."""


@dataclass(frozen=True)
class ModelDescription:
    """A supported model. Widths are in elements, counts over the whole model.

    hf:          its config.json.
    model_type:  of config.json; `family` is what is known of all such models.
    moe_layers:  layers with a router, counted from 0; the others are dense.
    num_experts: routed experts of such a layer; 0 for a dense model.
    topk:        experts a token; 0 for a dense model.
    vocab_size:  tokens; see `padded_vocab_size` for rows.
    """

    hf: dict[str, Any] = field(repr=False)
    model_type: str
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    topk: int
    vocab_size: int
    tied_embeddings: bool

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Rows of the embedding: a multiple of the tensor-parallel size."""
        return math.ceil(self.vocab_size / tensor_parallel) * tensor_parallel

    @functools.cached_property
    def fields(self) -> dict[str, Any]:
        """The family's fields of Megatron-Core's TransformerConfig; without a sparse layer, none of a router's."""
        fields = self.family.fields(self.hf)
        return fields if self.moe_layers else {k: v for k, v in fields.items() if not k.startswith("moe_")}

    def not_served(self, device: Literal["cpu", "cuda"] | None = None) -> list[str]:
        """Why SGLang 0.5.23 would serve another model than this on the device, or (None) on any, or none at all, which
        is trained here even so: a sentence each."""
        reasons, dense = [], sorted(set(range(self.num_layers)) - set(self.moe_layers))
        if device == "cpu" and (what := self.family.server_on_gpus) is not None:
            reasons.append(
                f"SGLang computes the {what} of {self.model_type} on GPUs only; set device=cuda where there are some, "
                "take another model, or train on dumped steps (--from-dump), which need no server"
            )
        if self.tied_embeddings and not self.family.server_ties:
            reasons.append(
                f"SGLang gives {self.model_type} an LM head of its own, whatever tie_word_embeddings=true says; write "
                "tie_word_embeddings=false, and into the files an lm_head.weight that is a copy of "
                "model.embed_tokens.weight (the two are then trained apart)"
            )
        if dense and not self.family.server_dense:
            reasons.append(
                f"layers {', '.join(map(str, dense))} are dense, and SGLang takes every layer of {self.model_type} for "
                "sparse and leaves these without weights; take another model, or train on dumped steps (--from-dump), "
                "which need no server"
            )
        served = self.family.server_rope_types
        if served is not None and (kind := self.rope["rope_type"]) not in served:
            reasons.append(
                f"SGLang gives {self.model_type} a plain rotary embedding, whatever rope_type={kind} says; take "
                "another model, or train on dumped steps (--from-dump), which need no server"
            )
        if not self.family.server_heads and self.head_dim != (width := self.hidden // self.heads):
            reasons.append(
                f"SGLang gives {self.model_type} heads of hidden_size / num_attention_heads = {width}, whatever "
                f"head_dim={self.head_dim} says; take another model, or train on dumped steps (--from-dump), which "
                "need no server"
            )
        return [*reasons, *self._read_otherwise()]

    def _read_otherwise(self) -> Iterator[str]:
        """Fields with which SGLang computes another model than the trainer, a sentence each."""
        written = self.rope | self.hf
        for name, same in (_SERVER_ALONE | dict(self.family.server_alone(self.hf))).items():
            if (value := written.get(name)) is not None and value != same:
                instead = f"leave {name} out" if same is None else f"write {name}={json.dumps(same)}"
                yield (
                    f"with {name}={json.dumps(value)} SGLang computes another {self.model_type} than the trainer; "
                    f"{instead} if the model was trained so, else take another model, or train on dumped steps "
                    "(--from-dump), which need no server"
                )

    @property
    def longest(self) -> int | None:
        """Tokens of a sequence, at most, that it is built for; None: as many as its positions."""
        indexer = self.family.indexer
        return None if indexer is None else self.hf[indexer.chosen]

    def too_long(self, tokens: int) -> str | None:
        """Why a sequence that reads so many tokens is not trained on; None: it is."""
        if self.longest is None or tokens <= self.longest:
            return None
        assert self.family.indexer is not None
        return (
            f"a sequence of {tokens} tokens is longer than {self.family.indexer.chosen}={self.longest}, behind which "
            f"the attention of {self.model_type} is sparse, which the trainer does not compute"
        )

    @property
    def rope(self) -> dict[str, Any]:
        """See config_json.rope_settings."""
        return rope_settings(self.hf)

    @property
    def hidden(self) -> int:
        return self.hf["hidden_size"]

    @property
    def heads(self) -> int:
        return self.hf["num_attention_heads"]

    @property
    def kv_heads(self) -> int:
        return self.hf["num_key_value_heads"]

    @property
    def head_dim(self) -> int:
        """Of queries, keys and values, where attention is not latent."""
        return self.hf.get("head_dim") or self.hidden // self.heads

    @property
    def latent(self) -> bool:
        """Multi-head latent attention."""
        return bool(self.fields.get("multi_latent_attention"))

    @property
    def delta_layers(self) -> tuple[int, ...]:
        """Layers with a gated delta net in the place of attention, counted from 0."""
        return tuple(i for i, is_one in enumerate(self.fields.get("linear_attention_freq", ())) if is_one)

    @property
    def delta_net(self) -> DeltaHeads:
        """Of the gated delta nets, where there are any."""
        names = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
        return DeltaHeads(*(self.fields[name] for name in names))

    @property
    def output_gate(self) -> bool:
        """What attention leaves is multiplied by a sigmoid of the same width."""
        return bool(self.fields.get("attention_output_gate"))

    @property
    def query(self) -> int:
        """Width of all heads' queries."""
        if self.latent:
            return self.heads * (self.fields["qk_head_dim"] + self.fields["qk_pos_emb_head_dim"])
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        """Width of all heads' keys; of values too, where attention is not latent."""
        return self.query if self.latent else self.kv_heads * self.head_dim

    @property
    def value(self) -> int:
        """Width of what the output projection reads."""
        return self.heads * (self.fields["v_head_dim"] if self.latent else self.head_dim)

    @property
    def ffn(self) -> int:
        """Width of a dense MLP; where the family has none, of an expert."""
        return self.hf.get("intermediate_size") or self.expert_ffn

    @property
    def expert_ffn(self) -> int:
        """Width of one routed expert; 0 for a dense model."""
        return self.fields.get("moe_ffn_hidden_size", 0) if self.num_experts else 0

    @property
    def shared_ffn(self) -> int:
        """Width of all shared experts together; 0: none."""
        return self.fields.get("moe_shared_expert_intermediate_size", 0)

    @property
    def shared_gate(self) -> bool:
        """A gate scales the shared experts."""
        return bool(self.fields.get("moe_shared_expert_gate"))

    @property
    def biased(self) -> bool:
        """Every linear layer but the LM head has a bias."""
        return bool(self.fields.get("add_bias_linear"))

    @property
    def qkv_biased(self) -> bool:
        """Queries, keys and values have a bias."""
        return self.biased or bool(self.fields.get("add_qkv_bias"))

    @property
    def qk_norm(self) -> bool:
        """Queries and keys of a head are normalised; of latent attention, the latents."""
        return bool(self.fields.get("qk_layernorm"))

    @property
    def norm_over_heads(self) -> bool:
        """They are normalised over all heads together."""
        return self.family.norm_over_heads

    @property
    def sinks(self) -> bool:
        """Each head has a score that no token has."""
        return self.fields.get("softmax_type") == "learnable"

    @property
    def router_biased(self) -> bool:
        """A bias an expert that counts for the choice only, and is no parameter."""
        return bool(self.fields.get("moe_router_enable_expert_bias"))

    @property
    def weight_of_one(self) -> bool:
        """A sigmoid router chooses one expert and normalises its weight, which is then the router's constant factor."""
        sigmoid = self.fields.get("moe_router_score_function") == "sigmoid"
        return sigmoid and self.topk == 1 and self.hf.get("norm_topk_prob", True)

    @property
    def clamped(self) -> bool:
        """An expert's gate is clamped."""
        return self.fields.get("activation_func_clamp_value") is not None


def describe(hf: dict[str, Any], file: str = "config.json") -> ModelDescription:
    """Of the content of a config.json. file: its name, for messages. Raises UnsupportedModel with all reasons."""
    name = hf.get("model_type", "?")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UnsupportedModel(f"model_type {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    if wrong := list(wrong_fields(hf, FAMILIES[name].without)):
        raise UnsupportedModel(f"{file}: {'; '.join(wrong)}")
    try:
        return _described(hf, name)
    except KeyError as error:
        raise UnsupportedModel(
            f"{file}: {error.args[0]} is missing (transformers would take its class's own value, which need not be "
            "this model's); write it"
        ) from error


def _described(hf: dict[str, Any], name: str) -> ModelDescription:
    """Raises KeyError for a field that the family needs."""
    if reasons := _reasons(hf, FAMILIES[name]):
        raise UnsupportedModel(f"{name} with {'; with '.join(reasons)} is not built here")
    moe_layers = tuple(FAMILIES[name].moe_layers(hf))
    if moe_layers and not any(hf.get(field) for field in FAMILIES[name].experts):
        raise KeyError(f"the number of experts ({' or '.join(FAMILIES[name].experts)})")
    model = ModelDescription(
        hf=hf,
        model_type=name,
        num_layers=hf["num_hidden_layers"],
        moe_layers=moe_layers,
        num_experts=num_experts(hf) if moe_layers else 0,
        topk=hf["num_experts_per_tok"] if moe_layers else 0,
        vocab_size=hf["vocab_size"],
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
    )
    _ = model.fields  # asks for every field that the family reads
    return model


def read_description(path: str | Path) -> ModelDescription:
    """Of a model directory. Raises FileNotFoundError, UnsupportedModel, and ValueError for what is no JSON."""
    return describe(read_hf_config(path), str(Path(path) / "config.json"))


def _reasons(hf: dict[str, Any], family: Family) -> list[str]:
    """Why such a model is not built here."""
    reasons = list(family.unsupported(hf))
    if (rope := rope_settings(hf)["rope_type"]) not in family.rope_types:
        reasons.append(f"rope_type {rope!r}")
    if not family.rotates_parts and (part := rope_settings(hf).get("partial_rotary_factor", 1.0)) != 1.0:
        reasons.append(f"partial_rotary_factor={part}")
    if hf.get("use_sliding_window"):
        reasons.append("use_sliding_window=true")
    if hf.get("hidden_act", "silu") != "silu":
        reasons.append(f"hidden_act {hf['hidden_act']!r}")
    if (quantized := hf.get("quantization_config")) and quantized.get("quant_method") not in family.quantization:
        reasons.append("quantized weights (write the model in bfloat16 first)")
    return reasons
