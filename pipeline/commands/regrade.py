"""`sameroute regrade RUN`: grade the answers that a run has kept again, and compare."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("run", type=Path, help="run directory; regraded.parquet is written into it")
    parser.add_argument(
        "--rewards",
        type=Path,
        metavar="YAML",
        help="file with other `rewards` and `grading`. Default: those of the run",
    )


def run(options: argparse.Namespace) -> int:
    """0. Raises RegradeError, ConfigError, VerifierError and RewardError."""
    from pipeline.config.load_config import load_rewards
    from pipeline.observe.graded_again import FILE, regrade
    from pipeline.rewards import check_rewards, open_grader

    rewards, grading = load_rewards(options.run, options.rewards)
    check_rewards(rewards, grading)
    print(regrade(options.run, open_grader(rewards, grading)))
    print(options.run / FILE)
    return 0
