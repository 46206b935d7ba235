"""Replayed routes: the routers take exactly what was given, and nothing stays behind."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from tests.support.jobs import EXPERTS, LAYERS, SAMPLES, TOPK, make_samples, weighted_likelihood
from tests.support.ranks import run_alone, run_ranks

LAYOUTS = [
    {},
    {"ranks": 2, "pipeline": 2, "virtual_pipeline": 2},
    {"ranks": 4, "tensor": 2, "sequence": True, "context": 2},
]
LAYOUTS_RECOMPUTED = [
    pytest.param(
        layout, recompute, marks=pytest.mark.proof if layout or recompute == "none" else (), id=f"{layout}-{recompute}"
    )
    for layout in LAYOUTS
    for recompute in ("none", "full")
]
"""Of layouts `make test` has the sample of `test_replay_layouts.py`, which finds a row at another router too."""


def trainer(model: str, config: ParallelConfig, **settings):
    from megatron_ext.trainer import Trainer

    settings = {"micro_batch_tokens": 60} | settings
    return Trainer(model, config, TrainerConfig(**settings), OptimizerConfig(lr=1e-3), replay=True)


def selections(config: ParallelConfig, model: str, recompute: str):
    """Every (token rows, selection) that any router of this rank made, by layer, forward and recomputed."""
    from megatron_ext.batch.replay import LayerReplay
    from megatron_ext.mcore import RouterReplayAction

    it = trainer(model, config, recompute=recompute)
    seen: dict[int, list[np.ndarray]] = {}
    original = LayerReplay.get_replay_topk

    def recording(self, scores, *args, **kwargs):
        backward = self.router_replay_action == RouterReplayAction.REPLAY_BACKWARD
        given = self.replay_backward_list[0] if backward else self.target_topk_idx
        probs, selection = original(self, scores, *args, **kwargs)
        seen.setdefault(self.layer_number - 1, []).append(selection[given[:, 0] >= 0].numpy())
        return probs, selection

    LayerReplay.get_replay_topk = recording  # pyright: ignore[reportAttributeAccessIssue]
    it.update(make_samples(routes=True), weighted_likelihood)
    return {layer: np.concatenate(parts) for layer, parts in seen.items()}


@pytest.mark.parametrize(("layout", "recompute"), LAYOUTS_RECOMPUTED)
def test_routers_select_exactly_the_given_experts(tiny_model_dir, layout, recompute):
    answers = run_ranks(selections, ParallelConfig(**layout), str(tiny_model_dir), recompute)
    given = np.concatenate([s.routes for s in make_samples(routes=True) if s.routes is not None])
    forwards = 2 if recompute == "full" else 1
    for layer in range(LAYERS):
        selected = np.concatenate([a[layer] for a in answers if layer in a])
        expected = np.concatenate([given[:, layer]] * forwards)
        assert sorted(map(tuple, selected)) == sorted(map(tuple, expected))


def test_missing_routes_are_native_and_counted(tiny_model_dir):
    from tests.support.jobs import outcome

    settings = TrainerConfig(micro_batch_tokens=60)
    everyone = tuple(range(SAMPLES))
    native = outcome(ParallelConfig(), tiny_model_dir, settings, make_samples(routes=False), False)
    missing = outcome(
        ParallelConfig(), tiny_model_dir, settings, make_samples(routes=True, without_routes=everyone), True
    )
    assert np.array_equal(missing.before, native.before)
    tokens = sum(s.input_length for s in make_samples(routes=True))
    assert missing.routing.tolist() == [[0, 0, tokens, 0]] * LAYERS

    some = make_samples(routes=True, without_routes=(0, 5))
    lost = sum(s.input_length for s in some if s.routes is None)
    partly = outcome(ParallelConfig(), tiny_model_dir, settings, some, True)
    assert partly.routing[:, 0].tolist() == [tokens - lost] * LAYERS
    assert partly.routing[:, 2].tolist() == [lost] * LAYERS


def test_a_row_of_minus_one_is_native_for_that_token_in_that_layer_alone(tiny_model_dir):
    from dataclasses import replace

    from tests.support.jobs import outcome

    settings = TrainerConfig(micro_batch_tokens=60)
    given = make_samples(routes=True)
    holes = []
    for i, sample in enumerate(given):
        routes = np.asarray(sample.routes).astype(np.int16)
        if i == 3:
            routes[0, 1] = routes[1, 1] = routes[0, 2] = -1
        holes.append(replace(sample, routes=routes))
    whole, partly = (outcome(ParallelConfig(), tiny_model_dir, settings, s, True) for s in (given, holes))
    assert partly.routing[:, 2].tolist() == [0, 2, 1, 0]
    assert (partly.routing[:, 0] + partly.routing[:, 2]).tolist() == whole.routing[:, 0].tolist()
    cuts = np.cumsum([s.response_length for s in given])
    changed = np.flatnonzero(partly.before != whole.before)
    assert len(changed) > 0
    assert changed.min() >= cuts[2]
    assert changed.max() < cuts[3]


def native_routes(config: ParallelConfig, model: str):
    """Routes that the model itself would take, and the counters when they are replayed."""
    from dataclasses import replace

    from megatron_ext.batch.replay import LayerReplay

    it = trainer(model, config, micro_batch_tokens=10_000)
    chosen: dict[int, np.ndarray] = {}
    original = LayerReplay.get_replay_topk

    def recording(self, scores, *args, **kwargs):
        probs, selection = original(self, scores, *args, **kwargs)
        chosen[self.layer_number - 1] = selection.numpy()
        return probs, selection

    LayerReplay.get_replay_topk = recording  # pyright: ignore[reportAttributeAccessIssue]
    plain = make_samples(routes=False)
    first = it.logprobs(plain)
    LayerReplay.get_replay_topk = original
    rows = np.stack([chosen[layer] for layer in range(LAYERS)], 1).astype(np.uint8)
    cuts = np.cumsum([s.input_length for s in plain])[:-1]
    routed = [replace(s, routes=r) for s, r in zip(plain, np.split(rows, cuts), strict=True)]
    second = it.logprobs(routed)
    shifted = [replace(s, routes=np.roll(s.routes, 1, 0)) for s in routed]
    swapped = [replace(s, routes=s.routes[:, ::-1].copy()) for s in routed]
    return first, second, it.logprobs(shifted), it.logprobs(swapped)


def test_replaying_native_routes_changes_nothing_and_wrong_ones_do(tiny_model_dir):
    ((first, second, shifted, swapped),) = run_ranks(native_routes, ParallelConfig(), str(tiny_model_dir))
    for i in range(SAMPLES):
        assert np.array_equal(first.quantities[0][i], second.quantities[0][i])
    assert all(replayed == agreed > 0 == fallen for replayed, agreed, fallen, _ in second.routing.values())
    for wrong in (shifted, swapped):
        assert max(np.abs(first.quantities[0][i] - wrong.quantities[0][i]).max() for i in range(SAMPLES)) > 1e-2
        assert all(agreed < replayed for replayed, agreed, *_ in wrong.routing.values())


def router_gradients(config: ParallelConfig, model: str):
    it = trainer(model, config)
    before = [layer.mlp.router.weight.detach().clone() for layer in it.policy.chunks[0].decoder.layers]
    it.update(make_samples(routes=True), weighted_likelihood)
    after = [layer.mlp.router.weight.detach() for layer in it.policy.chunks[0].decoder.layers]
    queues = [len(r.replay_backward_list) for c in it.policy.replays for _, r in c.layers]
    actions = [r.router_replay_action for c in it.policy.replays for _, r in c.layers]
    return [float((a - b).abs().max()) for a, b in zip(after, before, strict=True)], queues, actions


def test_routers_still_learn_and_no_state_is_left(tiny_model_dir):
    ((moved, queues, actions),) = run_ranks(router_gradients, ParallelConfig(), str(tiny_model_dir))
    assert all(m > 1e-4 for m in moved)
    assert queues == [0] * LAYERS
    assert actions == [None] * LAYERS


def wrong_shapes(config: ParallelConfig, model: str):
    from dataclasses import replace

    it = trainer(model, config)
    samples = make_samples(routes=True)
    messages = []
    for routes in (
        np.zeros((samples[0].input_length, LAYERS - 1, TOPK), np.uint8),
        np.full((samples[0].input_length, LAYERS, TOPK), EXPERTS - 1, np.uint8),
    ):
        try:
            it.logprobs([replace(samples[0], routes=routes)])
        except ValueError as error:
            messages.append(str(error))
    queues = [r.target_topk_idx for c in it.policy.replays for _, r in c.layers]
    return messages, queues


def test_routes_of_another_model_are_refused(tiny_model_dir):
    ((messages, queues),) = run_ranks(wrong_shapes, ParallelConfig(), str(tiny_model_dir))
    assert len(messages) == 2
    assert "the model has 4, top 2" in messages[0]
    assert "expert 7 twice" in messages[1]
    assert queues == [None] * LAYERS


def around_replay(config: ParallelConfig, model: str):
    messages = []
    for settings in (
        {"router_fusion": True},
        {"extra": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01}},
    ):
        try:
            trainer(model, config, **settings)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_a_router_that_goes_around_replay_is_refused(tiny_model_dir):
    ((fused, auxiliary),) = run_ranks(around_replay, ParallelConfig(), str(tiny_model_dir))
    assert "returns before replay is consulted" in fused
    assert "counts the experts of a top-k of its own" in auxiliary


def trained_on_the_first_experts(config: ParallelConfig, model: str):
    """Log-probs after an update in which every token has the same experts; of two ranks the second one's have none."""
    from dataclasses import replace

    same = np.arange(TOPK, dtype=np.uint8)
    samples = [
        replace(s, routes=np.broadcast_to(same, (s.input_length, LAYERS, TOPK))) for s in make_samples(routes=False)
    ]
    it = trainer(model, config, recompute="none")
    it.update(samples, weighted_likelihood)
    return it.logprobs(samples)


