"""facts.json says what a run ran on."""

import json
import os
import subprocess

import psutil
import pytest
import torch

from pipeline.observe import facts
from pipeline.observe.report.page import links
from pipeline.observe.run_dir import RunDirectory

NVIDIA_SMI = """#!/bin/sh
[ "$1" = "--query-gpu=index,name,uuid,memory.total,driver_version,power.limit,compute_cap" ] || exit 2
[ "$2" = "--format=csv,noheader,nounits" ] || exit 3
echo "0, NVIDIA H100 80GB HBM3, GPU-1b, 81559, 580.65.06, 700.00, 9.0"
echo "1, NVIDIA H100 80GB HBM3, GPU-2c, 81559, 580.65.06, 700.00, 9.0"
"""


class Trainers:
    def where(self):
        return [{"rank": 0, "host": "a", "node": "n", "pid": 1, "gpus": ["0"]}]


def test_the_host_the_versions_and_the_ranks_are_written_and_linked(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    monkeypatch.setattr("ray.nodes", lambda: [
        {"NodeID": "n", "NodeManagerHostname": "a", "NodeManagerAddress": "10.0.0.1", "Alive": True,
         "Resources": {"CPU": 2.0}, "Labels": {}},
    ])  # fmt: skip
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    with RunDirectory(tmp_path / "run", {}) as run:
        facts.write_facts(run.path)
        alone = json.loads((run.path / "facts.json").read_text())
        facts.write_facts(run.path, Trainers())  # pyright: ignore[reportArgumentType]
    found = json.loads((run.path / "facts.json").read_text())
    assert found == alone | {
        "ray": {
            "nodes": [
                {"id": "n", "host": "a", "address": "10.0.0.1", "alive": True, "resources": {"CPU": 2.0}},
            ],
            "resources": {"CPU": 2.0},
        },
        "trainer": [{"rank": 0, "host": "a", "node": "n", "pid": 1, "gpus": ["0"]}],
    }
    assert found["host"]["cpus"] == psutil.cpu_count()
    assert found["host"]["memory_gb"] * 1e9 == pytest.approx(psutil.virtual_memory().total, rel=0.01)
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert all(found["versions"][name] for name in ("megatron-core", "sglang", "ray"))
    assert found["environment"]["NCCL_SOCKET_IFNAME"] == "eth0"
    assert "SECRET_TOKEN" not in json.dumps(found)
    assert ("facts.json", "facts.json") in [link[:2] for link in links(run.path)]
    RunDirectory(run.path, {}, overwrite=True).close()


def test_gpus_are_read_from_nvidia_smi_and_its_failure_is_a_fact_too(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    first, second = facts.gpus()
    assert first["name"] == second["name"] == "NVIDIA H100 80GB HBM3"
    assert (first["index"], second["index"]) == ("0", "1")
    assert (first["memory.total"], first["driver_version"], first["compute_cap"]) == ("81559", "580.65.06", "9.0")
    program.write_text("#!/bin/sh\nexit 9\n")
    ((error,),) = [gpu.values() for gpu in facts.gpus()]
    assert "exit status 9" in error
    program.unlink()
    monkeypatch.setenv("PATH", "/nowhere")
    assert facts.gpus() == []


def test_the_commit_is_the_one_of_the_clone_that_has_the_file(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, check=True)
        return done.stdout.decode().strip()

    file = tmp_path / "source.py"
    file.write_text("a = 1\n")
    assert facts.git(file) is None
    git("init", "-q")
    assert facts.git(file) is None  # an installation inside of somebody's clone
    git("add", "source.py")
    git("commit", "-qm", "first")
    assert facts.git(file) == {"commit": git("rev-parse", "HEAD"), "changed": False}
    file.write_text("a = 2\n")
    assert facts.git(file) == {"commit": git("rev-parse", "HEAD"), "changed": True}


def test_a_run_directory_belongs_to_the_job_that_began_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert not facts.written_by_this_job(tmp_path)
    facts.write_facts(tmp_path)
    assert facts.written_by_this_job(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert not facts.written_by_this_job(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID")
    assert not facts.written_by_this_job(tmp_path)
