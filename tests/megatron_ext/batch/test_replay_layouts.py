"""Every row of every route reaches its own router and token, on every layout that Megatron-Core accepts; and under
replay every layout computes the loss and the gradients of one rank."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pytest

from megatron_ext.batch.layout import plan_micro_batches
from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.parts import merge_update
from tests.support.jobs import keep_gradients, whole_gradients
from tests.support.ranks import run_ranks
from tests.support.route_codes import Seen, complaints, loss, make_samples, reading

RECOMPUTE, PACKING, MICRO_BATCHES = ("none", "selective", "full"), (True, False), (1, 2, 3)
SETTINGS = RECOMPUTE, PACKING, MICRO_BATCHES
OF_A_LAYOUT = ("tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor", "context")


def layouts() -> list[dict]:
    """Tensor, pipeline, chunks, expert, expert-tensor, context parallelism of 1 and 2, in as few ranks as hold them."""
    out = []
    for tensor, (pipeline, chunks), expert, context in itertools.product(
        (1, 2), ((1, None), (2, None), (2, 2)), (1, 2), (1, 2)
    ):
        for expert_tensor in range(1, tensor + 1):
            dense, sparse = tensor * pipeline * context, expert_tensor * expert * pipeline
            ranks = int(np.lcm(dense, sparse))
            assert ranks <= 8
            out.append({"ranks": ranks, "tensor": tensor, "sequence": tensor > 1, "pipeline": pipeline,
                        "virtual_pipeline": chunks, "expert": expert, "expert_tensor": expert_tensor,
                        "context": context})  # fmt: skip
    return out


def settings_of(layout: dict) -> list[tuple[str, bool, int]]:
    """Half of the product of the settings: every pair of their values is in it. Layouts that differ in one number have
    different halves, so what neither of the two has been through, the other has."""
    chunks = layout["virtual_pipeline"] or 1
    turn = layout["tensor"] + layout["pipeline"] + chunks + layout["expert"] + layout["context"]
    out = []
    for (i, recompute), (j, micro_batches) in itertools.product(enumerate(RECOMPUTE), enumerate(MICRO_BATCHES)):
        out.append((recompute, PACKING[(i + j + turn + layout["expert_tensor"]) % 2], micro_batches))
    return out


Case = tuple[dict, tuple[str, bool, int]]


def meetings(case: Case) -> set[tuple]:
    """Every two values that meet in it, of the layout, of the setting, and of one and the other."""
    layout, setting = case
    row = {**{key: layout[key] for key in OF_A_LAYOUT}, **dict(enumerate(setting))}
    return {(*pair, row[pair[0]], row[pair[1]]) for pair in itertools.combinations(row, 2)}


@functools.cache
def sample() -> tuple[Case, ...]:
    """Layouts with one setting each, so that every two values meet that meet in all: again and again the one is taken
    in which the most a rank do that have not met yet."""
    cases: list[Case] = [(layout, setting) for layout in layouts() for setting in settings_of(layout)]
    missing, taken = set().union(*map(meetings, cases)), []
    while missing:
        taken.append(max(cases, key=lambda case: len(missing & meetings(case)) / (1 + case[0]["ranks"])))
        missing -= meetings(taken[-1])
    return tuple(taken)


def test_in_the_sample_every_two_values_of_layouts_and_settings_meet():
    everything = [meetings((layout, setting)) for layout in layouts() for setting in settings_of(layout)]
    assert set().union(*map(meetings, sample())) == set().union(*everything)


def test_each_layout_meets_every_pair_of_settings():
    for layout in layouts():
        for one, other in itertools.combinations(range(3), 2):
            met = {(setting[one], setting[other]) for setting in settings_of(layout)}
            assert met == set(itertools.product(SETTINGS[one], SETTINGS[other])), layout


def test_each_value_of_a_layout_meets_every_setting():
    everything, met = set(itertools.product(*SETTINGS)), defaultdict(set)
    for layout in layouts():
        for key in OF_A_LAYOUT:
            met[key, layout[key]] |= set(settings_of(layout))
    assert len(met) == 12
    for value, settings in met.items():
        assert settings == everything, value


def name_of(layout: dict) -> str:
    return " ".join(f"{key}{value}" for key, value in layout.items() if value not in (None, False, 1))


@dataclass(frozen=True)
class Found:
    """One combination on one rank."""

    seen: Seen
    update: object
    gradients: dict[str, np.ndarray]


def token_budget(data_parallel: int, count: int) -> int:
    lengths = [s.input_length for s in make_samples()]
    return next(
        b for b in range(max(lengths), sum(lengths) + 1)
        if len(plan_micro_batches(lengths, token_budget=b, dp_size=data_parallel)[0]) <= count
    )  # fmt: skip


def combinations(config: ParallelConfig, model: str, combos: list[tuple[str, bool, int]]) -> list[Found]:
    """Runs on a rank: one update a combination, its routes read back, its gradients."""
    import torch.distributed as dist

    from megatron_ext.trainer import Trainer

    out, built = [], {}
    for recompute, packing, micro_batches in combos:
        settings = TrainerConfig(
            recompute=recompute, packing=packing, micro_batch_tokens=token_budget(config.data, micro_batches)
        )
        if recompute not in built:
            built = {recompute: Trainer(model, config, settings, OptimizerConfig(), replay=True)}
            keep_gradients(built[recompute].policy)
        trainer = built[recompute]
        trainer.policy.config = settings
        with reading() as seen:
            update = trainer.update(make_samples(), loss)
        gradients = whole_gradients(trainer.policy)
        out.append(Found(seen, update, gradients if dist.get_rank() == 0 else {}))
    return out


def one_rank(config: ParallelConfig, model: str) -> Found:
    """Runs on the only rank: every sample in a micro-batch of its own."""
    (found,) = combinations_of_one(config, model)
    return found


def combinations_of_one(config: ParallelConfig, model: str) -> list[Found]:
    return combinations(config, model, [("none", True, len(make_samples()))])


@functools.cache
def reference(model: str) -> Found:
    (answer,) = run_ranks(one_rank, ParallelConfig(), model)
    assert complaints([answer.seen], answer.seen, 1) == []
    return answer


def cases() -> list:
    """(layout, its settings): of all layouts those that hold every pair, and the sample."""
    pairs = [pytest.param(x, settings_of(x), id=f"{name_of(x)}-pairs", marks=pytest.mark.proof) for x in layouts()]
    return pairs + [pytest.param(x, [setting], id=f"{name_of(x)}-sample") for x, setting in sample()]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "combos"), cases())
def test_each_router_takes_exactly_its_own_rows_and_gradients_are_those_of_one_rank(coded_model_dir, layout, combos):
    model = str(coded_model_dir)
    one = reference(model)
    ranks = run_ranks(combinations, ParallelConfig(**layout), model, combos)
    expected = merge_update([one.update])["loss/objective"]
    for number, (recompute, packing, micro_batches) in enumerate(combos):
        what = f"{recompute} recomputed, {'packed' if packing else 'padded'}, {micro_batches} micro-batches"
        found = [rank[number] for rank in ranks]
        assert complaints([f.seen for f in found], one.seen, 1 if recompute == "none" else 2) == [], what
        assert merge_update([f.update for f in found])["loss/objective"] == pytest.approx(expected, rel=1e-5), what
        assert found[0].gradients.keys() == one.gradients.keys()
        for name, gradient in one.gradients.items():
            off = np.linalg.norm(found[0].gradients[name] - gradient)
            assert off <= 1e-5 * np.linalg.norm(gradient), f"{what}: {name} {off / np.linalg.norm(gradient):.1e}"
            if name.endswith("mlp.gate.weight"):
                assert np.abs(gradient).max() > 1e-4
