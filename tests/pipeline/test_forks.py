"""A forked process is what the process that asked for it would have become, and neither outlives the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.forks import ROOM

SERVE = """
import os, sys, time
from pathlib import Path
from pipeline import forks

def imports():
    os.environ["SET_BY_IMPORTS"] = "1"

child = forks.serve(Path(sys.argv[1]), int(sys.argv[2]), imports, ("READ_EARLY",))
child.follow(lambda: os._exit(1))
exec(child.arguments[0])
"""
ASK = "import sys; from pipeline import forks; forks.end_as(forks.ask(sys.argv[1], sys.argv[2:]))"
IMPATIENT = ASK.replace("forks.end_as", "forks._COMES_S = 0.2; forks.end_as", 1)


@pytest.fixture
def forks(tmp_path):
    """Returns the socket of a process that forks for as long as the test runs."""
    with subprocess.Popen(["sleep", "600"]) as keeper:
        command = [sys.executable, "-c", SERVE, str(tmp_path / "forks"), str(keeper.pid)]
        with subprocess.Popen(command, env=os.environ | ROOM | {"READ_EARLY": "1"}) as process:
            try:
                wait_for((tmp_path / "forks").exists)
                yield tmp_path / "forks"
            finally:
                keeper.kill()
                process.wait(60)  # it ends with its keeper, whatever the test did


def wait_for(condition, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ask(forks, code, program=ASK, **variables):
    return subprocess.Popen(
        [sys.executable, "-c", program, str(forks), code],
        env=os.environ | {"READ_EARLY": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_child_has_the_environment_streams_and_folder_of_who_asked_and_a_session_of_its_own(forks, tmp_path):
    code = """
import subprocess
print(os.getcwd(), os.getsid(0) == os.getpid())
print(os.environ["MINE"], os.environ["SET_BY_IMPORTS"], "SAMEROUTE_FORKS_ROOM" in os.environ)
print(b"MINE=yes" in Path("/proc/self/environ").read_bytes().split(bytes(1)))
print(subprocess.run(["sh", "-c", "echo $MINE"], capture_output=True, text=True).stdout.strip())
print("an error", file=sys.stderr)
"""
    out, error = ask(forks, code, MINE="yes").communicate(timeout=60)
    assert out.splitlines() == [f"{os.getcwd()} True", "yes 1 False", "True", "yes"]
    assert error == "an error\n"


@pytest.mark.parametrize(
    ("code", "status"), [("sys.exit(7)", 7), ("1 / 0", 1), ("", 0), ("os.kill(os.getpid(), 15)", -15),
                         ("os.kill(os.getpid(), 9)", -9)]
)  # fmt: skip
def test_who_asked_ends_as_the_child_ends(forks, code, status):
    assert ask(forks, code).wait(60) == status


def test_a_child_learns_that_who_asked_is_gone(forks):
    asker = ask(forks, "print(os.getpid(), flush=True); time.sleep(600)")
    child = int(asker.stdout.readline())
    assert running(child)
    asker.send_signal(signal.SIGKILL)
    wait_for(lambda: not running(child))


def test_who_asks_before_the_process_listens_waits_for_it(tmp_path):
    asker = ask(tmp_path / "forks", "print('forked')")
    time.sleep(0.3)  # it has found nobody
    assert asker.poll() is None
    with subprocess.Popen(["sleep", "600"]) as keeper:
        command = [sys.executable, "-c", SERVE, str(tmp_path / "forks"), str(keeper.pid)]
        with subprocess.Popen(command, env=os.environ | ROOM | {"READ_EARLY": "1"}):
            assert asker.communicate(timeout=60)[0] == "forked\n"
            keeper.kill()


def test_children_end_on_their_own_while_others_run(forks):
    long = ask(forks, "print(os.getpid(), flush=True); time.sleep(600)")
    child = int(long.stdout.readline())
    assert ask(forks, "sys.exit(3)").wait(60) == 3
    assert running(child)
    long.kill()


def test_imports_made_under_another_environment_are_refused_by_the_name_of_the_variable(forks):
    asker = ask(forks, "print('it runs')", READ_EARLY="2")
    out, error = asker.communicate(timeout=60)
    assert (out, asker.returncode) == ("", 1)
    assert "the imports were made with READ_EARLY=1, this process is to have 2" in error


def test_nobody_to_ask_is_an_error(tmp_path):
    asker = ask(tmp_path / "nobody", "", IMPATIENT)
    _, error = asker.communicate(timeout=60)
    assert asker.returncode == 1
    assert "no process forks at" in error


def test_imports_that_leave_a_thread_are_refused(tmp_path):
    code = """
import sys, threading, time
from pathlib import Path
from pipeline import forks
forks.serve(Path(sys.argv[1]), 1, lambda: threading.Thread(target=time.sleep, args=(9,), daemon=True).start(), ())
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "forks")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "the imports have started 1 threads" in done.stderr
