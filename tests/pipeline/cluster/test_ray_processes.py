"""What Ray tells a driver, but for the log of a raylet that died. (Which of its processes died: tests/chaos.)"""

import os
import shlex
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
from ray._private import worker

from pipeline.cluster.ray_processes import (
    _with_an_idle_agent,
    died_said,
    ended,
    leave_out_the_raylets_log,
    what_died,
)


@pytest.fixture
def raylet(monkeypatch):
    """A process in the place of Ray's own."""
    process = subprocess.Popen(["sleep", "600"])
    node = SimpleNamespace(all_processes={"raylet": [SimpleNamespace(process=process)]})
    monkeypatch.setattr(worker, "_global_node", node)
    yield process
    process.kill()
    process.wait()


def test_a_raylet_that_dies_is_said_at_once_and_named_afterwards(raylet):
    said = []
    with died_said(said.append):
        assert said == []
        raylet.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 5
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
    words = "Ray's process the raylet, which starts and ends processes, was killed by SIGKILL; "
    assert said == [words + "the run ends"]
    assert what_died() == words
    assert ended() == words.removesuffix("; ")


def test_a_raylet_that_lives_is_no_news(raylet):
    said = []
    with died_said(said.append):
        assert ended() == ""
    raylet.send_signal(signal.SIGTERM)  # by ray.shutdown
    raylet.wait()
    assert said == []


def test_what_stands_for_the_agent_of_a_raylet_ends_with_it(raylet, tmp_path):
    command = ["raylet", f"--session_dir={tmp_path}", "--node_id=9", "--dashboard_agent_command=python agent.py"]
    kept, agent = _with_an_idle_agent(command)[:-1], _with_an_idle_agent(command)[-1]
    assert kept == command[:-1]
    waited_for = ("dashboard_agent_listen_port_9", "metrics_agent_port_9", "metrics_export_port_9")
    assert sorted(file.name for file in tmp_path.iterdir()) == list(waited_for)
    words = shlex.split(agent.removeprefix("--dashboard_agent_command="))
    idle = subprocess.Popen(words, env=os.environ | {"RAY_RAYLET_PID": str(raylet.pid)})
    with pytest.raises(subprocess.TimeoutExpired):
        idle.wait(0.2)
    raylet.kill()
    raylet.wait()
    assert idle.wait(10) == 0


def test_the_log_of_a_raylet_that_died_is_left_out_and_nothing_else(capsys, monkeypatch):
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    leave_out_the_raylets_log()
    for line in ("Raylet is terminated. Termination is unexpected.\n    many lines", "A worker died of memory"):
        worker.print_to_stdstream({"lines": [line], "pid": "raylet", "is_err": False, "ip": None}, ignore_prefix=False)
    said = capsys.readouterr().out
    assert "A worker died of memory" in said
    assert "Raylet is terminated" not in said


def test_without_ray_nothing_died():
    assert what_died() == ""
