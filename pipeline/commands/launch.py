"""`sameroute launch slurm CONFIG`."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from pipeline.cluster.slurm import JOBS, RUNTIMES, SlurmJob, render, submit
from pipeline.commands.config_arguments import add_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    slurm = parser.add_subparsers(dest="scheduler", required=True).add_parser("slurm", help="sbatch")
    add = slurm.add_argument
    add_config(slurm)
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


def run(options: argparse.Namespace) -> int:
    """0; the script of a dry run is printed, or a sentence on the submitted job. Raises ConfigError, LaunchError."""
    from pipeline.config import load_config_and_model
    from pipeline.config.load_config import check_precision

    # The model need not be on the machine that submits.
    config, _ = load_config_and_model(options.config, options.overrides)
    if config.device == "auto":  # the job asks for GPUs, as render does for any device but the CPU
        check_precision(config, "cuda")
    script = render(config, SlurmJob(**{f.name: getattr(options, f.name) for f in dataclasses.fields(SlurmJob)}))
    if config.checkpoint.every_steps is None:
        print("sameroute: checkpoint.every_steps is null, so what ends this job early ends the run", file=sys.stderr)
    if options.dry_run:
        print(script)
        return 0
    number, log = submit(script)
    print(f"job {number}: log {log}, run directory {config.run.directory}; to end it: scancel {number}")
    return 0


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number
