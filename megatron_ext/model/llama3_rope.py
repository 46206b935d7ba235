"""The rotary embedding of Llama 3.1 and later: wavelengths beyond the context of pretraining are stretched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ext.hf.config_json import LLAMA3_ROPE


def stretch(embedding: Any, rope: Mapping[str, Any]) -> None:
    """Give Megatron-Core's RotaryEmbedding the frequencies of `rope`, settings of rope_type=llama3.

    GPTModel (0.19.2) hands on the factor alone, and leaves the other three at the numbers of Llama 3.1.
    """
    embedding.inv_freq = embedding._apply_scaling(embedding.inv_freq, **{name: rope[name] for name in LLAMA3_ROPE})
