"""DeepSeek-V3.2: DeepSeek-V3, in whose attention an indexer chooses up to `index_topk` tokens for each to attend to
(2512.02556, section 2.1).

A token with no more before it attends to all, as in DeepSeek-V3. No more than that is built: indexers stay as they are,
and longer sequences are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_ext.hf.families.deepseek import DEEPSEEK_V3, latent_fields, latent_unsupported
from megatron_ext.hf.families.family import HFConfig, Indexer
from megatron_ext.hf.families.glm_lite import dense_layers, layers_unsupported, sparse_behind_dense
from megatron_ext.hf.tables import HF_LAYER

_INDEXER = Indexer(
    HF_LAYER + "self_attn.indexer.",
    ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight"),
    chosen="index_topk",
    heads="index_n_heads",
    width="index_head_dim",
)


def _fields(hf: HFConfig) -> dict[str, Any]:
    for name in (_INDEXER.chosen, _INDEXER.heads, _INDEXER.width):
        _ = hf[name]  # transformers' class has numbers of its own
    return latent_fields(hf)


def _unsupported(hf: HFConfig) -> Iterator[str]:
    yield from latent_unsupported(hf)
    yield from layers_unsupported(hf)
    if hf["q_lora_rank"] is None:
        yield "q_lora_rank=null (indexers read the latent of queries)"
    if hf.get("moe_layer_freq", 1) != 1:
        yield f"moe_layer_freq={hf['moe_layer_freq']}"
    if set(hf.get("layer_types") or ()) - {"indexed_attention"}:
        yield "layer_types other than indexed_attention"


DEEPSEEK_V32 = replace(
    DEEPSEEK_V3,
    fields=_fields,
    moe_layers=sparse_behind_dense,
    unsupported=_unsupported,
    server_fields=lambda hf: DEEPSEEK_V3.server_fields(hf) | {"first_k_dense_replace": dense_layers(hf)},
    # SGLang 0.5.23, arg_groups/overrides.py:530: by itself it takes fp8 for the cache on B200
    server_gpu_arguments=("--kv-cache-dtype", "bfloat16"),
    server_on_gpus="sparse attention",
    indexer=_INDEXER,
)
