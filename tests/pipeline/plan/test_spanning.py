"""Plans of servers that span machines."""

from __future__ import annotations

import pytest

from pipeline.config import load_config_and_model
from pipeline.plan.hardware import EFFICIENCY, GPUS
from pipeline.plan.layouts import nearest
from pipeline.plan.plan import make_plan


def planned(preset, *overrides):
    config, model = load_config_and_model(f"configs/{preset}.yaml", list(overrides))
    return make_plan(config, model, config.cluster.gpu)


def test_between_machines_a_token_waits_for_two_all_reduces_a_layer():
    whole = "server={tensor_parallel: 8, mem_fraction_static: null}"
    one = planned("qwen3-235b-a22b/8-nodes", whole).server
    many = planned("qwen3-235b-a22b/8-nodes", whole, "cluster.nodes=16", "cluster.gpus_per_node=4").server
    assert (one.gpus, one.sequences) == (many.gpus, many.sequences)
    batch, hidden, layers, gpu = 64, 4096, 94, GPUS["h100"]
    halves = (
        2 * (1 / 2) * batch * hidden * 2 / 4
    )  # bytes that an adapter of four moves: there and back, of two machines
    each = EFFICIENCY.hop_s + halves / (gpu.network * EFFICIENCY.network)
    assert many.step_s(batch, 3000) - one.step_s(batch, 3000) == pytest.approx(2 * layers * each)
    assert many.prefill_s(1000) > one.prefill_s(1000)


def test_a_model_that_no_machine_holds_is_proposed_servers_that_span_them():
    plan = planned("deepseek-v3/16-nodes", "cluster.gpu=h100")
    assert any("a server on 8 GPUs holds 156.2 GiB of weights on each" in reason for reason in plan.reasons)
    proposal = nearest(plan)
    assert proposal is not None
    assert "server.tensor_parallel=32" in proposal.overrides
    assert proposal.plan.fits


def test_servers_that_span_machines_take_whole_ones():
    plan = planned("deepseek-v3/32-nodes-h100", "server.replicas=4")
    assert (plan.fits, plan.servers) == (True, 4)
    five = planned("deepseek-v3/32-nodes-h100", "server.replicas=5")
    (reason,) = five.reasons
    assert reason.endswith("leave 128, and 5 servers take 32 each, on 4 whole machines each")
