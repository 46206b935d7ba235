"""Programs of every hostile kind among right ones, in real sandboxes: each is graded as it is, and nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pipeline.rewards import Grader
from pipeline.rewards.sandbox import Program, open_sandbox
from tests.support.programs import HOSTILE, LIMITS, RIGHT, Watch, question, running, verifier
from tests.support.unprivileged import as_nobody

SHORT = {"wall_s": 3.0, "total_s": 3.0}


@pytest.fixture(scope="module")
def sandbox():
    return open_sandbox(LIMITS, name="code")


def all_gone(within_s=5.0):
    deadline = time.monotonic() + within_s
    while running() and time.monotonic() < deadline:
        time.sleep(0.05)
    return running() == []


def test_every_hostile_program_is_wrong_every_right_one_among_them_is_right_and_nothing_is_left():
    with Watch() as watch, Grader([verifier(**SHORT)], workers=6) as grader:
        hostile = list(watch.programs().items())
        mixed = [pair for i, bad in enumerate(hostile) for pair in (("right", RIGHT[i % len(RIGHT)]), bad)]
        verdicts = grader.ask([question(text, index) for index, (_, text) in enumerate(mixed)])
        assert running() == []
        assert watch.left() == []
    graded = {what: verdict.reward for (what, _), verdict in zip(mixed, verdicts, strict=True) if what != "right"}
    assert [v.what for v in verdicts if v.kind is not None] == []
    assert [verdict.reward for (what, _), verdict in zip(mixed, verdicts, strict=True) if what == "right"] == [
        1.0
    ] * len(hostile)
    assert graded == dict.fromkeys(HOSTILE, 0.0)


def test_the_same_holds_for_an_unprivileged_user():
    kinds = ["fork bomb", "memory bomb", "file writes outside", "a socket", "kills all", "a grandchild that outlives"]
    kinds += ["the environment of its parent", "new namespaces", "another user", "memory that no limit counts"]
    script = f"""
import json, os
from pipeline.rewards import Grader
from pipeline.rewards.processes import below, parents
from tests.support.programs import RIGHT, Watch, question, running, verifier
with Watch() as watch, Grader([verifier(wall_s=1.0, total_s=1.0)], workers=4) as grader:
    programs = [text for what in {kinds} for text in (RIGHT[0], watch.programs()[what])]
    rewards = [v.reward for v in grader.ask([question(text) for text in programs])]
    print(json.dumps([os.geteuid(), rewards, watch.left(), running()]))
"""
    done = subprocess.run(as_nobody([sys.executable, "-c", script]), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    user, rewards, left, still = json.loads(done.stdout)
    assert user != 0
    assert rewards == [1.0, 0.0] * len(kinds)
    assert (left, still) == ([], [])


@pytest.mark.parametrize("who", ["driver", "guard", "supervisor"])
def test_nothing_outlives_a_grader_that_is_killed(who):
    kinds = ["fork bomb", "signals ignored", "sleep", "endless loops of children"]
    script = f"""
import os, threading, time
from pipeline.rewards import Grader
from pipeline.rewards.processes import below, parents
from tests.support.programs import HOSTILE, question, verifier
with Grader([verifier(cpu_s=60, wall_s=60.0, total_s=60.0, memory_mb={LIMITS["memory_mb"]})], workers=4) as grader:
    grader.wait_ready()
    print(os.getpid(), grader._process.pid, *below(grader._process.pid, parents())[:1], flush=True)
    grader.ask([question(HOSTILE[what]) for what in {kinds}])
"""
    driver = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    processes = dict(zip(("driver", "guard", "supervisor"), map(int, driver.stdout.readline().split()), strict=True))
    deadline = time.monotonic() + 60
    seen, before = 0, set()
    while seen < 2 and time.monotonic() < deadline:  # each has bwrap outside and inside, and while it begins one more
        before = set(running())  # of which one may end by itself, as a fork bomb does at its limit
        seen = seen + 1 if len(before) >= 2 * len(kinds) else 0
        time.sleep(0.1)
    assert len(before) >= 2 * len(kinds)
    if who != "driver":
        driver.send_signal(signal.SIGSTOP)  # else it starts another
    os.kill(processes[who], signal.SIGKILL)
    deadline = time.monotonic() + 5
    while before & set(running()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert before & set(running()) == set()
    driver.kill()
    driver.wait()
    driver.stdout.close()
    assert all_gone()


@pytest.mark.parametrize(
    ("what", "end"),
    [
        ("fork bomb", "timeout"),
        ("memory bomb", "memory"),
        ("memory bomb of children", "memory"),
        ("memory bomb in shared memory", "memory"),
        ("endless loop", "signal"),
        ("1 GB of output", "output"),
        ("crash", "signal"),
    ],
)
def test_what_ended_a_program_is_told(sandbox, what, end):
    wall_s = 1.5 if end == "timeout" else 30  # another limit ends it first, on a busy machine too
    assert sandbox.run(Program(HOSTILE[what], "7\n"), wall_s).end == end


def test_a_program_sees_no_file_of_the_run_and_no_environment(sandbox):
    seen = "import os\nprint(sorted(os.environ))\n"
    seen += "for f in '/', '/work', '/tmp', '/proc':\n    print(sorted(os.listdir(f)))"
    outcome = sandbox.run(Program(seen), 5)
    environment, root, work, temporary, processes = outcome.stdout.splitlines()
    assert "SECRET" not in environment
    assert set(json.loads(environment.replace("'", '"'))) <= {
        "HOME", "LANG", "LC_CTYPE", "MALLOC_ARENA_MAX", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PATH", "PWD",
        "PYTHONHASHSEED",
    }  # fmt: skip
    names = set(json.loads(root.replace("'", '"')))
    assert names.isdisjoint({"etc", "home", "var", "opt", "srv", "sys", "run"})
    assert work == temporary == "['main.py']"
    assert [name for name in json.loads(processes.replace("'", '"')) if name.isdigit()] == ["1", "2"]


def test_a_program_reads_megabytes_and_prints_what_it_may(sandbox):
    text = "1" * 3_000_000
    outcome = sandbox.run(Program("print(len(input()))\nprint('2' * 900_000)", f"{text}\n"), 10)
    assert outcome.well
    assert outcome.stdout == f"{len(text)}\n{'2' * 900_000}\n"


def test_a_program_that_reads_nothing_of_megabytes_is_well(sandbox):
    assert sandbox.run(Program("print(1)", "1" * 3_000_000), 10).stdout == "1\n"
