"""What a run ran on, for whoever asks later: facts.json in the run directory.

host          name, platform, CPU, memory, disk, of the machine of the controller
gpus          as nvidia-smi lists them there; none where there is no nvidia-smi
cuda          what torch sees: CUDA, cuDNN and NCCL versions, the number of devices
versions      of the packages that compute, null for one that is not installed
git           commit of the source tree, and whether files differ from it; null where it is no clone
environment   the variables that move placement and networks
ray           nodes of the cluster and their resources, from the moment the trainer is up
data          of every source: rows, prompts, and what was left out and why
trainer       of every rank: host, Ray node, process, GPUs; from then on
"""

from __future__ import annotations

import csv
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.secrets import hide_in_command, hide_in_text

if TYPE_CHECKING:
    from pipeline.trainer.group import TrainerGroup

PACKAGES = (
    "sameroute",
    "torch",
    "megatron-core",
    "sglang",
    "sglang-kernel",
    "ray",
    "transformers",
    "transformer-engine",
    "triton",
    "numpy",
)
_GPU_FIELDS = ("index", "name", "uuid", "memory.total", "driver_version", "power.limit", "compute_cap")
_VARIABLES = ("NCCL_", "GLOO_", "SLURM_JOB", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
_QUERY_S = 20.0  # nvidia-smi takes seconds where no persistence daemon runs


def write_facts(
    directory: Path, trainers: TrainerGroup | None = None, *, data: Mapping[str, Any] | None = None
) -> None:
    """Write facts.json into a run directory. trainers: once they are up; what is there is kept, theirs is added.
    data: what the prompts' sources say of themselves, at the start."""
    file = directory / "facts.json"
    if trainers is None:
        found = host_facts(directory) | {"data": data or {}}
    else:
        found = json.loads(file.read_text(encoding="utf-8")) | cluster_facts(trainers)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def written_by_this_job(directory: Path) -> bool:
    """Whether a run directory was begun by the Slurm job that this process belongs to, in this attempt or another."""
    file, job = directory / "facts.json", os.environ.get("SLURM_JOB_ID")
    if job is None or not file.is_file():
        return False
    return json.loads(file.read_text(encoding="utf-8"))["environment"].get("SLURM_JOB_ID") == job


def host_facts(directory: Path) -> dict[str, Any]:
    """Of this machine and this installation. directory: whose disk is meant."""
    return {
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": hide_in_command(sys.argv),
        "host": _host(directory),
        "gpus": gpus(),
        "cuda": _cuda(),
        "versions": {package: _version(package) for package in PACKAGES},
        "git": git(Path(__file__)),
        "environment": {k: hide_in_text(v) for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
    }


def cluster_facts(trainers: TrainerGroup) -> dict[str, Any]:
    """Of the Ray cluster, and where its trainer ranks are."""
    import ray

    nodes = [
        {
            "id": node["NodeID"],
            "host": node["NodeManagerHostname"],
            "address": node["NodeManagerAddress"],
            "alive": node["Alive"],
            "resources": node["Resources"],
        }
        for node in ray.nodes()
    ]
    return {"ray": {"nodes": nodes, "resources": ray.cluster_resources()}, "trainer": trainers.where()}


def gpus() -> list[dict[str, str]]:
    """What nvidia-smi lists, by its own names of fields, in its units (MiB, W)."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_QUERY_S, check=True).stdout
    except (subprocess.SubprocessError, OSError) as error:
        return [{"error": f"nvidia-smi: {error}"}]
    rows = csv.reader(answer.splitlines(), skipinitialspace=True)
    return [dict(zip(_GPU_FIELDS, row, strict=False)) for row in rows if row]


def git(file: Path) -> dict[str, Any] | None:
    """Commit of the clone that a file belongs to; None where no clone has it."""

    def ask(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(file.parent), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    if shutil.which("git") is None or ask("ls-files", "--error-unmatch", file.name) is None:
        return None
    return {"commit": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain", "--untracked-files=no"))}


def _host(directory: Path) -> dict[str, Any]:
    import psutil

    return {
        "name": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cpus": psutil.cpu_count(logical=True),
        "cpus_usable": len(os.sched_getaffinity(0)),
        "memory_gb": _gb(psutil.virtual_memory().total),
        "memory_available_gb": _gb(psutil.virtual_memory().available),
        "shared_memory_free_gb": _gb(shutil.disk_usage("/dev/shm").free),
        "disk_free_gb": _gb(shutil.disk_usage(directory).free),
    }


def _cpu_model() -> str | None:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _cuda() -> Mapping[str, Any]:
    import torch
    from torch.cuda import nccl

    available = torch.cuda.is_available()
    return {
        "version": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if available else None,
        "nccl": _dotted(nccl.version()) if available else None,
        "devices": torch.cuda.device_count() if available else 0,
    }


def _dotted(parts: Sequence[object]) -> str:
    return ".".join(str(part) for part in parts)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gb(size: float) -> float:
    return round(size / 1e9, 2)
