"""What the longest sequence of a run takes: room in the servers' caches, and the routes that come with it.

A server admits as many sequences as fit at their mean length; where all of them run on to the longest, it takes some
out of its cache and computes them again later. SGLang keeps the routes of every token in its cache in a table of int32
in the machine's memory, one a rank (0.5.23, `RoutedExpertsCapturer`). An answer carries its own in the narrowest type
that holds them, as base64; a trainer rank has those of a micro-batch as int64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_ext.batch.routes import route_dtype
from megatron_ext.hf.description import ModelDescription
from pipeline.config import Config

if TYPE_CHECKING:
    from pipeline.plan.sampling import Server

BASE64 = 4 / 3
LONG = 16_384
"""Tokens of a sequence from which on a plan says more of it."""


@dataclass(frozen=True)
class Longest:
    """tokens: of prompt and answer. at_once: such sequences that a server's cache holds. asked: sequences that a server
    has to answer at the same time. seconds: that the answer takes at least, token by token, alone on a server.
    routes: bytes as they are kept; wire: in the answer; table: of a server's rank, all that its cache holds."""

    tokens: int
    at_once: int
    asked: float
    seconds: float
    routes: float
    wire: float
    table: float


def longest_of(config: Config, model: ModelDescription, one: Server, servers: int) -> Longest:
    """one: a server of the run, which has so many."""
    prompt, rollout, replay = config.data.max_prompt_tokens, config.rollout, config.replay.of_model(model.num_experts)
    tokens = prompt + config.longest_rollout
    row = model.num_layers * model.topk if replay.any else 0
    kept = row * np.dtype(route_dtype(model.num_experts)).itemsize if row else 0.0
    answers = rollout.prompts_per_step * rollout.samples_per_prompt * (1 + rollout.steps_ahead)
    usable = min(filter(None, (one.cache_tokens, config.server.max_total_tokens)), default=0)
    step = one.step_s(1, prompt + config.longest_rollout / 2)
    return Longest(
        tokens=tokens,
        at_once=usable // tokens,
        asked=answers / servers,
        seconds=config.longest_rollout * step,
        routes=tokens * kept,
        wire=tokens * kept * BASE64 if replay.from_server else 0.0,
        table=4.0 * row * one.cache_tokens if replay.from_server else 0.0,
    )
