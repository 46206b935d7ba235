"""Too few open files are told before anything starts, with the number; a low soft limit is raised."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from pipeline.cluster.limits import files_needed
from pipeline.config import load_config

TRY = """
import resource, sys
from pipeline.config import load_config
from pipeline.cluster.limits import raise_open_files
raise_open_files(load_config("configs/quickstart.yaml"))
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def tried(soft: int, hard: int) -> subprocess.CompletedProcess:
    command = f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$0" -c "$1"'
    return subprocess.run(["bash", "-c", command, sys.executable, TRY], capture_output=True, text=True)


def test_what_is_needed_grows_with_answers_and_ranks():
    quick = files_needed(load_config("configs/quickstart.yaml"))
    assert quick == 512 + 32 * 8 + 32
    assert files_needed(load_config("configs/quickstart.yaml", ["rollout.samples_per_prompt=64"])) == quick + 32 * 56
    assert files_needed(load_config("configs/quickstart.yaml", ["parallel.ranks=3"])) == quick + 64
    ahead = ["rollout.max_staleness=4", "objective.correction=none"]
    assert files_needed(load_config("configs/quickstart.yaml", ahead)) == quick + 32 * 8 * 3


@pytest.mark.parametrize("hard", [128, 799])
def test_a_low_hard_limit_is_an_error_with_both_numbers(hard):
    done = tried(100, hard)
    assert done.returncode == 1
    assert f"LimitError: ulimit -n is {hard}, and this run needs 800 open files" in done.stderr


@pytest.mark.parametrize("hard", [800, resource.getrlimit(resource.RLIMIT_NOFILE)[1]])
def test_a_low_soft_limit_is_raised(hard):
    assert tried(100, hard).stdout == f"{min(hard, 65536)}\n"
