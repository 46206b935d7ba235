"""Whatever a verifier does, the run gets a verdict in time, and nothing is left. Every process here is a real one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.rewards.environment import without_secrets
from pipeline.rewards.grader import Grader, Surroundings
from pipeline.rewards.processes import below, marked, parents
from pipeline.rewards.protocol import Limits
from pipeline.rewards.registry import RewardError
from tests.support.hostile import TAG, question

HOSTILE = "tests.support.hostile:verify"
LIMITS = Limits(timeout_s=2.0, grace_s=0.2)


def left_behind():
    """Processes that a verifier of these tests started and that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if TAG.encode() in words:
                found.append(int(entry.name))
    return found


def processes_of(grader):
    """The guard, the supervisor, its workers and what these have started."""
    return [grader._process.pid, *below(grader._process.pid, parents())]


def gone(processes, within_s=5.0):
    """Whether all of them end in time."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not set(processes) & parents().keys():
            return True
        time.sleep(0.02)
    return False


@contextlib.contextmanager
def module_of(name, text):
    """A module that is found only through this process's sys.path; yields the name of its verifier."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"{name}.py").write_text(text)
        sys.path.insert(0, folder)
        try:
            yield f"{name}:verify"
        finally:
            sys.path.remove(folder)


@pytest.fixture(scope="module")
def grader():
    with Grader(HOSTILE, workers=2, limits=LIMITS) as made:
        made.wait_ready()
        yield made


@pytest.fixture(scope="module")
def patient():
    """For what is allowed, however busy the machine is."""
    with Grader(HOSTILE, workers=2, limits=Limits(timeout_s=60.0, grace_s=30.0)) as made:
        made.wait_ready()
        yield made


def verdict_on(grader, do, within_s=15.0, **metadata):
    """Of one answer among right ones, which are graded right whatever happens beside them."""
    start = time.monotonic()
    verdicts = grader.ask([question(), question(do, **metadata), question(), question()])
    assert time.monotonic() - start < within_s
    assert [verdicts[i].reward for i in (0, 2, 3)] == [1.0, 1.0, 1.0]
    return verdicts[1]


@pytest.mark.parametrize(
    ("do", "kind", "words"),
    [
        ("hang", "timeout", "took more than 2 s"),
        ("hang_deaf", "timeout", "took more than 2 s"),
        ("spin", "timeout", "took more than 2 s"),
        ("stop", "timeout", "took more than 2 s"),
        ("raise", "raised", "raised ZeroDivisionError: no such thing (hostile.py, line "),
        ("interrupt", "crashed", "died of SIGINT"),
        ("raise_exit", "exited", "called sys.exit(0)"),
        ("exit", "exited", "ended its process with code 0"),
        ("kill", "crashed", "died of SIGKILL"),
        ("terminate", "crashed", "died of SIGTERM"),
        ("segfault", "crashed", "died of SIGSEGV"),
        ("abort", "crashed", "died of SIGABRT"),
        ("inf", "not_a_number", "returned inf, which is no finite number of float32"),
        ("nan", "not_a_number", "returned np.float32(nan), which"),
        ("large", "not_a_number", "returned 1e+39, which"),
        ("larger", "not_a_number", "returned 1000000"),
        ("unprintable", "not_a_number", "returned a int that cannot be printed, which"),
        ("wide", "not_a_number", "returned np.float64(1e+300), which"),
        ("text", "not_a_number", "returned '1.0', which"),
        ("nothing", "not_a_number", "returned [], which"),
        ("complex", "not_a_number", "returned 1j, which"),
        ("array", "not_a_number", "returned array([0.]), which"),
        ("none", "not_a_number", "returned None, which"),
        ("generator", "not_a_number", "returned <generator object "),
        ("list", "not_a_number", "returned [1.0], which"),
        ("mapping", "not_a_number", "returned {'score': 1.0}, which"),
        ("raise_interrupt", "raised", "raised KeyboardInterrupt (hostile.py, line "),
        ("raise_unprintable", "raised", "raised UnprintableError: it cannot be printed (hostile.py, line "),
        ("flood", "output", "wrote more than 1,048,576 bytes to stdout and stderr"),
        ("flood_error", "output", "wrote more than 1,048,576 bytes to stdout and stderr"),
        ("raise_memory", "memory", "raised MemoryError"),
        ("thread", "left_behind", "returned and left a thread running (stays)"),
        ("child", "left_behind", "returned and left a process running ("),
        ("deaf_grandchild", "left_behind", "returned and left a process running ("),
        ("junk", "crashed", "wrote into what its worker says to the run"),
        ("forge", "crashed", "wrote into what its worker says to the run"),
        ("close", "crashed", "closed what its worker speaks to the run through"),
        ("close_and_stay", "crashed", "closed what its worker speaks to the run through"),
    ],
)
def test_what_a_verifier_does_wrong_is_a_verdict_and_costs_no_other_answer(grader, do, kind, words):
    verdict = verdict_on(grader, do)
    assert verdict.reward is None
    assert verdict.kind == kind
    assert verdict.what.startswith(words)
    assert verdict_on(grader, "right").reward == 1.0
    assert gone(left_behind(), 2)


