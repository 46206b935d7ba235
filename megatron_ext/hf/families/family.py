"""What must be known of a model family, and the router settings that families share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_ext.hf.config_json import draft_tensors
from megatron_ext.hf.tables import Row

HFConfig = dict[str, Any]


def _none(hf: HFConfig) -> Iterable[Any]:
    return ()


def _no_fields(hf: HFConfig) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class Needed:
    """A precision setting that the rollout engine leaves no choice in; why: a sentence that names what it does.
    device: where that is so; None: everywhere."""

    setting: Literal["weights", "router", "kv_cache"]
    value: str
    why: str
    device: Literal["cpu", "cuda"] | None = None


@dataclass(frozen=True)
class ServerRouter:
    """SGLang's layer that makes a router's logits, by the name of its class and of the module that this is in.

    kind: "linear": one of its linear layers, which round to the dtype of the weights; "own": a layer with a forward of
    its own, which rounds or not by device and batch; "float32": one that has float32 weights and logits always.
    """

    layer: str
    kind: Literal["linear", "own", "float32"]


@dataclass(frozen=True)
class Indexer:
    """What chooses the tokens that a token attends to (DeepSeek-V3.2's report, 2512.02556, section 2.1). Up to as many
    as it chooses, it chooses all: there it changes nothing, and it is not built.

    module:  how the names of its tensors in a layer begin, with `{layer}`, in Hugging Face's files and in SGLang.
    tensors: how they end. Every layer has them all.
    chosen, heads, width: the fields of config.json that say how many tokens it chooses, how many heads of queries it
             has, and how wide these and its keys are.
    """

    module: str
    tensors: tuple[str, ...]
    chosen: str
    heads: str
    width: str


@dataclass(frozen=True)
class ExpertShape:
    """Experts of every layer. width: of one, shared: of the shared expert, 0 for none; inner elements."""

    experts: int
    topk: int
    width: int
    shared: int


@dataclass(frozen=True)
class Sparse:
    """What a dense model becomes in this family, whose weights over the chosen experts must sum to 1.

    config: the fields of config.json that say so, beside those that both have, from the experts and from whether
            queries, keys and values have a bias.
    qkv_biased: which it can have, False, True or both. qk_norm: whether it has norms of queries and keys. shared:
            whether it has a shared expert, behind a sigmoid of its own.
    """

    architecture: str
    config: Callable[[ExpertShape, bool], HFConfig]
    qkv_biased: tuple[bool, ...] = (False,)
    qk_norm: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Family:
    """One or more `model_type`s of Hugging Face that share their tensors' names.

    table:       Megatron parameters and Hugging Face tensors.
    fields:      fields of Megatron-Core's TransformerConfig beyond those that every model has.
    moe_layers:  which layers have a router, counted from 0.
    unsupported: reasons why a model of the family is not built here, a sentence each.
    experts:     fields of config.json that say how many experts a layer has, in transformers' class too.
    rope_types:  kinds of rotary embedding that are built.
    rotates_parts: config.json may say that a part of each head is rotated.
    server_rope_types: of these, the kinds that the rollout engine builds; None: all.
    quantization: kinds of quantized weights that are read.
    norm_over_heads: queries, and keys, of all heads are normalised as one vector, and not each head by itself.
    needs:        what of the precision is not free.
    server_router: how the rollout engine makes a router's logits.
    server_ties:   the rollout engine takes the embedding for the LM head where config.json ties them.
    server_dense:  it has dense layers where config.json has some beside sparse ones.
    server_heads:  it takes a head_dim; else heads are hidden_size / num_attention_heads wide, whatever it says.
    server_alone:  fields of config.json, or of its rotary embedding, that it alone reads, or reads in its own way, and
                   the value of each with which it computes what the trainer does.
    server_fields: what it asks of config.json and transformers does not write there, as transformers computes it.
    server_cpu_arguments: of its command line, without which it does not run the family on a CPU.
    server_gpu_arguments: of its command line, without which it rounds otherwise than the trainer on a GPU.
    server_on_gpus: what of the family it computes on GPUs only; None: nothing, it has been compared on a CPU.
    without:       fields of every other family's config.json that this one's does not have.
    drafts:        how the names of its multi-token-prediction layers' tensors begin, where they do not stand behind the
                   model's own layers, and config.json need not count them.
    indexer:       chooses the tokens of attention; None: every token attends to all before it, or in a window.
    joined:       sets of Hugging Face tensors of a layer, names with `{layer}`, that the rollout engine's loader joins
                  within one request and drops where one is missing: they travel together. Each is all that its
                  Megatron parameter becomes.
    sparse:       how a dense model is upcycled into this family; None: it is not.
    """

    table: tuple[Row, ...]
    fields: Callable[[HFConfig], dict[str, Any]]
    moe_layers: Callable[[HFConfig], Iterable[int]] = _none
    unsupported: Callable[[HFConfig], Iterable[str]] = _none
    experts: tuple[str, ...] = ()
    rope_types: tuple[str, ...] = ("default",)
    rotates_parts: bool = False
    quantization: tuple[str, ...] = ()
    norm_over_heads: bool = False
    needs: tuple[Needed, ...] = ()
    server_router: ServerRouter = ServerRouter("linear.ReplicatedLinear", "linear")
    server_ties: bool = False
    server_dense: bool = True
    server_heads: bool = True
    server_alone: Callable[[HFConfig], Mapping[str, Any]] = _no_fields
    joined: tuple[tuple[str, ...], ...] = ()
    server_rope_types: tuple[str, ...] | None = None
    server_fields: Callable[[HFConfig], Mapping[str, Any]] = _no_fields
    server_cpu_arguments: tuple[str, ...] = ()
    server_gpu_arguments: tuple[str, ...] = ()
    server_on_gpus: str | None = None
    without: tuple[str, ...] = ()
    drafts: str | None = None
    indexer: Indexer | None = None
    sparse: Sparse | None = None

    def carried(self, hf: HFConfig, names: Iterable[str]) -> list[str]:
        """Which of a model directory's tensors the trainer does not build: those of multi-token-prediction layers, and
        of indexers."""
        names = list(names)
        return sorted({*draft_tensors(hf, names, self.drafts), *self.indexers(hf).intersection(names)})

    def indexer_modules(self, hf: HFConfig) -> list[str]:
        """How the names of the tensors of each layer's indexer begin."""
        if self.indexer is None:
            return []
        return [self.indexer.module.format(layer=layer) for layer in range(hf["num_hidden_layers"])]

    def indexers(self, hf: HFConfig) -> set[str]:
        """Names of the tensors of all layers' indexers."""
        tensors = self.indexer.tensors if self.indexer else ()
        return {module + tensor for module in self.indexer_modules(hf) for tensor in tensors}

    def joined_set(self, name: str) -> tuple[int, str] | None:
        """(number in `joined`, layer) of the set that a Hugging Face tensor belongs to; None: to none."""
        for number, names in enumerate(self.joined):
            for pattern in names:
                before, _, behind = pattern.partition("{layer}")
                layer = name.removeprefix(before).removesuffix(behind)
                if layer.isdecimal() and name == f"{before}{layer}{behind}":
                    return number, layer
        return None

    @property
    def kept_whole(self) -> tuple[str, ...]:
        """Endings of the Hugging Face names of matrices that a quantised engine does not quantise: embedding, LM head,
        routers and gates, and the biases of packed experts."""
        rows = [row for row in self.table if not row.quantised]
        return tuple(sorted({name.rpartition("}")[2] for row in rows for name in row.hf}))


def own_head_dim(hf: HFConfig) -> dict[str, Any]:
    """Where transformers' class has a head_dim of its own, config.json must say one. Raises KeyError."""
    if hf.get("head_dim") is None:
        raise KeyError("head_dim")
    return {"kv_channels": hf["head_dim"]}


def own_rope_theta(hf: HFConfig) -> None:
    """The same of a rope_theta that is not 10,000, the number taken elsewhere. Raises KeyError."""
    nested = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if nested.get("rope_theta") is None and hf.get("rope_theta") is None:
        raise KeyError("rope_theta")


def softmax_router(hf: HFConfig) -> dict[str, Any]:
    """Weights are the softmax over all experts, or, normalised over the chosen, the softmax over these."""
    return {"moe_router_pre_softmax": not hf.get("norm_topk_prob", False)}


SIGMOID_WITH_BIAS = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.0,
}


