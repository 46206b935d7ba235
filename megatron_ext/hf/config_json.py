"""What stands in a Hugging Face config.json, under the several names that it may have there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """config.json of a model directory. FileNotFoundError says what is missing."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} is no Hugging Face model directory: it has no config.json")
    return json.loads(file.read_text())


def rope_settings(hf: dict[str, Any]) -> dict[str, Any]:
    """rope_theta, rope_type and what the type needs. transformers 5 nests them; earlier files hold them flat, or call
    the type `type`."""
    nested = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    nested["rope_type"] = nested.get("rope_type") or nested.get("type") or "default"
    flat = {k: hf[k] for k in ("rope_theta", "partial_rotary_factor") if hf.get(k) is not None}
    return {"rope_theta": 10000.0} | flat | nested


def num_experts(hf: dict[str, Any]) -> int:
    """Routed experts a layer of a Hugging Face config, under whichever name its family uses; 0: a dense model."""
    return next((hf[k] for k in ("num_experts", "num_local_experts", "n_routed_experts") if hf.get(k)), 0)


def draft_tensors(hf: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Which tensor names belong to multi-token-prediction layers.

    They stand behind the model's own layers, draft tokens for speculative decoding, and are no part of the policy:
    they are left out, by name and in the log, and the config of an exported model says that it has none.
    """
    count, first = hf.get("num_nextn_predict_layers") or 0, hf["num_hidden_layers"]
    hit = re.compile(r"model\.layers\.(\d+)\.")
    return sorted(n for n in names if (m := hit.match(n)) and first <= int(m[1]) < first + count)