@pytest.mark.parametrize(
    ("do", "reward"),
    [
        ("right", 1.0),
        ("largest", float(np.finfo(np.float32).max)),
        ("true", 1.0),
        ("half", 0.5),
        ("print", 1.0),
        ("read_stdin", 1.0),
        ("fork", 1.0),
        ("thread_that_ends", 1.0),
        ("child_that_ends", 1.0),
        ("child_not_waited_for", 1.0),
        ("helper_of_multiprocessing", 1.0),
        ("core", 1.0),  # it cannot leave one, on a disk that is the run's
    ],
)
def test_what_is_allowed_is_graded(patient, do, reward):
    assert verdict_on(patient, do).reward == reward


def test_a_fork_that_comes_back_answers_nothing_and_ends(patient):
    before = len(processes_of(patient))
    assert [v.reward for v in patient.ask([question("fork") for _ in range(20)])] == [1.0] * 20
    assert [v.reward for v in patient.ask([question()] * 4)] == [1.0] * 4
    assert len(processes_of(patient)) == before


@pytest.mark.parametrize("do", ["memory", "memory_of_child"])
def test_two_gigabytes_of_its_own_or_of_a_child_are_too_much_for_one(do):
    with Grader(HOSTILE, workers=1, limits=Limits(timeout_s=60, memory_gb=1.0)) as small:
        verdict = verdict_on(small, do, within_s=30)
        assert (verdict.kind, verdict.what) == ("memory", "took more than 1 GB of memory")
        assert verdict_on(small, "right").reward == 1.0
    assert left_behind() == []


def test_processes_are_counted():
    with Grader(HOSTILE, workers=1, limits=Limits(timeout_s=60, processes=20)) as few:
        few.wait_ready()
        verdict = verdict_on(few, "bomb", within_s=30)
        assert (verdict.kind, verdict.what) == ("processes", "started more than 20 processes")
        assert verdict_on(few, "right").reward == 1.0
    assert left_behind() == []


def test_many_failures_among_many_answers_are_told_apart(grader):
    kinds = ["right", "raise", "exit", "kill", "large", "right"]
    asked = [kinds[i % len(kinds)] for i in range(120)]
    verdicts = grader.ask([question(do) for do in asked])
    expected = {"right": None, "raise": "raised", "exit": "exited", "kill": "crashed", "large": "not_a_number"}
    assert [v.kind for v in verdicts] == [expected[do] for do in asked]


def test_what_a_verifier_printed_before_it_died_stands_in_the_reason():
    module = "import os\n\n\ndef verify(*_):\n    print('these are\\n last words')\n    os._exit(3)\n"
    with module_of("last_words", module) as name, Grader(name, workers=1, limits=LIMITS) as made:
        (verdict,) = made.ask([question()])
    assert verdict.what == "ended its process with code 3; it had printed 'these are last words'"


def test_answers_are_graded_at_the_same_time_and_workers_stay_warm():
    with Grader(HOSTILE, workers=8) as eight:
        eight.ask([question()] * 256)  # quick ones first: what comes then is still shared out
        before = set(processes_of(eight))
        start = time.monotonic()
        assert [v.reward for v in eight.ask([question("slow")] * 16)] == [1.0] * 16
        assert time.monotonic() - start < 6.0  # one after the other: 8 s
        assert len({v.reward for v in eight.ask([question("process")] * 64)}) > 1
        assert set(processes_of(eight)) == before


def test_a_coroutine_is_awaited():
    with Grader("tests.support.hostile:verify_later", workers=2, limits=LIMITS) as made:
        verdicts = made.ask([question(do) for do in ("right", "raise", "hang", "large", "right")])
    assert [v.kind for v in verdicts] == [None, "raised", "timeout", "not_a_number", None]


def test_a_verifier_gets_its_arguments_whole():
    with Grader("tests.support.hostile:echo", workers=1) as made:
        (verdict,) = made.ask([question("right", index=7, answer="12\u20ac\ud800")])
    assert "index=7" in verdict.what
    assert "'answer': '12€\\\\ud800'" in verdict.what or "'answer': '12€\\ud800'" in verdict.what
    assert "'an answer', array([0, 1, 2], dtype=int32), 'stop'" in verdict.what


def test_what_a_verifier_changes_is_its_own(grader):
    asked = question("change")
    assert {v.reward for v in grader.ask([asked] * 8)} == {1.0}
    assert "count" not in asked.prompt.metadata


