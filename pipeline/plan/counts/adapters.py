"""How many parameters are trained where a run trains adapters (`lora`), in the layout of `megatron_ext.lora.adapter`:

A  n r in,  B  out r    a layer of n Hugging Face matrices with adapters; B has the rows of the others too

column-parallel  A whole, B / t     row-parallel  A / t, B whole     on every rank  both whole
"""

from __future__ import annotations

from megatron_ext.config import LoraConfig, ParallelConfig
from megatron_ext.hf.description import ModelDescription
from megatron_ext.hf.tables import Row
from megatron_ext.lora.targets import Target, choose_targets, group_of, layers_with
from pipeline.plan.counts.parameters import Count, stage_layers


def trained_count(model: ModelDescription, parallel: ParallelConfig, lora: LoraConfig, stage: int = 0) -> Count:
    """Of a rank of a pipeline stage: adapters, and routers where these are trained too."""
    held, count = set(stage_layers(model, parallel, stage)), Count()
    for target in choose_targets(model, lora):
        here = len(held.intersection(layers_with(target.row, model)))
        tensor = (parallel.expert_tensor or parallel.tensor) if target.row.expert else parallel.tensor
        each = here * _one(target, model, lora.rank, tensor)
        if target.row.expert:
            count += Count(expert=each * (model.num_experts // parallel.expert))
        else:
            count += Count(dense=each)
    if lora.router == "trained":
        routers = len(held.intersection(model.moe_layers))
        count += Count(dense=routers * model.num_experts * (model.hidden + model.biased))
    return count


def _one(target: Target, model: ModelDescription, rank: int, tensor: int) -> int:
    """Of one layer, or of one of its experts."""
    out, width = shape(target.row, model)
    layer = target.row.megatron.partition("linear_")[2].partition(".")[0]
    column, row = layer not in (*_ROWS, *_WHOLE), layer in _ROWS
    a, b = len(target.parts) * width * rank, out * rank
    return (a // tensor if row else a) + (b // tensor if column else b)


_ROWS, _WHOLE = ("proj", "fc2"), ("q_down_proj", "kv_down_proj")


def shape(row: Row, model: ModelDescription) -> tuple[int, int]:
    """(out, in) of a linear layer's whole weight, of one expert's where it is of experts."""
    h, f = model.hidden, model.fields
    layer = row.megatron.partition("linear_")[2].partition(".")[0]
    if layer in ("fc1", "fc2"):
        width = {"experts": model.expert_ffn, "shared_experts": model.shared_ffn, "dense": model.ffn}[group_of(row)]
        return (2 * width, h) if layer == "fc1" else (h, width)
    if layer == "proj":
        return h, model.value
    if layer == "qkv":
        return (1 + model.output_gate) * model.query + 2 * model.key_value, h
    q_lora, kv_lora = f["q_lora_rank"], f["kv_lora_rank"]
    return {
        "q_proj": (model.query, h),
        "q_down_proj": (q_lora, h),
        "q_up_proj": (model.query, q_lora),
        "kv_down_proj": (kv_lora + f["qk_pos_emb_head_dim"], h),
        "kv_up_proj": (model.heads * (f["qk_head_dim"] + f["v_head_dim"]), kv_lora),
    }[layer]
