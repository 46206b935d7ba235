"""Real engines that stand still: the run says who everybody waits for, and goes on when that one does."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import psutil
import pytest

from tests.support.command import SMALL
from tests.support.processes import command_line

STEP = re.compile(r"step +(\d+)/9999")


@pytest.mark.proof
def test_a_stopped_rank_and_a_stopped_scheduler_are_named_with_their_stacks_and_a_step_is_traced(command):
    settings = ["supervised.steps=0", "train.steps=9999", "debug.stall_s=2", "run.rollouts_shown=0"]
    profile = "debug.profile={steps: [1], ranks: [1], servers: [0]}"
    run = command(*SMALL, *settings, profile, "parallel={ranks: 2, expert: 2}")
    run.wait_for("step    2/9999")
    traces = run.run / "profiles" / "step_000001"
    assert (traces / "trainer_rank1.json.gz").stat().st_size > 1000
    assert not (traces / "trainer_rank0.json.gz").exists()

    ranks = {one["rank"]: one["pid"] for one in json.loads((run.run / "facts.json").read_text())["trainer"]}
    scheduler = next(
        p.pid for p in psutil.process_iter() if "sglang::scheduler" in command_line(p) and run.mark in _environment(p)
    )
    for number, (pid, who) in enumerate([(ranks[1], "trainer rank 1"), (scheduler, "server 0")], start=1):
        os.kill(pid, signal.SIGSTOP)
        try:
            run.wait_for(f"everybody waits for {who}, whose process {pid} was stopped (SIGSTOP)", 60)
            text = (run.run / "stalls" / f"stall_{number:03d}.txt").read_text()
        finally:
            os.kill(pid, signal.SIGCONT)
        assert all(part in text for part in ("== trainer rank 0", "== server 0", "event_loop", "== controller"))
        done = int(STEP.findall(run.text())[-1])
        run.wait_for(f"step {done + 2:>4}/9999", 60)
    deadline = time.monotonic() + 20
    while not list((traces / "server_0").glob("*.gz")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    rows = [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]
    assert 0 < rows[-1]["devices/idle_hours"] < rows[-1]["devices/hours"]
    record = json.loads((run.run / "records.jsonl").read_text().splitlines()[-1])
    assert all(len(both["own"]) == len(both["waited"]) == 2 for both in record["ranks"].values())
    assert record["ranks"]["update"]["own"][0] > 0
    assert record["servers"]["0"]["tokens"] > 0


def _environment(process: psutil.Process) -> str:
    try:
        return process.environ().get("SAMEROUTE_MARK", "")
    except psutil.Error:
        return ""
