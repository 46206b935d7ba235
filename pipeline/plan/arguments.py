"""Arguments of `sameroute plan`; apart, so that every other command starts without what a plan imports."""

from __future__ import annotations

import argparse

from pipeline.plan.hardware import GPUS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="overrides of single fields")
    parser.add_argument(
        "--nodes", type=int, help="machines; the trainer's ranks grow with them. Default: cluster.nodes"
    )
    parser.add_argument("--gpu", choices=sorted(GPUS), help="kind of GPU. Default: cluster.gpu, else h100")
    parser.add_argument(
        "--mean-response", type=float, metavar="TOKENS", help="of an answer. Default: a third of the longest"
    )
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
