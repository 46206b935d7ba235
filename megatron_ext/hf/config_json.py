"""What stands in a Hugging Face config.json, under the several names that it may have there."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_OPTIONAL = (
    *_EXPERTS,
    *("moe_intermediate_size", "shared_expert_intermediate_size", "decoder_sparse_step", "moe_layer_freq"),
    *("n_group", "topk_group", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("head_dim", "rotary_dim"),
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_conv_kernel_dim", "full_attention_interval"),
    *("index_topk", "index_n_heads", "index_head_dim"),
)
"""Whole numbers of at least 1 where they are there and not null."""
DRAFT_LAYERS = ("num_nextn_predict_layers", "num_mtp_modules")
"""How many multi-token-prediction layers there are, by either name."""
_FROM_ZERO = ("first_k_dense_replace", "n_shared_experts", *DRAFT_LAYERS)
_TRUTHS = ("tie_word_embeddings", "norm_topk_prob", "attention_bias", "qkv_bias", "use_qk_norm", "use_sliding_window")
_NUMBERS = ("rms_norm_eps", "rope_theta", "routed_scaling_factor", "partial_rotary_factor", "swiglu_limit")
_OF_EVERY_LAYER = ("layer_types", "mlp_layer_types")
_LISTS = ("mlp_only_layers", *_OF_EVERY_LAYER)
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""What rope_type=llama3 is made of, beside its base."""
_OBJECTS = ("rope_parameters", "rope_scaling", "quantization_config")


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """config.json of a model directory. FileNotFoundError says what is missing; ValueError names the file and the line
    where it is no JSON."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} is no Hugging Face model directory: it has no config.json")
    try:
        hf = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {error.lineno}, is not JSON: {error.msg}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(hf, dict):
        raise ValueError(f"{file} must hold an object, not a {type(hf).__name__}")
    return hf


def rope_settings(hf: dict[str, Any]) -> dict[str, Any]:
    """rope_theta, rope_type and what the type needs. transformers 5 nests them; earlier files hold them flat, or call
    the type `type`. MiniMax-M2 says how many numbers of a head are rotated, others which part of it."""
    nested = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    nested["rope_type"] = nested.get("rope_type") or nested.get("type") or "default"
    flat = {k: hf[k] for k in ("rope_theta", "partial_rotary_factor") if hf.get(k) is not None}
    whole = hf.get("rotary_dim") and hf.get("head_dim")
    part = {"partial_rotary_factor": hf["rotary_dim"] / hf["head_dim"]} if whole else {}
    return {"rope_theta": 10000.0} | part | flat | nested


def wrong_fields(hf: dict[str, Any], without: tuple[str, ...] = ()) -> Iterator[str]:
    """What is missing, of another type, or said twice, a sentence each; where there is nothing of these, what does not
    go together. Where a number is missing, transformers takes the default of its class, which need not be the model's.

    without: fields that its family does not have.
    """
    wrong = [*_wrong_counts(hf, without), *_wrong_types(hf)]
    yield from wrong or (*_contradictions(hf), *_wrong_rope(hf))


def _wrong_counts(hf: dict[str, Any], without: tuple[str, ...]) -> Iterator[str]:
    """Of the numbers that every model needs, and of those that some have."""
    asked = tuple(name for name in _COUNTS if name not in without)
    asked += ("num_experts_per_tok",) if _experts(hf) else ()
    for name in asked + (("max_position_embeddings",) if "max_position_embeddings" in hf else ()):
        value, instead = hf.get(name), "transformers would take its class's own number, which need not be this model's"
        if name == "num_key_value_heads" and name in hf:
            instead = f"transformers would take num_attention_heads={hf.get('num_attention_heads')}"
        if value is None:
            yield f"{name} is {'null' if name in hf else 'missing'} ({instead}); write it"
        elif not _whole(value, 1):
            yield f"{name} must be a whole number of at least 1, not {value!r}"
    for names, least in ((_OPTIONAL, 1), (_FROM_ZERO, 0)):
        for name in names:
            if hf.get(name) is not None and not _whole(hf[name], least):
                yield f"{name} must be a whole number of at least {least}, not {hf[name]!r}"


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _wrong_types(hf: dict[str, Any]) -> Iterator[str]:
    """Of what is there and not null."""
    given = {name: value for name, value in hf.items() if value is not None}
    rope = {f"{at}.{k}": v for at in _OBJECTS[:2] if isinstance(given.get(at), dict) for k, v in given[at].items()}
    for name, value in (given | rope).items():
        last = name.rpartition(".")[2]
        if name in _TRUTHS and not isinstance(value, bool):
            yield f"{name} must be true or false, not {value!r}"
        if (last in _NUMBERS or (name in rope and last == "factor")) and not _positive(value):
            yield f"{name} must be a number above 0, not {value!r}"
        if name in _LISTS and not isinstance(value, list):
            yield f"{name} must be a list, not {value!r}"
        if name in _OBJECTS and not isinstance(value, dict):
            yield f"{name} must be an object, not {value!r}"
    if given.get("rms_norm_eps") is None:
        yield "rms_norm_eps is missing (transformers would take its class's own number, which need not be this model's)"


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _contradictions(hf: dict[str, Any]) -> Iterator[str]:
    """Numbers, each right, that do not go together."""
    counts = {name: hf[name] for name in _EXPERTS if hf.get(name)}
    if len(set(counts.values())) > 1:
        yield f"{' and '.join(f'{name}={n}' for name, n in counts.items())} differ; leave out the one that is wrong"
    elif counts and hf["num_experts_per_tok"] > num_experts(hf):
        yield f"num_experts_per_tok={hf['num_experts_per_tok']} is more than {next(iter(counts))}={num_experts(hf)}"
    hidden, heads, kv_heads = hf["hidden_size"], hf["num_attention_heads"], hf["num_key_value_heads"]
    latent = hf.get("kv_lora_rank") is not None
    if not latent and hf.get("head_dim") is None and hidden % heads:
        yield f"head_dim is missing, and hidden_size={hidden} does not divide by num_attention_heads={heads}"
    if not latent and heads % kv_heads:
        yield f"num_attention_heads={heads} does not divide by num_key_value_heads={kv_heads}"
    layers = hf["num_hidden_layers"]
    for name in _OF_EVERY_LAYER:
        if hf.get(name) is not None and len(hf[name]) != layers:
            yield f"{name} has {len(hf[name])} entries for num_hidden_layers={layers}"
    turned, head = hf.get("rotary_dim"), hf.get("head_dim")
    if turned and head and turned != rope_settings(hf)["partial_rotary_factor"] * head:
        yield f"rotary_dim={turned} is not partial_rotary_factor of head_dim={head}; leave one out"
    groups, chosen = hf.get("n_group") or 1, hf.get("topk_group")
    if groups > 1 and (chosen is None or chosen > groups):
        yield f"topk_group={chosen} must be of 1 to n_group={groups} groups"
    if groups > 1 and num_experts(hf) % groups:
        yield f"{num_experts(hf)} experts do not divide by n_group={groups}"
    odd = [i for i in hf.get("mlp_only_layers") or () if not _whole(i, 0)]
    if odd:
        yield f"mlp_only_layers must hold numbers of layers, not {odd[0]!r}"


def _wrong_rope(hf: dict[str, Any]) -> Iterator[str]:
    """Where the rotary embedding is said twice, or in part."""
    given = [name for name in ("rope_parameters", "rope_scaling") if hf.get(name) is not None]
    if len(given) == 2:
        alone = [rope_settings(hf | {other: None}) for other in given]
        if _without_type(alone[0]) != _without_type(alone[1]):
            yield (
                "rope_parameters and rope_scaling are both there and differ (transformers would take rope_scaling); "
                "leave one out"
            )
    for where in given:
        for name in ("rope_theta", "partial_rotary_factor"):
            flat, nested = hf.get(name), hf[where].get(name)
            if flat is not None and nested is not None and flat != nested:
                yield f"{name} is {flat}, and {nested} in {where}; leave one out"
    rope = rope_settings(hf)
    if rope["rope_type"] == "llama3" and (missing := [name for name in LLAMA3_ROPE if rope.get(name) is None]):
        yield f"rope_type llama3 lacks {', '.join(missing)}; write what the model was trained with"


def _without_type(rope: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in rope.items() if key != "type"}  # rope_type says the same


def _experts(hf: dict[str, Any]) -> bool:
    return any(hf.get(key) for key in _EXPERTS)


def num_experts(hf: dict[str, Any]) -> int:
    """Routed experts a layer of a Hugging Face config, under whichever name its family uses; 0: a dense model."""
    return next((hf[k] for k in _EXPERTS if hf.get(k)), 0)


def draft_tensors(hf: dict[str, Any], names: Iterable[str], beginning: str | None = None) -> list[str]:
    """Which tensor names belong to multi-token-prediction layers, which draft tokens for speculative decoding.

    They stand behind the model's own layers, or have a `beginning` of their own.
    """
    if beginning is not None:
        return sorted(n for n in names if n.startswith(beginning))
    count, first = max(hf.get(name) or 0 for name in DRAFT_LAYERS), hf.get("num_hidden_layers", 0)
    hit = re.compile(r"model\.layers\.(\d+)\.")
    return sorted(n for n in names if (m := hit.match(n)) and first <= int(m[1]) < first + count)