def sigmoid_router(hf: HFConfig) -> dict[str, Any]:
    """DeepSeek-V3's router (2412.19437, equations 12 to 16): sigmoid scores, a bias an expert that counts for the
    choice only, groups of experts, and weights normalised over the chosen, times a constant.

    The bias is left as it came: at the default rate of 0 an update does not move it. Here and below, config.json must
    say what transformers' class has a number of its own for; null is none. Raises KeyError.
    """
    groups = hf["n_group"] or 1
    limited = {"moe_router_num_groups": groups, "moe_router_group_topk": hf["topk_group"]} if groups > 1 else {}
    return SIGMOID_WITH_BIAS | limited | {"moe_router_topk_scaling_factor": hf["routed_scaling_factor"]}


def sigmoid_router_unsupported(hf: HFConfig) -> Iterator[str]:
    """Where Megatron-Core 0.19.2 computes another router than the model's."""
    if hf.get("scoring_func", "sigmoid") != "sigmoid" or hf.get("topk_method", "noaux_tc") != "noaux_tc":
        yield "a router other than scoring_func=sigmoid with topk_method=noaux_tc"
    topk, groups = hf["num_experts_per_tok"], hf.get("n_group") or 1
    if topk > 1 and not hf.get("norm_topk_prob", True):
        yield "a sigmoid router with norm_topk_prob=false"
    if groups > 1 and topk // hf["topk_group"] != 2:
        yield (
            f"num_experts_per_tok={topk} with topk_group={hf['topk_group']} (the model ranks a group by its two best "
            "experts, Megatron-Core by its best num_experts_per_tok/topk_group)"
        )


def dense_first(hf: HFConfig) -> list[int]:
    """Dense layers first, sparse ones from `first_k_dense_replace` on."""
    every = hf.get("moe_layer_freq", 1)
    return [i for i in range(hf["first_k_dense_replace"], hf["num_hidden_layers"]) if i % every == 0]


def shared_experts(hf: HFConfig) -> dict[str, Any]:
    """Shared experts beside the routed ones: in one MLP as wide as all of them."""
    count = hf["n_shared_experts"] or 0
    return {"moe_shared_expert_intermediate_size": count * hf["moe_intermediate_size"]} if count else {}
