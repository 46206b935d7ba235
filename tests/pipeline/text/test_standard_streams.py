"""A command whose reader goes does its work to the end."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from pipeline.text.standard_streams import make_patient

PROGRAM = """
import os, pathlib, subprocess, sys
from pipeline.text.standard_streams import make_patient
make_patient()
{before}
for number in range(3):
    print("line", "x" * 100_000, flush=True)
    print("line", file=sys.stderr)
subprocess.run(["echo", "from a child"], check=True)
pathlib.Path(sys.argv[1]).write_text("done")
"""
CONSOLE = """
from pipeline.observe.console import Console
with Console(2) as console:
    console.say("x" * 100_000)
    console.step({"step": 1, "reward/mean": 0.5})
"""


@pytest.mark.parametrize("before", ["", CONSOLE], ids=["print", "console"])
def test_what_prints_goes_on_when_nobody_reads_any_more(before, tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", PROGRAM.format(before=before), str(tmp_path / "end")]
    try:
        done = subprocess.run(command, stdout=write, stderr=write)
    finally:
        os.close(write)
    assert done.returncode == 0
    assert (tmp_path / "end").read_text() == "done"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_stays_gets_every_line_and_strange_characters_as_escapes(unbuffered):
    program = "from pipeline.text.standard_streams import make_patient; make_patient(); make_patient()\n"
    program += "import sys; print('a\\u2192b', end=''); print('c'); print('d', file=sys.stderr)"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=True)
    assert (done.stdout, done.stderr) == (b"a\\u2192bc\n", b"d\n")


def test_a_stream_that_is_not_the_processes_own_stays_in_its_place(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    make_patient()
    assert sys.stdout is stream
    print("\u2192", flush=True)
    assert stream.buffer.getvalue() == b"\\u2192\n"  # pyright: ignore[reportAttributeAccessIssue]
