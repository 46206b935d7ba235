"""The two arguments of every command that takes a configuration."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_config(parser: argparse.ArgumentParser) -> None:
    """`config`, a Path, and `overrides`, a list of texts."""
    parser.add_argument("config", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="overrides of single fields")
