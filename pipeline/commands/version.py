"""`sameroute --version`: what is installed, without an import of any of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

ENGINES = ("megatron-core", "sglang", "torch", "ray", "transformers", "transformer-engine")
"""Packages whose versions decide what a run computes."""


def version_text() -> str:
    """A line a package, its name and its version as its metadata has it."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    lines = []
    for package in ("sameroute", *ENGINES):
        try:
            lines.append((package, version(package)))
        except PackageNotFoundError:
            lines.append((package, "not installed"))
    lines.append(("python", platform.python_version()))
    return "\n".join(f"{name:20}{text}" for name, text in lines)


class ShowVersion(argparse.Action):
    """An option that prints the versions and ends the command with 0. They are read when they are asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any):
        super().__init__(option_strings, dest, nargs=0, **settings)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        print(version_text())
        parser.exit()