def test_a_rank_whose_experts_no_token_has_trains_with_the_others(tiny_model_dir):
    from megatron_ext.parts import merge_tokens

    alone, apart = (
        merge_tokens(run_ranks(trained_on_the_first_experts, ParallelConfig(**layout), str(tiny_model_dir)), SAMPLES)[0]
        for layout in ({}, {"ranks": 2, "expert": 2})
    )
    assert max(np.abs(mine - theirs).max() for mine, theirs in zip(apart, alone, strict=True)) < 1e-5


def three_models(config: ParallelConfig, model: str):
    """A policy that replays beside a reference and a critic of the same layers, in one process."""
    from megatron_ext.trainer import Trainer

    settings = TrainerConfig(micro_batch_tokens=60, recompute="full")
    it = Trainer(model, config, settings, OptimizerConfig(), replay=True, reference=True, critic=OptimizerConfig())
    alone = Trainer(model, config, settings, OptimizerConfig(), replay=False)
    samples, plain = make_samples(routes=True), make_samples(routes=False)
    assert it.reference is not None
    it.keep_reference()
    parts = (
        it.logprobs(samples),
        it.reference_logprobs(samples),
        alone.logprobs(plain),
        it.logprobs(samples, "native"),
        it.values(samples),
        it.logprobs(samples),
    )
    return [part.quantities[0] if part.quantities else {} for part in parts]


