"""A Slurm job for a run: a script of scripts/slurm/ with its options filled in, and its submission."""

from __future__ import annotations

import math
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.errors import FAILED, NOT_STARTED, SamerouteError

if TYPE_CHECKING:
    from pipeline.config import Config

ROOT = Path(__file__).resolve().parents[2]
Job = Literal["train", "sft"]
Runtime = Literal["bare", "pyxis", "apptainer"]
JOBS: tuple[Job, ...] = ("train", "sft")
RUNTIMES: tuple[Runtime, ...] = ("bare", "pyxis", "apptainer")


class LaunchError(SamerouteError):
    """The job cannot be submitted; the message says what to change."""

    exit_code = NOT_STARTED


class SubmissionError(LaunchError):
    """sbatch refused the job."""

    exit_code = FAILED


@dataclass(frozen=True)
class SlurmJob:
    """What a job is asked to be; the defaults are the command line's.

    config, overrides:     of the run, as they were given.
    job:                   train, or the supervised steps alone.
    nodes:                 machines; None: cluster.nodes, or for sft those of the trainer.
    rollout_nodes:         how many of them run the servers only; None: those the trainer leaves whole.
    partition:             of all nodes.  rollout_partition: of the rollout nodes, which makes a heterogeneous job.
    gpus_per_node:         None: cluster.gpus_per_node, and none where device=cpu.  rollout_gpus_per_node: where they
                           differ.
    time, account, qos:    as sbatch reads them.
    runtime:               a container, or this clone's .venv.  image, mounts: of the container.
    sbatch:                further options.
    """

    config: Path
    overrides: Sequence[str]
    job: Job = "train"
    nodes: int | None = None
    rollout_nodes: int | None = None
    partition: str | None = None
    rollout_partition: str | None = None
    gpus_per_node: int | None = None
    rollout_gpus_per_node: int | None = None
    time: str | None = None
    account: str | None = None
    qos: str | None = None
    runtime: Runtime = "bare"
    image: str | None = None
    mounts: str | None = None
    sbatch: Sequence[str] = ()


def submit(script: str) -> tuple[str, Path]:
    """Hand the script to sbatch. Returns the job's number and its log. Raises LaunchError, SubmissionError."""
    logs = ROOT / "runs" / "slurm"
    logs.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=script, text=True, capture_output=True, cwd=ROOT)
    except FileNotFoundError as error:
        raise LaunchError("there is no sbatch on this machine; --dry-run prints the script") from error
    if done.returncode:
        raise SubmissionError(f"sbatch refused the job: {done.stderr.strip()}")
    number = done.stdout.strip().partition(";")[0]
    return number, logs / f"{number}.out"


def render(config: Config, job: SlurmJob) -> str:
    """The job script. Raises LaunchError for nodes that do not hold the run."""
    if job.job == "sft" and not config.supervised.steps:
        raise LaunchError("there are no supervised steps; set supervised.steps")
    turns = config.cluster.colocated and job.job == "train"
    if turns and ((job.nodes or 1) > 1 or job.rollout_nodes or job.rollout_partition):
        raise LaunchError(
            "cluster.colocated takes turns on one machine; leave out --nodes and --rollout-nodes, or set "
            "cluster.colocated=false"
        )
    if job.runtime != "bare" and not job.image:
        raise LaunchError(f"--runtime {job.runtime} needs --image, a path or an address")
    gpus = config.cluster.gpus_per_node if job.gpus_per_node is None else job.gpus_per_node
    if config.device == "cpu":
        gpus = 0
    nodes = job.nodes or config.cluster.nodes
    if job.job == "sft" and gpus and not job.nodes:
        nodes = math.ceil(config.parallel.ranks / gpus)  # no server, so no node for one
    rollout_nodes = _rollout_nodes(config, job, nodes, gpus)
    rollout_gpus = gpus if job.rollout_gpus_per_node is None else job.rollout_gpus_per_node
    mixed = job.rollout_partition is not None or rollout_gpus != gpus
    if mixed and not rollout_nodes:
        raise LaunchError("rollout nodes of another kind need --rollout-nodes")
    servers = _servers(config, job, nodes, gpus, rollout_nodes, rollout_gpus)

    script = ROOT / "scripts" / "slurm" / f"{job.job}.sbatch"
    if not script.is_file():
        raise LaunchError(f"there is no {script}: sameroute launch works from a clone of the repository")
    lines = script.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    directives = [line for line in lines[:start] if line.startswith("#SBATCH")]
    first = nodes - rollout_nodes if mixed else nodes
    directives += _directives(job, first, gpus, job.partition)
    directives += [f"#SBATCH --output={ROOT}/runs/slurm/%j.out", *(f"#SBATCH {option}" for option in job.sbatch)]
    if mixed:
        partition = job.rollout_partition or job.partition
        directives += ["#SBATCH hetjob", "#SBATCH --ntasks-per-node=1", "#SBATCH --exclusive"]
        directives += _directives(job, rollout_nodes, rollout_gpus, partition)
    arguments = [str(job.config.resolve()), *job.overrides]
    if servers is not None and config.server.replicas is None:
        arguments.append(f"server.replicas={servers}")
    given = _variables(job, rollout_nodes=0 if mixed else rollout_nodes, own_ray=turns)
    header = ["#!/bin/bash", f"# Written by `sameroute launch slurm {job.config}`.", *directives, ""]
    return "\n".join([*header, *given, f"set -- {shlex.join(arguments)}", *lines[start:], ""])


