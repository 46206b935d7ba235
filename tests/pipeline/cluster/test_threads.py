"""Threads of the engines on a CPU."""

from __future__ import annotations

import os

import pytest

from pipeline.cluster.threads import cpu_threads, thread_environment, with_threads
from pipeline.config import load_config
from tests.support.tiny_families import tiny_config


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def test_a_small_model_has_one_and_a_larger_one_shares_the_cores(eight_cores):
    assert [cpu_threads(None, hidden, 1) for hidden in (64, 255, 256, 576)] == [1, 1, 8, 8]
    assert [cpu_threads(None, 576, processes) for processes in (2, 3, 16)] == [4, 2, 1]
    assert cpu_threads(3, 64, 2) == 3


def test_several_threads_do_not_spin_and_one_is_left_as_it_was():
    assert thread_environment(1) == {"OMP_NUM_THREADS": "1"}
    assert thread_environment(2) == {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}


def test_an_optimizer_beside_gpus_gets_the_cores_and_nothing_else_there_does(eight_cores):
    from pipeline.config import load_config_and_model

    path = "configs/qwen3-30b-a3b/2-nodes.yaml"
    for overrides, threads in (
        ([], 1),  # eight ranks on a machine of eight cores
        (["parallel.ranks=4", "parallel.expert=4"], 2),
        (["parallel.ranks=4", "parallel.expert=4", "trainer.offload_optimizer=false"], 1),
        (["cluster.cpu_threads=12"], 12),
    ):
        config, model = load_config_and_model(path, overrides)
        assert with_threads(config, model, "cuda").cluster.cpu_threads == threads


def test_both_engines_get_theirs_by_their_own_number_of_processes(eight_cores):
    from megatron_ext.hf.description import describe

    config = load_config("configs/quickstart.yaml", ["parallel={ranks: 4}", "server.replicas=2"])
    wide = with_threads(config, describe(tiny_config("llama, untied") | {"hidden_size": 256, "head_dim": 64}), "cpu")
    assert (wide.server.cpu_threads, wide.cluster.cpu_threads) == (4, 2)
    narrow = with_threads(config, describe(tiny_config("llama")), "cpu")
    assert (narrow.server.cpu_threads, narrow.cluster.cpu_threads) == (1, 1)
    given = config.model_copy(update={"cluster": config.cluster.model_copy(update={"cpu_threads": 5})})
    assert with_threads(given, describe(tiny_config("llama")), "cpu").cluster.cpu_threads == 5