def test_a_worker_holds_no_engine_and_no_secret(monkeypatch):
    secrets = {
        "WANDB_API_KEY": "1",
        "RAY_AUTH_TOKEN": "1",
        "MLFLOW_TRACKING_PASSWORD": "1",
        "SAMEROUTE_RUN_KEY": "1",
        "HF_TOKEN": "1",
        "AWS_SECRET_ACCESS_KEY": "1",
        "http_proxy": "http://me:word@proxy:80",
        "JUDGE_KEY": "1",
        "PLAIN_SETTING": "1",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    assert set(without_secrets(secrets)) == {"PLAIN_SETTING"}
    with Grader(HOSTILE, workers=1, surroundings=Surroundings.here(("JUDGE_KEY",))) as made:
        verdicts = made.ask([question("environment", name=name) for name in secrets])
        (modules,) = made.ask([question("modules")])
        (descriptors,) = made.ask([question("descriptors")])
    seen = [name for name, verdict in zip(secrets, verdicts, strict=True) if verdict.reward]
    assert seen == ["JUDGE_KEY", "PLAIN_SETTING"]
    assert modules.reward == 0
    assert descriptors.reward <= 7  # three, its channel and output, what stdin was opened as, and this list


@pytest.mark.parametrize("who", [0, 1])  # the guard, the supervisor
def test_of_a_grader_that_is_killed_nothing_is_left_whatever_its_verifiers_have_hidden(who):
    with Grader(HOSTILE, workers=2, limits=Limits(timeout_s=60)) as made:
        made.wait_ready()
        outbox = bytearray(b"".join(b"".join(made.parts(question("forget_and_hang")).values()) for _ in range(2)))
        made.exchange(outbox)
        while len(processes := processes_of(made)) < 6:  # both workers have a child without mark and session
            time.sleep(0.02)
        os.kill(processes[who], signal.SIGKILL)
        assert gone(processes, 5.0)


def test_a_supervisor_that_is_killed_is_replaced_and_one_that_always_is_ends_the_run():
    with Grader(HOSTILE, workers=2, limits=LIMITS) as made:
        made.wait_ready()
        before = processes_of(made)
        os.kill(before[1], signal.SIGKILL)
        assert [v.reward for v in made.ask([question()] * 4)] == [1.0] * 4
        assert gone(before, 2)
        with pytest.raises(RewardError, match=r"supervisor of the verifier .* ended with code -9, 3 times in one step"):
            made.ask([question(), question("kill_supervisor")])


def test_what_a_verifier_had_hidden_ends_though_its_worker_died_first(grader):
    tagged = verdict_on(grader, "environment", name="LEFT_BEHIND_BY_TESTS")
    assert tagged.reward == 1.0, "else what is left behind would not be seen, here and in any test"
    assert verdict_on(grader, "deaf_grandchild_and_kill").kind == "crashed"
    deadline = time.monotonic() + 10
    while left_behind():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_signal_to_the_whole_job_costs_no_answer():
    with Grader(HOSTILE, workers=3) as made:
        made.wait_ready()
        guard, supervisor, *workers = processes_of(made)
        timer = threading.Timer(0.25, lambda: [os.kill(p, signal.SIGTERM) for p in (guard, supervisor, *workers)])
        timer.start()
        assert [v.reward for v in made.ask([question("slow")] * 6)] == [1.0] * 6
        timer.join()
        assert not set(workers) & set(processes_of(made))


def test_the_end_leaves_nothing():
    with Grader(HOSTILE, workers=4, limits=Limits(timeout_s=60)) as made:
        made.wait_ready()
        mark = made._mark
        processes = processes_of(made)
        assert len(processes) == 6
    assert gone(processes, 0.1)
    assert marked(mark) == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, "error"])
def test_nothing_outlives_a_driver_that_ends_while_verifiers_hang(how, tmp_path):
    script = f"""
import json, os, signal, sys, threading, time
from pipeline.rewards.grader import Grader
from pipeline.rewards.processes import below, parents
from tests.support.hostile import question

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run behind an `&` of a script

def tell(grader):
    found, deadline = [], time.monotonic() + 60
    while len(found) < 5 and time.monotonic() < deadline:  # supervisor, three workers, what one of these has hidden
        found = below(grader._process.pid, parents())
        time.sleep(0.05)
    print(json.dumps([grader._process.pid, *found]), flush=True)
    if {how == "error"}:
        os.kill(os.getpid(), 2)

with Grader("tests.support.hostile:verify", workers=3) as grader:
    grader.wait_ready()
    threading.Thread(target=tell, args=(grader,), daemon=True).start()
    asked = ["hang_deaf", "deaf_grandchild_and_hang", "spin"]
    grader.ask([question(do) for do in asked])
"""
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    processes = json.loads(driver.stdout.readline())
    assert len(processes) >= 6
    if how != "error":
        driver.send_signal(how)
    assert driver.wait(30) != 0
    assert gone(processes, 5.0)
    assert left_behind() == []
    driver.stdout.close()
    driver.stderr.close()