def test_reference_and_critic_route_natively_beside_a_policy_that_replays(tiny_model_dir):
    chunks = ParallelConfig(ranks=2, pipeline=2, virtual_pipeline=2)
    _, last_stage = run_ranks(three_models, chunks, str(tiny_model_dir))
    replayed, reference, alone, native, values, again = last_stage
    for i in range(SAMPLES):
        assert np.array_equal(reference[i], alone[i])
        assert np.array_equal(native[i], alone[i])
        assert np.array_equal(again[i], replayed[i])
        assert (values[i] == 0).all()
    assert max(np.abs(replayed[i] - alone[i]).max() for i in range(SAMPLES)) > 1e-2


def recorded(config: ParallelConfig, model: str, packing: bool):
    """R2 on a rank: the routes of a native forward, log-probs under them, and the counters of an update with them."""
    from megatron_ext.trainer import Trainer

    settings = TrainerConfig(micro_batch_tokens=60, packing=packing, recompute="full")
    it = Trainer(model, config, settings, OptimizerConfig(lr=1e-9), replay=True)
    return it.logprobs(make_samples(routes=False), "record")


def replay_recorded(config: ParallelConfig, model: str, packing: bool, routes):
    from dataclasses import replace

    from megatron_ext.trainer import Trainer

    settings = TrainerConfig(micro_batch_tokens=100, packing=packing, recompute="full")
    it = Trainer(model, config, settings, OptimizerConfig(lr=1e-9), replay=True)
    samples = [replace(s, routes=r) for s, r in zip(make_samples(routes=False), routes, strict=True)]
    return it.update(samples, weighted_likelihood).seen


