"""Servers join a run and leave it while it goes on, and it trains on every prompt all the same."""

from __future__ import annotations

import os
import re
import signal
import time

import numpy as np
import pytest

from pipeline.engine.joining.server_requests import read_now, write_keys
from pipeline.engine.keys import ServerKeys
from tests.end_to_end.test_asynchronous import GROUPS, RUN, rows_of, trained
from tests.support.forked_driver import ForkedDriver


class Servers:
    """`sameroute servers RUN ...`."""

    def __init__(self, run, *arguments):
        self.output = run.output.with_name(f"servers_{time.monotonic_ns()}.txt")
        environment = os.environ | {"SAMEROUTE_MARK": run.mark}
        words = ["servers", str(run.run), *arguments]
        self.process = ForkedDriver(self.output.with_suffix(".pid"), self.output, words, environment)

    def text(self):
        return self.output.read_text()

    def wait_for(self, words, timeout_s=120):
        deadline = time.monotonic() + timeout_s
        while words not in self.text():
            assert time.monotonic() < deadline, self.text()
            assert self.process.poll() is None or words in self.text(), self.text()
            time.sleep(0.1)


def steps_more(run, count):
    done = len(rows_of(run.run))
    deadline = time.monotonic() + 120
    while len(rows_of(run.run)) < done + count:
        assert run.process.poll() is None, run.text()
        assert time.monotonic() < deadline, run.text()
        time.sleep(0.1)


@pytest.mark.proof
def test_a_started_server_joins_the_runs_own_leaves_comes_back_and_no_prompt_is_lost(command, tmp_path):
    run = command(*RUN, "rollout.max_staleness=2", "train.steps=999", "checkpoint.every_steps=1000")
    run.wait_for("step   2/999")
    started = Servers(run, "--start")
    started.wait_for(" is up; ")
    url = re.search(r"(http://\S+) is up", started.text())[1]
    started.wait_for("has joined as server 1")
    assert [row["state"] for row in read_now(run.run)] == ["serving", "serving"]
    own = read_now(run.run)[0]["url"]
    again = Servers(run, "--add", url)
    assert again.process.wait(60) == 1
    assert "is a server of the run already" in again.text()

    steps_more(run, 1)
    left = Servers(run, "--remove", own)
    assert left.process.wait(60) == 0, left.text()
    assert f"{own} has left" in left.text()
    steps_more(run, 2)
    assert rows_of(run.run)[-1]["servers/serving"] == 1
    os.kill(started.process.pid, signal.SIGINT)
    started.wait_for("is the last server that takes requests, and cannot leave")
    back = Servers(run, "--add", own)
    assert back.process.wait(60) == 0, back.text()
    deadline = time.monotonic() + 120
    while [row["state"] for row in read_now(run.run)] != ["serving", "serving"]:
        assert time.monotonic() < deadline, read_now(run.run)
        time.sleep(0.1)

    write_keys(tmp_path / "wrong", ServerKeys("wrong", "wrong"))
    os.kill(started.process.pid, signal.SIGSTOP)  # so that its server outlives its leaving for a while
    gone = Servers(run, "--remove", url)
    assert gone.process.wait(60) == 0, gone.text()
    wrong = Servers(run, "--add", url, "--keys", str(tmp_path / "wrong"))
    assert wrong.process.wait(60) == 1
    assert "these keys do not open it" in wrong.text()
    os.kill(started.process.pid, signal.SIGCONT)
    assert started.process.wait(60) == 0
    steps_more(run, 2)

    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 75, run.text()
    rows = rows_of(run.run)
    assert max(row["rollout/lag_max"] for row in rows) <= 2
    assert min(row["staleness/scored_tokens"] for row in rows) > 0
    assert max(row["mismatch/abs_logprob"] for row in rows) < 1e-5, "all servers hold the trainer's weights"
    assert {key: rows[-1][f"servers/{key}"] for key in ("joined", "left", "lost")} == {
        "joined": 2,
        "left": 2,
        "lost": 0,
    }
    indices = np.concatenate(trained(run.run, len(rows)))
    assert len(indices) == len(set(indices)) == GROUPS * len(rows)
    assert indices.max() < GROUPS * (len(rows) + 3), "each admitted prompt was trained on, or is open at the end"
    assert run.orphans(60) == []
