"""`sameroute plan CONFIG`: will it fit, how long will it take, and if it will not fit, what would."""

from __future__ import annotations

import argparse
import json
import math

from pipeline.commands.config_arguments import add_config
from pipeline.errors import FAILED
from pipeline.plan.hardware import GPUS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add_config(parser)
    parser.add_argument(
        "--nodes", type=int, help="machines; the trainer's ranks grow with them. Default: cluster.nodes"
    )
    parser.add_argument(
        "--gpu", choices=sorted(GPUS), help="kind of GPU. Default: cluster.gpu, else h100; none where device=cpu"
    )
    parser.add_argument(
        "--mean-response", type=_tokens, metavar="TOKENS", help="of an answer. Default: a third of the longest"
    )
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")


def run(options: argparse.Namespace) -> int:
    """Print the plan; 0: it fits, or runs without a GPU; FAILED: it does not fit. Raises ConfigError."""
    from pipeline.plan.layouts import nearest
    from pipeline.plan.of_file import plan_of
    from pipeline.plan.on_cpu import CPUPlan, cpu_plan_as_json, print_cpu_plan
    from pipeline.plan.show import print_json, print_plan

    plan = plan_of(options.config, options.overrides, options.gpu, options.nodes, options.mean_response)
    if isinstance(plan, CPUPlan):
        if options.json:
            print(json.dumps(cpu_plan_as_json(plan), indent=2))
        else:
            print_cpu_plan(plan)
        return 0
    proposal = None if plan.fits else nearest(plan, options.mean_response)
    (print_json if options.json else print_plan)(plan, proposal)
    return 0 if plan.fits else FAILED


def _tokens(text: str) -> float:
    number = float(text)
    if not math.isfinite(number) or number <= 0:
        raise argparse.ArgumentTypeError("must be a number of tokens above 0")
    return number
