"""Trainer ranks and servers have the same NCCL variables: those that SGLang would set for itself."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest

from pipeline.cluster import ray_session
from pipeline.cluster.nccl import nccl_environment
from pipeline.config.run import ClusterConfig
from pipeline.config.server import ServerConfig
from pipeline.engine.server import SGLangServer
from tests.support.vendor import lines

CUMEM, NVLS = "NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"
SETTINGS = [dict(each) for each in product(((CUMEM, "0"), (CUMEM, "1")), ((NVLS, "0"), (NVLS, "1")))]


def sglangs_own(environment: dict[str, str], *, symm_mem: bool, nvls: bool) -> dict[str, str]:
    """What SGLang's processes end with, by its own statements."""
    code = lines(
        "sglang/srt/entrypoints/engine.py",
        1898,
        1915,
        begins='if "NCCL_CUMEM_ENABLE" not in os.environ or cfg.enable_symm_mem:',
    )
    environment = dict(environment)
    cfg = SimpleNamespace(enable_symm_mem=symm_mem, enable_nccl_nvls=nvls)
    exec(code, {"os": SimpleNamespace(environ=environment), "cfg": cfg, "kv_shard_symmetric_scratch": False})
    return environment


@pytest.mark.parametrize("environment", [{}, {CUMEM: "1"}, {NVLS: "1"}, {NVLS: "0"}, *SETTINGS])
@pytest.mark.parametrize("symm_mem", [False, True])
@pytest.mark.parametrize("nvls", [False, True])
def test_both_engines_get_what_sglang_would_set(environment, symm_mem, nvls):
    arguments = ["--enable-symm-mem"] * symm_mem + ["--enable-nccl-nvls"] * nvls
    ours = nccl_environment(environment, arguments)
    assert ours == sglangs_own(environment, symm_mem=symm_mem, nvls=nvls)
    # and SGLang, which finds them set, leaves them as they are
    assert sglangs_own(ours, symm_mem=symm_mem, nvls=nvls) == ours


def test_an_abbreviated_flag_counts_and_others_do_not():
    assert nccl_environment({}, ["--enable-nccl"])[NVLS] == "1"
    assert nccl_environment({}, ["--enable-metrics", "--tp-size=2"]) == {CUMEM: "0", NVLS: "0"}


def test_a_servers_processes_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv(NVLS, "1")  # of the machine that the server runs on; the run's value counts
    server = SGLangServer(
        ServerConfig(), tmp_path, tmp_path / "log", device="cuda", seed=0, return_routed_experts=False,
        environment={CUMEM: "0", NVLS: "0"},
    )  # fmt: skip
    server._scratch = tmp_path
    environment = server._environment()
    assert (environment[CUMEM], environment[NVLS]) == ("0", "0")


@pytest.mark.slow
@pytest.mark.usefixtures("preloaded")
def test_a_trainer_ranks_process_gets_them(tmp_path):
    from megatron_ext.config import ParallelConfig
    from pipeline.trainer.group import TrainerGroup

    with ray_session.ray_session(ClusterConfig(object_store_gb=0.1), cpus=2):
        group = TrainerGroup(
            ParallelConfig(), gpus=False, log_directory=tmp_path, threads=1, timeout_s=60,
            environment={CUMEM: "0", NVLS: "1"},
        )  # fmt: skip
        (where,) = group.where()
        group.stop()
    # on a machine of its own the run's Ray adds the interface
    assert where["nccl"] == {CUMEM: "0", NVLS: "1", "NCCL_SOCKET_IFNAME": "lo"}
