"""A floor under replayed experts: which it refuses, and what takes their place."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ext.config import ParallelConfig
from tests.megatron_ext.batch.test_replay import trainer
from tests.support.jobs import make_samples, weighted_likelihood
from tests.support.ranks import run_alone, run_ranks

# Four tokens, four experts, top 2, which the scores order 0, 1, 2, 3.
LOGITS = np.log(np.array([[0.5, 0.3, 0.15, 0.05]] * 4, np.float32))
GIVEN = np.array([[1, 0], [2, 0], [3, 2], [-1, -1]])
CASES = [
    (None, [[1, 0], [2, 0], [3, 2], [0, 1]], 0),
    (0.1, [[1, 0], [2, 0], [3, 2], [0, 1]], 0),
    (0.2, [[1, 0], [2, 0], [2, 0], [0, 1]], 1),  # 0.05 < 0.2 x 0.3; what is given and kept comes before what is native
    (0.6, [[1, 0], [0, 1], [0, 1], [0, 1]], 2),  # 0.15 too
    (1.0, [[1, 0], [0, 1], [0, 1], [0, 1]], 2),
]
"""A floor; the selection; how many tokens it refused an expert of."""


def chosen() -> dict[tuple[str, float | None], tuple[list, list]]:
    """(selection, counts) by what the scores are, logits, probabilities or biased ones, and by the floor."""
    import torch

    from megatron_ext.batch.replay import LayerReplay
    from megatron_ext.mcore import RouterReplayAction

    out = {}
    for kind, floor in [*((k, floor) for k in ("logits", "probabilities") for floor, *_ in CASES), ("biased", 1.0)]:
        bias = torch.tensor([0.0, 0.0, 0.0, 0.7]) if kind == "biased" else None
        scores = torch.from_numpy(LOGITS if kind == "logits" else np.exp(LOGITS)) + (0.0 if bias is None else bias)
        replay = LayerReplay(floor, of_logits=kind == "logits", bias=lambda bias=bias: bias)
        replay.target_topk_idx, replay.counted = torch.from_numpy(GIVEN), torch.ones(4, dtype=torch.bool)
        replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        found, selection = replay.get_replay_topk(scores, 2, default_compute_topk=lambda s, k, **_: torch.topk(s, k))
        assert replay.counts is not None
        assert torch.equal(found, scores.gather(1, selection))
        out[kind, floor] = selection.tolist(), replay.counts.tolist()
    return out


def test_a_floor_refuses_an_expert_by_its_live_probability_and_takes_the_strongest_native_one():
    (found,) = run_alone(chosen)
    for kind in ("logits", "probabilities"):
        for floor, kept, refused in CASES:
            assert found[kind, floor] == (kept, [3, 1, 1, refused]), (kind, floor)
    # The bias makes expert 3 native; its probability, 0.05, is then the weakest, and nothing is below it.
    assert found["biased", 1.0] == ([[1, 0], [2, 0], [3, 2], [3, 0]], [3, 0, 1, 0])


def with_a_floor(config: ParallelConfig, model: str, floor: float | None, recompute: str):
    it = trainer(model, config, replay_floor=floor, recompute=recompute)
    before = it.logprobs(make_samples(routes=True))
    update = it.update(make_samples(routes=True), weighted_likelihood)
    return before.routing, update.grad_norm


def test_a_floor_is_the_same_in_recomputed_forwards_and_reaches_every_router(tiny_model_dir):
    answers = {
        key: run_ranks(with_a_floor, ParallelConfig(), str(tiny_model_dir), *key)[0]
        for key in ((None, "none"), (1.0, "none"), (1.0, "full"))
    }
    routing, norm = answers[1.0, "none"]
    assert all(counts[3] == counts[0] - counts[1] > 0 for counts in routing.values())  # at 1 whatever is not native
    assert all(counts[3] == 0 for counts in answers[None, "none"][0].values())
    assert answers[1.0, "full"][1] == pytest.approx(norm, rel=1e-6)
    assert answers[None, "none"][1] != pytest.approx(norm, rel=1e-3)
