"""GLM-4.7-Flash: DeepSeek-V3's attention, experts and names, with GLM's router in the server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_ext.hf.families.deepseek import DEEPSEEK_V3, LATENT_CACHE, latent_unsupported
from megatron_ext.hf.families.family import HFConfig, Needed, ServerRouter, dense_first


def dense_layers(hf: HFConfig) -> int:
    """How many layers at the start are dense: transformers says it of every layer, the published file and SGLang in
    one number. Raises KeyError where neither does."""
    types = hf.get("mlp_layer_types")
    return hf["first_k_dense_replace"] if types is None else types.count("dense")


def sparse_behind_dense(hf: HFConfig) -> list[int]:
    """Layers with a router, counted from 0."""
    return dense_first(hf | {"first_k_dense_replace": dense_layers(hf), "moe_layer_freq": 1})


def layers_unsupported(hf: HFConfig) -> Iterator[str]:
    """Where the two say different things, or dense layers are not the first."""
    dense, layers = dense_layers(hf), hf["num_hidden_layers"]
    if hf.get("first_k_dense_replace", dense) != dense:
        yield f"first_k_dense_replace={hf['first_k_dense_replace']} and mlp_layer_types with {dense} dense layers"
    if hf.get("mlp_layer_types") not in (None, ["dense"] * dense + ["sparse"] * (layers - dense)):
        yield "mlp_layer_types other than dense layers first and sparse ones behind"


def _unsupported(hf: HFConfig) -> Iterator[str]:
    yield from latent_unsupported(hf)
    yield from layers_unsupported(hf)


GLM4_MOE_LITE = replace(
    DEEPSEEK_V3,
    moe_layers=sparse_behind_dense,
    unsupported=_unsupported,
    rope_types=("default",),
    needs=(LATENT_CACHE, Needed("router", "fp32", "GLM's routers are float32 in SGLang whatever is asked for")),
    server_router=ServerRouter("glm4_moe_lite.Glm4MoeLiteGate", "float32"),
    server_ties=False,
    server_alone=lambda hf: {},
    server_fields=lambda hf: {"first_k_dense_replace": dense_layers(hf)},
)
