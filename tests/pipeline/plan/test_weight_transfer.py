"""Seconds and bytes of a transfer by senders, against what the trainer's own division gives and by hand."""

import pytest

from megatron_ext.config import ParallelConfig
from megatron_ext.hf.senders.assignment import Place, Unit, assign, choose_senders, holds_its_own
from pipeline.config import load_config_and_model
from pipeline.plan.counts.parameters import total
from pipeline.plan.hardware import EFFICIENCY, GPUS
from pipeline.plan.weight_transfer import bytes_by_sender, weight_transfer


def planned(preset: str, *overrides: str):
    config, model = load_config_and_model(f"configs/{preset}.yaml", list(overrides))
    return weight_transfer(config, model, GPUS["h100"], EFFICIENCY)


@pytest.mark.parametrize(
    ("preset", "limit_s"), [("qwen3-30b-a3b/2-nodes", 1.0), ("qwen3-235b-a22b/8-nodes", 3.2)], ids=str
)
def test_eight_adapters_a_machine_send_within_what_is_promised(preset, limit_s):
    many, one = planned(preset), planned(preset, "weights.senders=1")
    assert one.by_sender == pytest.approx(one.nbytes, rel=1e-6)
    assert one.seconds == pytest.approx(one.nbytes / 25e9, rel=1e-6), "half of 400 Gb/s"
    assert many.senders == 8
    assert many.seconds <= limit_s
    assert one.seconds / 8 <= many.seconds < one.seconds / 6.5
    by_senders = [planned(preset, f"weights.senders={n}").by_sender for n in (1, 2, 4, 8)]
    assert by_senders == sorted(by_senders, reverse=True)


def test_a_machine_takes_in_no_faster_than_its_adapters():
    sixteen = planned("qwen3-235b-a22b/8-nodes", "weights.senders=16")
    assert sixteen.by_sender < planned("qwen3-235b-a22b/8-nodes").by_sender
    assert sixteen.seconds == pytest.approx(sixteen.nbytes / 8 / 25e9)


@pytest.mark.parametrize("limit", [1, 3, 8, 32])
def test_senders_send_the_whole_model_together(limit):
    config, model = load_config_and_model("configs/qwen3-235b-a22b/8-nodes.yaml", [])
    sent = bytes_by_sender(config.parallel, model, 2, limit)
    assert len(sent) == limit
    assert sum(sent) == pytest.approx(2 * total(model), rel=1e-6)


def test_senders_are_of_every_stage_then_of_every_expert_rank_then_replicas():
    places = [Place(rank, rank // 4, rank % 2) for rank in range(8)]  # two stages, two expert ranks, two replicas
    assert choose_senders(places, 8) == [0, 4, 1, 5, 2, 6, 3, 7]
    assert choose_senders(places, 3) == [0, 4, 1]
    assert [holds_its_own(stage, places, [0, 4, 1]) for stage in (0, 1)] == [True, False]


def test_each_unit_has_one_sender_and_experts_their_own():
    places = [Place(rank, rank // 4, rank % 2) for rank in range(8)]
    units = [Unit(stage, (n,), 10 + n % 3, expert) for stage in (0, 1) for n in range(30) for expert in (0, 1, None)]
    shares = assign(units, places, range(8))
    assert sorted(map(id, units)) == sorted(id(u) for mine in shares.values() for u in mine)
    for rank, mine in shares.items():
        assert {u.stage for u in mine} == {rank // 4}
        assert {u.expert for u in mine} <= {None, rank % 2}
    loads = [sum(u.nbytes for u in mine) for mine in shares.values()]
    assert max(loads) - min(loads) <= 12, "no more than a unit"
    assert assign(units, places, [0])[0] == units


def test_a_layout_of_one_rank_has_one_sender():
    _, model = load_config_and_model("configs/qwen3-235b-a22b/8-nodes.yaml", [])
    assert len(bytes_by_sender(ParallelConfig.model_validate({}), model, 2, 8)) == 1
