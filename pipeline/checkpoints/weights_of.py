"""A model directory with weights, of whatever a user points at: one, a checkpoint of a run, or the run itself."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.checkpoint.names import CHECKSUMS
from megatron_ext.hf.writer import has_weights
from pipeline.checkpoints.store import BEST, CheckpointStore
from pipeline.disk.scratch import scratch_folder
from pipeline.errors import NOT_STARTED, SamerouteError


class NoModelError(SamerouteError):
    """There is no model where it was looked for."""

    exit_code = NOT_STARTED


def model_of_run(run: Path, checkpoint: str | None = None) -> Path:
    """Of a run directory: the checkpoint of that name ("best", "step_40"); by default the trained model where the run
    has ended, else its newest checkpoint. Raises NoModelError where there is none, naming those there are."""
    if not (run / "config.yaml").is_file():
        raise NoModelError(f"{run} is no run directory: it has no config.yaml")
    store = CheckpointStore(run / "checkpoints")
    if checkpoint is not None:
        found = store.directory / checkpoint
        if not (found / CHECKSUMS).is_file():
            there = [path.name for path in store.complete()] + ([BEST] if store.best is not None else [])
            raise NoModelError(f"{run} has no checkpoint {checkpoint!r}; it has {', '.join(there) or 'none'}")
        return found
    if has_weights(run / "hf"):
        return run / "hf"
    if (latest := store.latest()) is None:
        raise NoModelError(f"{run} has no trained model in hf/ and no checkpoint yet (checkpoint.every_steps)")
    return latest


def without_weights(model: Path) -> Path:
    """Of the same, the directory that holds its config.json and tokenizer."""
    return model / "hf" if (model / CHECKSUMS).is_file() else model


@contextlib.contextmanager
def weights_of(model: Path) -> Iterator[Path]:
    """A Hugging Face directory of a model directory, which it is itself, or of a checkpoint, whose weights are written
    to a folder that is gone when the block ends. Raises NoModelError for anything else, and for a damaged checkpoint.
    """
    if (model / CHECKSUMS).is_file():
        with scratch_folder() as scratch:
            words = ["convert", "to-hf", str(model), str(scratch / "hf"), "--no-verify"]
            # In a process of its own: Megatron-Core converts without the GPUs, which servers are to have.
            command = [sys.executable, "-P", "-m", "pipeline.commands.main", *words]
            if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode:
                raise NoModelError(f"{model} is no checkpoint that can be read; the line above says why")
            yield scratch / "hf"
    elif (model / "config.json").is_file():
        if not any(model.glob("*.safetensors")):
            raise NoModelError(f"{model} has a config.json and no weights (*.safetensors)")
        yield model
    else:
        raise NoModelError(f"{model} is neither a Hugging Face directory (config.json) nor a checkpoint of a run")
