"""Where a process stands is read from outside, also while it is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from pipeline.cluster.stacks import stacks_of
from tests.support.fake_servers import wait_for

_PROGRAM = """
import time
def waits_for_nobody():
    print("there", flush=True)
    time.sleep(60)
waits_for_nobody()
"""


def test_a_process_that_was_stopped_is_said_to_be_and_shows_its_line():
    with subprocess.Popen([sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            (before,) = stacks_of([process.pid])
            os.kill(process.pid, signal.SIGSTOP)
            wait_for(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
            (after,) = stacks_of([process.pid])
        finally:
            process.kill()
    assert before.state != "stopped"
    assert after.state == "stopped"
    assert after.problem == ""
    assert after.threads[0].frames[0].function == "waits_for_nobody"
    assert "waits_for_nobody (<string>:5)" in str(after)


def test_a_process_that_is_gone_is_said_to_be():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert [one.state for one in stacks_of([process.pid])] == ["gone"]


def test_what_cannot_be_read_says_why():
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            (seen,) = stacks_of([process.pid])
        finally:
            process.kill()
    assert seen.threads == ()
    assert "python" in seen.problem.lower()
