"""Too few GPUs are refused at once and with numbers; engines that share GPUs are spread over them, and say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cluster.one_machine import (
    SHARED_FRACTION,
    TooFewGPUs,
    check_gpus,
    memory_share,
    places_of_servers,
)
from pipeline.cluster.placement import PlacementError
from pipeline.config import load_config
from pipeline.config.run import COLOCATED_FRACTION
from pipeline.errors import NOT_STARTED
from pipeline.loop import engines, inputs

GPU = ["device=cuda", "precision.weights=bfloat16"]


def config_of(*settings):
    return load_config("configs/quickstart.yaml", [*GPU, *settings])


@pytest.mark.parametrize(
    ("settings", "gpus", "message"),
    [
        ([], 0, r"0 GPUs, as torch sees it, and the run asks for device=cuda; set device=cpu"),
        (["parallel.ranks=2"], 1, r"1 GPU and parallel\.ranks=2 takes one each; set parallel\.ranks to 1"),
        (["parallel.ranks=9"], 8, r"8 GPUs and parallel\.ranks=9 .* set parallel\.ranks to 8"),
        (["server.tensor_parallel=4"], 2, r"2 GPUs and a server of server\.tensor_parallel=4 .* set that to 2"),
    ],
)
def test_more_than_the_machine_has_is_refused_with_numbers(settings, gpus, message, monkeypatch):
    config = config_of(*settings)
    with pytest.raises(TooFewGPUs, match=message) as refused:
        check_gpus(config, gpus)
    assert refused.value.exit_code == NOT_STARTED
    # before anything starts
    monkeypatch.setattr(inputs.torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(PlacementError, match=message):
        inputs.check_inputs(config)
    with pytest.raises(PlacementError, match=message):
        engines._gpus(config)


@pytest.mark.parametrize(
    ("settings", "gpus"),
    [
        (["parallel.ranks=8"], 8),
        (["server.tensor_parallel=4", "train.steps=0"], 1),  # supervised steps alone start no server
        (["parallel.ranks=16", "cluster.address=auto"], 0),  # a cluster's GPUs
    ],
)
def test_what_fits_and_what_a_cluster_runs_is_not_refused(settings, gpus):
    check_gpus(config_of(*settings), gpus)


def test_servers_that_share_the_machine_have_gpus_of_their_own_the_trainers_last():
    def placed(gpus, servers, *settings):
        return [(p.base, p.shared) for p in places_of_servers(config_of(*settings), gpus, servers)]

    assert placed(1, 1) == [(0, True)]
    assert placed(4, 3, "parallel.ranks=2") == [(3, False), (2, False), (1, True)]
    assert placed(8, 2, "parallel.ranks=8", "server.tensor_parallel=4") == [(4, True), (0, True)]
    assert placed(4, 1, "parallel.ranks=3", "server.tensor_parallel=2") == [(2, True)]
    with pytest.raises(PlacementError, match=r"4 GPUs and 3 servers of server\.tensor_parallel=2 take 6; .* to 2 or"):
        placed(4, 3, "server.tensor_parallel=2")


def test_a_server_beside_the_trainer_leaves_it_memory_unless_a_share_is_set():
    def share(gpus, *settings):
        config = config_of(*settings)
        (place,) = places_of_servers(config, gpus, 1)
        return memory_share(config, place)

    assert share(1) == SHARED_FRACTION
    assert share(2) is None  # a GPU of its own
    assert share(1, "server.mem_fraction_static=0.5") == 0.5
    assert share(1, "cluster.colocated=true") == COLOCATED_FRACTION
    assert share(1, "cluster.colocated=true", "server.mem_fraction_static=0.5") == 0.5
    assert share(1, 'server.extra_args=["--mem-fraction-static=0.6"]') is None


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_the_servers_of_a_shared_machine_are_told_and_so_is_the_reader(caplog, model):
    config = config_of("parallel.ranks=3", "server.replicas=2")
    made = engines._servers(
        config, model, Path("logs"), 4, serve=True, seed=0, routes=True, environment={"NCCL_NVLS_ENABLE": "0"}
    )
    assert [s.base_gpu for s in made] == [3, 2]
    assert [s.config.mem_fraction_static for s in made] == [None, SHARED_FRACTION]
    for server, gpu in zip(made, ("3", "2"), strict=True):
        server._port = 1
        arguments = server.arguments()
        assert arguments[arguments.index("--base-gpu-id") + 1] == gpu
        assert server.environment == {"NCCL_NVLS_ENABLE": "0"}
    assert "server.mem_fraction_static is not set" in caplog.text
    assert f"takes {SHARED_FRACTION:g} of its memory" in caplog.text


def test_without_gpus_nothing_is_placed_or_said(caplog, model):
    config = load_config("configs/quickstart.yaml")
    (server,) = engines._servers(config, model, Path("l"), 0, serve=True, seed=0, routes=True, environment={})
    server._port = 1
    assert "--base-gpu-id" not in server.arguments()
    assert caplog.text == ""
