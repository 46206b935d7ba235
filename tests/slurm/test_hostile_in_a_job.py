"""`make hostile` in a job of a real Slurm."""

from __future__ import annotations

import sys

import pytest

from tests.slurm.job import ROOT, no_processes

pytestmark = pytest.mark.slurm


@pytest.mark.timeout(900)
def test_a_thousand_hostile_programs_are_contained_and_graded_right_inside_a_job(slurm):
    """As a user without rights, and a tenth of them as root."""
    output = slurm.folder / "hostile.out"
    command = f"{sys.executable} -m tests.hostile --programs 1000"
    number = int(slurm.run("sbatch", "--parsable", f"--output={output}", f"--chdir={ROOT}", f"--wrap={command}"))
    ended = slurm.wait_for_state(number, "COMPLETED", "FAILED", timeout_s=840)
    text = output.read_text()
    assert ended["ExitCode"] == "0:0", text
    assert "user 65534: 1000 right and 1000 hostile programs" in text
    assert text.count("left behind: []") == 2
    assert no_processes(slurm)
