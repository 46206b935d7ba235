"""The command, called in a process that has Megatron-Core in it already."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file

from tests.support.ranks import run_alone

TO_MEGATRON, TO_HF = "to-megatron", "to-hf"


class Call(NamedTuple):
    """Arguments of `sameroute convert`. before: what else is done in the process first, to break something."""

    arguments: list[Any]
    before: Callable[[], None] | None = None


class Answer(NamedTuple):
    code: int
    text: str


def _run(calls: list[Call]) -> list[Answer]:
    from pipeline.commands.main import main

    out = []
    for call in calls:
        if call.before is not None:
            call.before()
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            code = main(["convert", *map(str, call.arguments)])
        out.append(Answer(code, text.getvalue()))
    return out


def convert(*calls: Call | list[Any], environments: tuple[dict[str, str], ...] = ({},)) -> list[Answer]:
    """One process runs the calls one after another, so what a `before` breaks stays broken."""
    wanted = [call if isinstance(call, Call) else Call(call) for call in calls]
    return [answer for process in run_alone(_run, wanted, environments=environments) for answer in process]


def with_tensors(source: Path, folder: Path, edit: Callable[[dict], None]) -> Path:
    """A copy of the model directory `source` at `folder` whose tensors `edit` has changed."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
