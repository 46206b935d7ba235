"""What stands in a Hugging Face config.json, under the several names that it may have there."""

from __future__ import annotations

import json
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
    the type `type`."""
    nested = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    nested["rope_type"] = nested.get("rope_type") or nested.get("type") or "default"
    flat = {k: hf[k] for k in ("rope_theta", "partial_rotary_factor") if hf.get(k) is not None}
    return {"rope_theta": 10000.0} | flat | nested


def wrong_fields(hf: dict[str, Any]) -> Iterator[str]:
    """What is missing, of another type, or said twice, a sentence each. Where a number is missing, transformers takes
    the default of its class, which need not be the model's."""
    asked = _COUNTS + (("num_experts_per_tok",) if _experts(hf) else ())
    for name in asked + (("max_position_embeddings",) if "max_position_embeddings" in hf else ()):
        value, instead = hf.get(name), "transformers would take its class's own number, which need not be this model's"
        if name == "num_key_value_heads" and name in hf:
            instead = f"transformers would take num_attention_heads={hf.get('num_attention_heads')}"
        if value is None:
            yield f"{name} is {'null' if name in hf else 'missing'} ({instead}); write it"
        elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
            yield f"{name} must be a whole number of at least 1, not {value!r}"
    given = [name for name in ("rope_parameters", "rope_scaling") if hf.get(name) is not None]
    wrong = [name for name in given if not isinstance(hf[name], dict)]
    for name in wrong:
        yield f"{name} must be an object, not {hf[name]!r}"
    if len(given) == 2 and not wrong:
        alone = [rope_settings(hf | {other: None}) for other in given]
        if _without_type(alone[0]) != _without_type(alone[1]):
            yield (
                "rope_parameters and rope_scaling are both there and differ (transformers would take rope_scaling); "
                "leave one out"
            )


def _without_type(rope: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in rope.items() if key != "type"}  # rope_type says the same


def _experts(hf: dict[str, Any]) -> bool:
    return any(hf.get(key) for key in _EXPERTS)


def num_experts(hf: dict[str, Any]) -> int:
    """Routed experts a layer of a Hugging Face config, under whichever name its family uses; 0: a dense model."""
    return next((hf[k] for k in _EXPERTS if hf.get(k)), 0)


def draft_tensors(hf: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Which tensor names belong to multi-token-prediction layers.

    They stand behind the model's own layers, draft tokens for speculative decoding, and are no part of the policy:
    they are left out, by name and in the log, and the config of an exported model says that it has none.
    """
    count, first = hf.get("num_nextn_predict_layers") or 0, hf["num_hidden_layers"]
    hit = re.compile(r"model\.layers\.(\d+)\.")
    return sorted(n for n in names if (m := hit.match(n)) and first <= int(m[1]) < first + count)
