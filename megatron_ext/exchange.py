"""Parts of how a network computes log-probs, exchanged for the length of a measurement: what a diagnosis turns, one at
a time."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megatron_ext.config import Head
from megatron_ext.hf.description import ModelDescription

if TYPE_CHECKING:
    from megatron_ext.network import Network


@dataclass(frozen=True)
class Exchange:
    """What to compute otherwise; the defaults leave everything as it is.

    label_shift: the label of an input token is the token so many places further on. A place outside the sequence gives
                 its first or last token: those log-probs mean nothing.
    temperature: of the log-probs.
    head:        how the LM head makes logits.
    rope_theta:  base of the rotary embedding's frequencies.
    """

    label_shift: int = 0
    temperature: float | None = None
    head: Head | None = None
    rope_theta: float | None = None


def exchangeable_rope_theta(model: ModelDescription) -> float | None:
    """The base of the rotary embedding where `exchanged` can exchange it, else None.

    Scaled embeddings (YaRN, llama3) and multi-latent attention build their frequencies from more than
    the base, inside each layer.
    """
    rope = model.rope
    return float(rope["rope_theta"]) if rope["rope_type"] == "default" and not model.latent else None


@contextlib.contextmanager
def exchanged(network: Network, exchange: Exchange) -> Iterator[None]:
    """The network computes as `exchange` says until the block ends. Raises ValueError for a rope_theta where
    `exchangeable_rope_theta` is None."""
    kept = network.label_shift, network.precision
    if exchange.rope_theta is not None and exchangeable_rope_theta(network.model) is None:
        raise ValueError("the frequencies of this model's rotary embedding do not follow from rope_theta alone")
    rotary = [chunk.rotary_pos_emb for chunk in network.chunks] if exchange.rope_theta is not None else []
    network.label_shift += exchange.label_shift
    chosen = {"temperature": exchange.temperature, "head": exchange.head}
    network.precision = network.precision.model_copy(update={k: v for k, v in chosen.items() if v is not None})
    try:
        for chunk in network.chunks if rotary else ():
            chunk.rotary_pos_emb = _with_base(chunk.rotary_pos_emb, exchange.rope_theta)
        yield
    finally:
        network.label_shift, network.precision = kept
        for chunk, embedding in zip(network.chunks, rotary, strict=False):
            chunk.rotary_pos_emb = embedding


def _with_base(embedding: Any, base: float | None) -> Any:
    """A rotary embedding of another base. A new object: Megatron-Core caches what each one answers."""
    assert base is not None
    out = copy.copy(embedding)
    size = 2 * len(embedding.inv_freq)
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=embedding.inv_freq.device) / size
    out.inv_freq = 1.0 / (base**exponents)
    return out
