"""What a plan says of engines that take turns on the same GPUs."""

from __future__ import annotations

import pytest

from pipeline.config import load_config_and_model
from pipeline.config.run import COLOCATED_FRACTION
from pipeline.plan.counts.parameters import rank_count, total
from pipeline.plan.hardware import EFFICIENCY, GIB, GPUS
from pipeline.plan.layouts import nearest
from pipeline.plan.memory import item_bytes
from pipeline.plan.plan import make_plan

H100 = GPUS["h100"]
APART = ("cluster.colocated=false", "parallel.ranks=4", "parallel.expert=4")
ONE_NODE = ("configs/qwen3-30b-a3b/1-node.yaml", "configs/moonlight-16b-a3b/1-node.yaml")


def planned(path: str, *overrides: str):
    config, model = load_config_and_model(path, list(overrides))
    return make_plan(config, model, "h100")


@pytest.mark.parametrize("path", ONE_NODE)
def test_presets_of_one_machine_take_turns_because_that_is_faster(path):
    offloaded = ("trainer.offload_optimizer=true",)  # four ranks hold twice as much each
    turns, apart = planned(path), planned(path, *APART, *offloaded)
    assert turns.fits
    assert apart.fits
    assert turns.config.cluster.colocated
    assert turns.servers == 2 * apart.servers
    assert turns.seconds.step < 0.8 * apart.seconds.step


def test_weights_and_adams_states_move_twice_in_a_step_and_nothing_else_does():
    plan = planned(ONE_NODE[1])
    count = rank_count(plan.model, plan.config.parallel, 0)
    moved = 2 * count.parameters + 12 * (count.dense + count.expert) / 8 + 4 * count.buffers
    experts_too_many = 12 * count.expert * 7 / 8  # of eight ranks each has experts of its own: their states are whole
    assert plan.turns is not None
    assert plan.turns.host == pytest.approx(moved + experts_too_many)
    assert plan.turns.moved == 2 * plan.turns.host
    assert plan.seconds.turns == plan.turns.moved / H100.pcie
    assert plan.seconds.step == pytest.approx(
        plan.seconds.rollout + plan.seconds.logprobs + plan.seconds.update + plan.seconds.sync + plan.seconds.turns
    )


def test_an_optimizer_that_lies_in_the_machines_memory_does_not_move():
    plan = planned(ONE_NODE[0])
    assert plan.turns is not None
    assert plan.turns.host == plan.turns.weights == plan.memory.weights


def test_a_reference_and_a_critic_move_too():
    plan, with_critic = planned(ONE_NODE[0]), planned(ONE_NODE[0], "objective.preset=ppo", "objective.kl={beta: 0.1}")
    assert plan.turns is not None
    assert with_critic.turns is not None
    assert with_critic.turns.weights == 3 * plan.turns.weights


def test_weights_go_over_nvlink_to_each_server():
    plan = planned(ONE_NODE[0])
    sent = item_bytes(plan.config.precision) * total(plan.model)
    assert plan.seconds.sync == 4 * sent / (H100.nvlink * EFFICIENCY.network)


def test_the_engine_that_sleeps_keeps_its_processes_on_the_gpu():
    turns, apart = planned(ONE_NODE[0]), planned(ONE_NODE[0], "cluster.colocated=false", "cluster.nodes=2")
    assert turns.memory.total - apart.memory.total == pytest.approx(EFFICIENCY.asleep)
    assert turns.server.weights + turns.server.cache == pytest.approx(COLOCATED_FRACTION * H100.memory)


def test_a_server_beside_which_the_trainers_weights_have_no_place_is_refused_with_the_share_that_leaves_it():
    plan = planned(ONE_NODE[0], "server.mem_fraction_static=0.9")
    (reason,) = plan.reasons
    share = 1 - (plan.memory.weights + 3 * GIB) / H100.memory
    assert reason.endswith(f"server.mem_fraction_static={share:.2f} leaves it")
    assert planned(ONE_NODE[0], f"server.mem_fraction_static={share - 0.01:.2f}").fits


@pytest.fixture(scope="module")
def too_large():
    return planned(
        "configs/qwen3-235b-a22b/8-nodes.yaml", "cluster.nodes=1", "cluster.colocated=true", "parallel.ranks=8",
        "parallel.expert=8", "parallel.pipeline=1", "parallel.tensor=1", "parallel.sequence=false",
        "parallel.first_stage_layers=null", "parallel.last_stage_layers=null", "trainer.offload_optimizer=true",
    )  # fmt: skip


def test_too_little_memory_of_the_machine_is_a_reason(too_large):
    assert any("in its machine's memory in the servers' turn" in reason for reason in too_large.reasons)


def test_where_one_machine_is_too_small_the_proposal_is_of_engines_apart(too_large):
    proposal = nearest(too_large)
    assert proposal is not None
    assert proposal.plan.fits
    assert proposal.plan.config.cluster.nodes > 1
    assert "cluster.colocated=false" in proposal.overrides


def test_a_layout_of_one_machine_that_fits_keeps_its_turns():
    proposal = nearest(planned(ONE_NODE[0], "trainer.offload_optimizer=false", "trainer.micro_batch_tokens=524288"))
    assert proposal is not None
    assert proposal.plan.config.cluster.nodes == 1
    assert proposal.plan.turns is not None
