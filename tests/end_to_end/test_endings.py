"""`sameroute train` when something dies, when it is asked to end, and when it cannot start.

What a killed trainer rank is to a loop is the last test of `test_run.py`, what a run makes of it
`tests/pipeline/loop/test_restarts.py`. A signal to a run is in `test_resume.py`, one before the first step in
`tests/pipeline/loop/test_stop.py`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from types import SimpleNamespace

import psutil
import pytest

from pipeline.commands.main import main
from pipeline.config import load_config
from pipeline.dumps.groups import DumpError
from pipeline.loop.compare import DisagreementError
from pipeline.loop.run import _replay, train
from tests.support.command import QUICKSTART, SMALL
from tests.support.processes import command_line
from tests.support.receivers import free_port, scrape
from tests.support.sockets import environment_has


def test_a_dump_that_the_run_would_delete_is_refused_before_it_does(tmp_path):
    dumps = tmp_path / "dumps"
    dumps.mkdir()
    (tmp_path / "config.yaml").touch()
    with pytest.raises(DumpError, match=r"dumps lies in run\.directory=.*; set run\.directory to another path"):
        train(load_config(QUICKSTART, [f"run.directory={tmp_path}", "run.overwrite=true"]), dumps)
    assert dumps.is_dir()


def test_a_replay_from_other_weights_says_so():
    def step(number, dumped):
        raise DisagreementError("the log-probs differ")

    loop, dumped = SimpleNamespace(config=None, shape=None, step=step), SimpleNamespace(steps=[7], read=lambda *_: None)
    with pytest.raises(DisagreementError, match=r"log-probs differ\. Or these are not the weights that sampled step 7"):
        _replay(loop, dumped, 7)


@pytest.mark.proof
def test_a_killed_server_is_started_again_and_the_one_too_many_ends_the_run_with_its_log_and_no_orphan(command):
    port = free_port()
    settings = ["supervised.steps=0", "train.steps=9999", f"observe.prometheus_port={port}"]
    run = command(*SMALL, *settings, "server.max_restarts=1")
    run.wait_for("step    2/9999")
    served = scrape(port)
    assert served["sameroute_steps_total"][0][1] >= 1
    assert served["sameroute_routing_replayed_fraction"] == [({}, 1.0)]
    kill(run, "sglang::scheduler")
    run.wait_for("is started again")
    done = max(int(number) for number in re.findall(r"step +(\d+)/9999", run.text()))
    run.wait_for(f"step {done + 2:>4}/9999")
    assert [rows(run)[-1][f"servers/{count}"] for count in ("serving", "lost", "restarted")] == [1, 1, 1]
    kill(run, "sglang::scheduler")
    assert run.end() == 1
    assert "server.max_restarts=1 in 3600 s are used up" in run.text()
    assert "sglang.log" in run.text()
    assert "Traceback" not in run.text()
    assert run.orphans() == []


@pytest.mark.proof
def test_a_run_whose_trainer_is_killed_begins_again_from_its_checkpoint_so_often_and_no_oftener(command):
    settings = ["supervised.steps=0", "train.steps=9999", "checkpoint.every_steps=1", "run.max_restarts=1"]
    run = command(*SMALL, *settings, "run.overwrite=false")
    run.wait_for("step    2/9999")
    run.wait_for("checkpoints/step_1")  # else there is none to begin from
    kill(run, "ray::TrainerRank")
    run.wait_for("restart 1 of 1 within 60 minutes, from ")
    done = len(rows(run))
    run.wait_for(f"step {done + 2:>4}/9999")
    kill(run, "ray::TrainerRank")
    assert run.end() == 1
    assert "the run was begun again 1 times within 60 minutes" in run.text()
    assert run.text().count("trainer rank 0 died") >= 2
    assert [row["step"] for row in rows(run)] == list(range(1, len(rows(run)) + 1))  # none twice, none left out
    assert {row["run/restarts"] for row in rows(run)} == {0.0, 1.0}
    assert "Traceback" not in run.text()
    assert run.orphans() == []


def rows(run) -> list[dict]:
    return [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]


def kill(run, name: str) -> None:
    victims = [p.pid for p in environment_has(run.mark.encode()) if name in command_line(p)]
    assert victims
    for pid in victims:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.proof
def test_a_termination_request_ends_the_run_with_no_orphan(command):
    run = command(*SMALL, "supervised.steps=100000")
    run.wait_for("supervised")
    run.process.terminate()
    assert run.end() == 130
    assert "interrupted" in run.text()
    assert run.orphans() == []


def test_what_cannot_start_says_so_at_once_and_costs_no_earlier_run(command, tmp_path, capsys):
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "config.yaml").write_text("of an earlier run")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        cases = [
            (["train.stepz=1"], "train.stepz: there is no such key"),
            ([f"server.port={port}"], "server.port: cannot listen on 127.0.0.1"),
            (["server.port=29001", "server.replicas=2"], "2 servers on one machine cannot all listen on port 29001"),
            (["server.port=29001", "observe.prometheus_port=29001"], "observe.prometheus_port are both 29001"),
            (["cluster.address=127.0.0.1:1"], "no Ray cluster answers at cluster.address=127.0.0.1:1: Connection ref"),
            (["cluster.address=head.invalid:6379"], "no Ray cluster answers at cluster.address=head.invalid:6379"),
            (["cluster.address=ray://127.0.0.1:10001"], "cluster.address reads HOST:PORT"),
            ([f"observe.prometheus_port={port}"], "observe.prometheus_port: cannot listen on"),
            (["model.tiny=null", "model.path=/nowhere"], "/nowhere is no Hugging Face model directory"),
            (["parallel={ranks: 3, tensor: 2, sequence: true}"], "set parallel.ranks to a multiple of 2"),
            (["rewards=none.such"], "none.such"),
            (["data.task=null", "data.path=/nowhere.jsonl"], "there is no data file /nowhere.jsonl"),
            (["--from-dump", "/nowhere"], "there is no dump /nowhere"),
        ]
        before = psutil.Process().children(recursive=True)
        for overrides, message in cases:
            assert main(["train", QUICKSTART, f"run.directory={earlier}", *overrides]) == 2
            assert message in capsys.readouterr().err
        assert set(psutil.Process().children(recursive=True)) <= set(before)  # others of this session may end meanwhile
        run = command(f"run.directory={earlier}", f"server.port={port}")
        assert run.end() == 2
        assert "cannot listen on 127.0.0.1" in run.text()
        assert "Traceback" not in run.text()
        assert run.orphans() == []

    assert (earlier / "config.yaml").read_text() == "of an earlier run"
