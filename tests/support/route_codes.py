"""Routes that say where they belong: the experts of a row are the digits of (sample, position, layer)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_ext.batch.layout import Sample

LAYERS, EXPERTS, TOPK, VOCABULARY = 4, 8, 3, 64
LENGTHS = ((2, 3), (4, 9), (1, 6), (3, 3), (5, 8), (2, 2), (1, 12))  # prompt, response
MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOPK,
    "norm_topk_prob": True,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
Place = tuple[int, int, int]
"""sample, position, layer"""

_TRIPLES = list(itertools.permutations(range(EXPERTS), TOPK))
np.random.default_rng(0).shuffle(_TRIPLES)
PLACES: list[Place] = [
    (s, t, layer) for s, (p, n) in enumerate(LENGTHS) for t in range(p + n - 1) for layer in range(LAYERS)
]
ROUTE_OF: dict[Place, tuple[int, ...]] = dict(zip(PLACES, map(tuple, _TRIPLES), strict=False))
PLACE_OF = {route: place for place, route in ROUTE_OF.items()}
assert len(PLACE_OF) == len(PLACES) < len(_TRIPLES)


def make_samples() -> list[Sample]:
    """One sample a length, every row of its routes the code of its place."""
    rng = np.random.default_rng(1)
    out = []
    for s, (prompt, response) in enumerate(LENGTHS):
        routes = np.array(
            [[ROUTE_OF[s, t, layer] for layer in range(LAYERS)] for t in range(prompt + response - 1)], np.uint8
        )
        tokens = rng.integers(0, VOCABULARY, prompt + response).astype(np.int32)
        out.append(Sample(tokens, prompt, {"weight": float(rng.normal())}, routes))
    return out


@dataclass
class Seen:
    """What routers were told and by which tokens: place -> the scores of every token that was routed by its code, and
    whatever was wrong."""

    scores: dict[Place, list[np.ndarray]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


@contextmanager
def reading() -> Iterator[Seen]:
    """Within, every replayed row that any router of this process takes is read back."""
    from megatron_ext.batch.replay import LayerReplay
    from megatron_ext.mcore import RouterReplayAction

    seen, original = Seen(), LayerReplay.get_replay_topk

    def read(self: Any, scores: Any, *args: Any, **kwargs: Any) -> Any:
        action = self.router_replay_action
        queued = action == RouterReplayAction.REPLAY_BACKWARD and self.replay_backward_list
        given = self.replay_backward_list[0] if queued else self.target_topk_idx
        probs, selection = original(self, scores, *args, **kwargs)
        if action is None:
            seen.wrong.append(f"layer {self.layer_number - 1} routed natively")
            return probs, selection
        rows = (given[:, 0] >= 0).numpy()
        for route, score in zip(selection.numpy()[rows], scores.detach().numpy()[rows], strict=True):
            place = PLACE_OF.get(tuple(route.tolist()))
            if place is None or place[2] != self.layer_number - 1:
                seen.wrong.append(f"layer {self.layer_number - 1} took the route {route.tolist()} of {place}")
            else:
                seen.scores.setdefault(place, []).append(score.copy())
        return probs, selection

    LayerReplay.get_replay_topk = read  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield seen
    finally:
        LayerReplay.get_replay_topk = original


def complaints(seen: list[Seen], reference: Seen, times: int) -> list[str]:
    """What the routers of all ranks took, against one rank that ran sample by sample.

    times: how often each place must have been routed. A row at another token than its own is known by that token's
    scores, which are those of the reference only where token, position and everything before it are right.
    """
    out = [w for s in seen for w in s.wrong]
    for place, (expected, *_) in reference.scores.items():
        scores = [score for s in seen for score in s.scores.get(place, [])]
        if len(scores) != times:
            out.append(f"{place} was routed {len(scores)} times, not {times}")
        off = max((float(np.abs(score - expected).max()) for score in scores), default=0.0)
        if off > 1e-4:
            out.append(f"the token routed by {place} is another: its scores differ by {off:.1e}")
    return out


Loss = Callable[[Any], tuple[Any, dict]]


def loss(batch: Any) -> tuple[Any, dict]:
    """A likelihood, weighted by sample."""
    import torch

    weights = torch.tensor([row["weight"] for row in batch.rows])
    return -((batch.quantities[0] * batch.mask).sum(1) * weights).sum() / len(LENGTHS), {}