R2_LAYOUTS = [
    {},
    {"ranks": 2},
    {"ranks": 2, "context": 2},
    {"ranks": 2, "pipeline": 2, "virtual_pipeline": 2},
    pytest.param(
        {"ranks": 8, "tensor": 2, "sequence": True, "pipeline": 2, "expert": 2, "context": 2}, marks=pytest.mark.proof
    ),
]


@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.proof)], ids=["packed", "padded"])
@pytest.mark.parametrize("layout", R2_LAYOUTS, ids=str)
def test_r2_records_the_native_routes_of_every_token_and_updates_replay_them(tiny_model_dir, layout, packing):
    from megatron_ext.parts import merge_routes, merge_routing, merge_tokens

    config, model = ParallelConfig(**layout), str(tiny_model_dir)
    parts = run_ranks(recorded, config, model, packing)
    routes = merge_routes(parts, SAMPLES, LAYERS, np.dtype(np.uint8))
    assert [r.shape for r in routes] == [(s.input_length, LAYERS, TOPK) for s in make_samples(routes=False)]
    seen = run_ranks(replay_recorded, config, model, packing, routes)
    tokens = sum(len(r) for r in routes)
    counts = merge_routing(seen)
    assert counts[:, 0].tolist() == [tokens] * LAYERS
    assert (counts[:, 1] >= tokens - 1).all()  # one may sit on a tie that another micro-batch rounds the other way
    for mine, theirs in zip(merge_tokens(parts, SAMPLES)[0], merge_tokens(seen, SAMPLES)[0], strict=True):
        assert np.abs(mine - theirs).max() < 1e-5


def counted_without_waiting() -> str:
    """Runs in a process of its own: tensors without numbers cannot be read, nor copied to another device."""
    import torch

    from megatron_ext.batch.replay import LayerReplay

    replay = LayerReplay()
    replay.counted = torch.ones(6, dtype=torch.bool, device="meta")
    chosen = torch.zeros(6, 2, dtype=torch.int64, device="meta")
    for _ in range(2):
        none = torch.zeros(6, dtype=torch.bool, device="meta")
        replay._count(chosen, chosen, none, none)
    assert replay.counts is not None
    return replay.counts.device.type


def test_counters_stay_on_the_device_of_the_routers():
    assert run_alone(counted_without_waiting) == ["meta"]


CUTS = [{}, {"cp_size": 2, "cp_rank": 1}, {"sequence_parallel_size": 2}, {"align": 16}]


def armed() -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """By layout: samples, which rows are real tokens, the rows that the routers are given, and those that they are
    given where something that looks real stands in the padding, as an engine may leave there."""
    import torch

    from megatron_ext.batch.layout import TokenLayout
    from megatron_ext.batch.micro_batch import make_micro_batch
    from megatron_ext.batch.replay import ChunkReplay, LayerReplay

    model: Any = SimpleNamespace(num_layers=LAYERS, topk=TOPK, num_experts=EXPERTS, moe_layers=range(LAYERS))
    out = []
    for count, packed, cut in itertools.product((0, 1, 5), (True, False), CUTS):
        samples = make_samples(routes=True)[:count]
        layout = TokenLayout(tuple(s.input_length for s in samples) or (1,), packed=packed, **cut)
        batch = make_micro_batch(range(count), samples, layout, torch.device("cpu"), model)
        assert batch.routes is not None
        chunk = ChunkReplay.__new__(ChunkReplay)
        chunk.layers = [(layer, LayerReplay()) for layer in range(LAYERS)]
        given = []
        for routes in (batch.routes, torch.where(batch.counted[:, None, None], batch.routes, 1)):
            chunk.set(routes, batch.counted, recompute=True)
            given.append(np.stack([replay.target_topk_idx.numpy() for _, replay in chunk.layers], 1))
        out.append((count, batch.counted.numpy(), *given))
    return out


def test_a_row_of_padding_is_never_taken_for_a_real_one():
    (layouts,) = run_alone(armed)
    assert len(layouts) == 3 * 2 * len(CUTS)
    padding = 0
    for samples, counted, given, stale in layouts:
        assert (given[~counted] == -1).all()
        assert (given[counted] >= 0).all()
        assert np.array_equal(stale, given)
        assert counted.any() == bool(samples)
        padding += int((~counted).sum())
    assert padding > 100
