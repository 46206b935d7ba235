"""How many servers a run has, and whether they have GPUs of their own."""

from __future__ import annotations

import pytest

from pipeline.config import load_config
from pipeline.config.file import ConfigError
from pipeline.engine.server import ServerError
from pipeline.loop.engines import sampler_count, server_count, servers_alone, shares_gpus, weights_config

JOINED = ["cluster={address: auto, nodes: 2, gpus_per_node: 8}"]


@pytest.mark.parametrize(
    ("settings", "gpus", "servers", "shared"),
    [
        ([], 0, 1, True),  # no GPUs: nothing is placed
        ([], 1, 1, True),  # one GPU: both engines on it
        ([], 2, 1, False),
        ([], 8, 7, False),
        (["parallel.ranks=4", "server.tensor_parallel=2"], 8, 2, False),
        (["parallel.ranks=8"], 8, 1, True),  # the trainer takes them all
        (["server.replicas=2"], 8, 2, False),
        (["server.replicas=8"], 8, 8, True),
        (["cluster.colocated=true", "parallel.ranks=8", "server.tensor_parallel=2"], 8, 4, True),
        (["cluster.colocated=true", "server.replicas=2"], 8, 2, True),  # by turns, though there are enough
        ([*JOINED, "parallel.ranks=8"], 8, 8, False),
        ([*JOINED, "parallel.ranks=8"], 1, 8, False),  # the controller's own machine does not count
    ],
)
def test_servers_take_the_gpus_beside_the_trainer(settings, gpus, servers, shared):
    config = load_config("configs/quickstart.yaml", settings)
    assert server_count(config, gpus) == servers
    assert shares_gpus(config, gpus) == shared


@pytest.mark.parametrize(
    ("settings", "servers", "samplers"),
    [
        ([], 8, 0),  # one machine: the controller decodes
        (JOINED, 1, 0),
        (JOINED, 8, 8),
        ([*JOINED, "rollout.samplers=0"], 8, 0),
        (["rollout.samplers=3"], 8, 3),
        (["rollout.samplers=3"], 2, 2),
    ],
)
def test_samplers_are_asked_for_or_stand_beside_the_servers_of_a_cluster(settings, servers, samplers):
    assert sampler_count(load_config("configs/quickstart.yaml", settings), servers) == samplers


def test_fewer_than_no_samplers_are_refused():
    with pytest.raises(ConfigError, match=r"samplers=-1 is no number of processes; set rollout\.samplers=0 for none"):
        load_config("configs/quickstart.yaml", ["rollout.samplers=-1"])


def test_several_servers_do_not_share_a_port_of_one_machine():
    with pytest.raises(ServerError, match=r"2 servers .* listen on port 30000; set server\.port"):
        server_count(load_config("configs/quickstart.yaml", ["server={port: 30000, replicas: 2}"]), 0)
    for settings in (["server={port: 30000}"], ["server={port: 30000, replicas: 2}", *JOINED]):
        assert server_count(load_config("configs/quickstart.yaml", settings), 1)


def test_weights_go_by_a_group_to_servers_on_gpus_of_their_own():
    def chosen(gpus, *settings):
        return weights_config(load_config("configs/quickstart.yaml", list(settings)), gpus).transport

    assert chosen(0) == chosen(0, *JOINED) == "auto"
    assert chosen(1) == "auto"  # shared by both
    assert chosen(2) == chosen(8, *JOINED) == "distributed"
    assert chosen(8, *JOINED, "weights.transport=shared_memory") == "shared_memory"


@pytest.mark.parametrize(
    ("device", "settings", "first_gpus"),
    [
        ("cpu", ["server.replicas=3"], [0, 0, 0]),  # SGLang looks for a NUMA node of that number
        ("cpu", [], [0]),
        ("cuda", [], [0, 1, 2, 3]),
        ("cuda", ["server.tensor_parallel=2"], [0, 2]),
    ],
)
def test_servers_without_a_trainer_take_every_gpu_and_no_number_where_there_is_none(
    device, settings, first_gpus, tmp_path, monkeypatch
):
    monkeypatch.setattr("pipeline.loop.engines.torch.cuda.device_count", lambda: 4)
    precision = "bfloat16" if device == "cuda" else "float32"
    config = load_config("configs/quickstart.yaml", [f"device={device}", f"precision.weights={precision}", *settings])
    assert [server.base_gpu for server in servers_alone(config, tmp_path, tmp_path)] == first_gpus
    assert len(servers_alone(config, tmp_path, tmp_path, most=1)) == 1