def _variables(job: SlurmJob, *, rollout_nodes: int, own_ray: bool) -> list[str]:
    """What the scripts of scripts/slurm/ read. own_ray: the run joins no cluster."""
    variables = {
        "SAMEROUTE_ROOT": ROOT,
        "SAMEROUTE_ROLLOUT_NODES": rollout_nodes,
        "SAMEROUTE_OWN_RAY": "1" if own_ray else None,
        "SAMEROUTE_RUNTIME": job.runtime,
        "SAMEROUTE_IMAGE": job.image,
        "SAMEROUTE_MOUNTS": job.mounts,
    }
    return [f"export {name}={shlex.quote(str(value))}" for name, value in variables.items() if value is not None]


def _directives(job: SlurmJob, nodes: int, gpus: int, partition: str | None) -> list[str]:
    """The #SBATCH lines of one component."""
    given = {
        "nodes": nodes,
        "gpus-per-node": gpus or None,
        "partition": partition,
        "time": job.time,
        "account": job.account,
        "qos": job.qos,
    }
    return [f"#SBATCH --{name}={value}" for name, value in given.items() if value is not None]


def _rollout_nodes(config: Config, job: SlurmJob, nodes: int, gpus: int) -> int:
    """As asked for, or all that the trainer leaves whole; 0 where it leaves part of a node, there are no GPUs, or there
    is no sampling."""
    if job.rollout_nodes is not None:
        if not 0 <= job.rollout_nodes < nodes:
            raise LaunchError(f"--rollout-nodes {job.rollout_nodes} of {nodes} nodes leave none for the trainer")
        return job.rollout_nodes
    if job.job == "sft" or not gpus or config.parallel.ranks % gpus:
        return 0
    return max(0, nodes - config.parallel.ranks // gpus)


def _servers(config: Config, job: SlurmJob, nodes: int, gpus: int, rollout_nodes: int, rollout_gpus: int) -> int | None:
    """How many servers the GPUs beside the trainer hold; None where there are none to count, or no server.

    Raises LaunchError where the trainer or the configured servers need more GPUs than their nodes have.
    """
    if not gpus:
        return None
    trainer = (nodes - rollout_nodes) * gpus
    ranks, size = config.parallel.ranks, config.server.tensor_parallel
    if ranks > trainer:
        raise LaunchError(
            f"parallel.ranks={ranks} needs more than the {trainer} GPUs of {nodes - rollout_nodes} trainer nodes; "
            "raise --nodes or lower --rollout-nodes"
        )
    if job.job == "sft" or config.cluster.colocated:
        return None
    if size > rollout_gpus:
        from pipeline.config.server import servers_beside  # the command's help does without pydantic

        whole = rollout_nodes or nodes - math.ceil(ranks / gpus)
        try:
            left = servers_beside(whole * rollout_gpus, size, rollout_gpus)
        except ValueError as error:
            raise LaunchError(str(error)) from error
    else:
        left = rollout_nodes * (rollout_gpus // size) if rollout_nodes else (trainer - ranks) // size
    if left < (config.server.replicas or 1):
        raise LaunchError(
            f"{nodes} nodes with parallel.ranks={ranks} have room for {left} servers of server.tensor_parallel={size}, "
            f"and the run has {config.server.replicas or 1}; raise --nodes, or lower parallel.ranks, server.replicas "
            "or server.tensor_parallel"
        )
    return left
