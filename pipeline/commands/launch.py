"""`sameroute launch slurm CONFIG`: a job script of scripts/slurm/ with its options filled in, printed or submitted."""

from __future__ import annotations

import argparse
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config import Config

ROOT = Path(__file__).resolve().parents[2]
JOBS = ("train", "sft")
RUNTIMES = ("bare", "pyxis", "apptainer")


class LaunchError(RuntimeError):
    """The job cannot be submitted, or was not; `code` is the exit code."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    slurm = parser.add_subparsers(dest="scheduler", required=True).add_parser("slurm", help="sbatch")
    add = slurm.add_argument
    add("config", type=Path, help="YAML file")
    add("overrides", nargs="*", metavar="section.field=value", help="overrides of single fields")
    add("--job", choices=JOBS, default="train", help="train, or the supervised steps alone")
    add("--nodes", type=_positive, help="machines; else cluster.nodes, or for sft those of the trainer")
    add("--rollout-nodes", type=int, help="how many of them run the servers only; else those the trainer leaves whole")
    add("--partition")
    add("--rollout-partition", help="the rollout nodes are of this one: a heterogeneous job")
    add("--gpus-per-node", type=int, help="else cluster.gpus_per_node, and none where device=cpu")
    add("--rollout-gpus-per-node", type=int, help="where they differ: a heterogeneous job")
    add("--time", help="limit of one attempt, as sbatch reads it; a run that reaches it saves and is queued again")
    add("--account")
    add("--qos")
    add("--runtime", choices=RUNTIMES, default="bare", help="a container, or this clone's .venv")
    add("--image", help="of the container")
    add("--mounts", help="further mounts of the container, FROM:TO,...")
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="a further option of sbatch, as --sbatch=--mem=0",
    )
    add("--dry-run", action="store_true", help="print the script")


def run(options: argparse.Namespace) -> str:
    """The script of a dry run, or a sentence on the submitted job. Raises LaunchError."""
    from pipeline.config import ConfigError, load_config_and_model

    try:
        # The model need not be on the machine that submits.
        config, _ = load_config_and_model(options.config, options.overrides)
    except ConfigError as error:
        raise LaunchError(str(error)) from error
    script = render(config, options)
    if config.checkpoint.every_steps is None:
        print("sameroute: checkpoint.every_steps is null, so what ends this job early ends the run", file=sys.stderr)
    if options.dry_run:
        return script
    logs = ROOT / "runs" / "slurm"
    logs.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=script, text=True, capture_output=True, cwd=ROOT)
    except FileNotFoundError as error:
        raise LaunchError("there is no sbatch on this machine; --dry-run prints the script") from error
    if done.returncode:
        raise LaunchError(f"sbatch refused the job: {done.stderr.strip()}", 1)
    job = done.stdout.strip().partition(";")[0]
    return f"job {job}: log {logs / f'{job}.out'}, run directory {config.run.directory}; to end it: scancel {job}"


def render(config: Config, options: argparse.Namespace) -> str:
    """The job script. Raises LaunchError for nodes that do not hold the run."""
    if options.job == "sft" and not config.supervised.steps:
        raise LaunchError("there are no supervised steps; set supervised.steps")
    if options.runtime != "bare" and not options.image:
        raise LaunchError(f"--runtime {options.runtime} needs --image, a path or an address")
    gpus = config.cluster.gpus_per_node if options.gpus_per_node is None else options.gpus_per_node
    if config.device == "cpu":
        gpus = 0
    nodes = options.nodes or config.cluster.nodes
    if options.job == "sft" and gpus and not options.nodes:
        nodes = math.ceil(config.parallel.ranks / gpus)  # no server, so no node for one
    rollout_nodes = _rollout_nodes(config, options, nodes, gpus)
    rollout_gpus = gpus if options.rollout_gpus_per_node is None else options.rollout_gpus_per_node
    mixed = options.rollout_partition is not None or rollout_gpus != gpus
    if mixed and not rollout_nodes:
        raise LaunchError("rollout nodes of another kind need --rollout-nodes")
    servers = _servers(config, options, nodes, gpus, rollout_nodes, rollout_gpus)

    source = ROOT / "scripts" / "slurm" / f"{options.job}.sbatch"
    if not source.is_file():
        raise LaunchError(f"there is no {source}: sameroute launch works from a clone of the repository")
    lines = source.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    directives = [line for line in lines[:start] if line.startswith("#SBATCH")]
    first = nodes - rollout_nodes if mixed else nodes
    directives += _directives(options, first, gpus, options.partition)
    directives += [f"#SBATCH --output={ROOT}/runs/slurm/%j.out", *(f"#SBATCH {option}" for option in options.sbatch)]
    if mixed:
        partition = options.rollout_partition or options.partition
        directives += ["#SBATCH hetjob", "#SBATCH --ntasks-per-node=1", "#SBATCH --exclusive"]
        directives += _directives(options, rollout_nodes, rollout_gpus, partition)
    variables = {
        "SAMEROUTE_ROOT": ROOT,
        "SAMEROUTE_ROLLOUT_NODES": 0 if mixed else rollout_nodes,
        "SAMEROUTE_RUNTIME": options.runtime,
        "SAMEROUTE_IMAGE": options.image,
        "SAMEROUTE_MOUNTS": options.mounts,
    }
    given = [f"export {name}={shlex.quote(str(value))}" for name, value in variables.items() if value is not None]
    arguments = [str(options.config.resolve()), *options.overrides]
    if servers is not None and config.server.replicas is None:
        arguments.append(f"server.replicas={servers}")
    return "\n".join(
        [
            "#!/bin/bash",
            f"# Written by `sameroute launch slurm {options.config}`.",
            *directives,
            "",
            *given,
            f"set -- {shlex.join(arguments)}",
            *lines[start:],
            "",
        ]
    )


def _directives(options: argparse.Namespace, nodes: int, gpus: int, partition: str | None) -> list[str]:
    """The #SBATCH lines of one component."""
    given = {
        "nodes": nodes,
        "gpus-per-node": gpus or None,
        "partition": partition,
        "time": options.time,
        "account": options.account,
        "qos": options.qos,
    }
    return [f"#SBATCH --{name}={value}" for name, value in given.items() if value is not None]


def _rollout_nodes(config: Config, options: argparse.Namespace, nodes: int, gpus: int) -> int:
    """As asked for, or all that the trainer leaves whole; 0 where it leaves part of a node, there are no GPUs, or there
    is no sampling."""
    if options.rollout_nodes is not None:
        if not 0 <= options.rollout_nodes < nodes:
            raise LaunchError(f"--rollout-nodes {options.rollout_nodes} of {nodes} nodes leave none for the trainer")
        return options.rollout_nodes
    if options.job == "sft" or not gpus or config.parallel.ranks % gpus:
        return 0
    return max(0, nodes - config.parallel.ranks // gpus)


def _servers(
    config: Config, options: argparse.Namespace, nodes: int, gpus: int, rollout_nodes: int, rollout_gpus: int
) -> int | None:
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
    if options.job == "sft":
        return None
    left = rollout_nodes * (rollout_gpus // size) if rollout_nodes else (trainer - ranks) // size
    if left < (config.server.replicas or 1):
        raise LaunchError(
            f"{nodes} nodes with parallel.ranks={ranks} have room for {left} servers of server.tensor_parallel={size}, "
            f"and the run has {config.server.replicas or 1}; raise --nodes, or lower parallel.ranks, server.replicas "
            "or server.tensor_parallel"
        )
    return left


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number
