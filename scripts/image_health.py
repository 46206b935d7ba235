"""The health check of the image: the command can be imported, and torch sees the GPUs that the container was given."""

from __future__ import annotations

import sys
from pathlib import Path

import pipeline.commands.main  # noqa: F401

if any(Path("/dev").glob("nvidia[0-9]*")):
    import torch

    if not torch.cuda.is_available():
        sys.exit("the container has GPUs that torch cannot use: the host's driver is too old for CUDA 13, or failed")
print("healthy")
