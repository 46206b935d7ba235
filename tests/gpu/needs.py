"""Says in one line what `make test-gpu` lacks on this machine, with exit code 1; nothing where it lacks nothing."""

from __future__ import annotations

import importlib.util
import sys

PACKAGES = {
    "torch": "torch",
    "triton": "triton",
    "megatron.core": "megatron-core",
    "pydantic": "pydantic",
    "safetensors": "safetensors",
    "numpy": "numpy",
    "pytest": "pytest",
    "pytest_timeout": "pytest-timeout",
}


def lacking() -> str | None:
    """A sentence, or None."""
    # "megatron.core" is found by importing "megatron", which may be missing itself.
    missing = [
        package
        for name, package in PACKAGES.items()
        if importlib.util.find_spec(name.partition(".")[0]) is None or importlib.util.find_spec(name) is None
    ]
    if missing:
        return f"make test-gpu needs the Python packages {', '.join(missing)} ({sys.executable} has them not)"
    import torch

    if not torch.cuda.is_available():
        return f"make test-gpu needs an NVIDIA GPU with its driver; torch {torch.__version__} sees none"
    return None


if __name__ == "__main__":
    if said := lacking():
        sys.exit(said)
