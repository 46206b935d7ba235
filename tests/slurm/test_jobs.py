"""scripts/slurm/ on a real Slurm of two nodes, as root: `make test-slurm`."""

from __future__ import annotations

import json

import pytest

from tests.slurm.job import Job, no_processes

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_a_job_whose_trainer_and_servers_take_turns_has_a_ray_of_its_own_and_leaves_no_process(slurm):
    turns = ["cluster.colocated=true", "train.steps=2"]
    job = Job(slurm, "turns", ["--nodelist=node1"], turns, SAMEROUTE_OWN_RAY="1")
    assert job.end("COMPLETED", "FAILED")["ExitCode"] == "0:0", slurm.logs()
    rows = [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]
    assert [row["turns/count"] for row in rows] == [2, 2] or rows[-1]["turns/count"] == 2
    assert no_processes(slurm)


def test_one_job_runs_to_its_end_beside_another_that_scancel_ends_without_a_process_left(slurm):
    cancelled = Job(slurm, "cancelled", ["--nodelist=node2"], ["train.steps=9999"])
    whole = Job(slurm, "whole", ["--nodelist=node1"], ["train.steps=4"])
    slurm.wait_for_text(cancelled.log("node2"), "step    1/9999")
    assert any("sglang" in line for line in slurm.processes())
    slurm.run("scancel", str(cancelled.number))
    assert cancelled.end("CANCELLED")["Restarts"] == "0"

    assert whole.end("COMPLETED", "FAILED")["ExitCode"] == "0:0", slurm.logs()
    assert whole.steps() == [1, 2, 3, 4]
    assert (whole.run / "hf" / "model.safetensors").is_file()
    assert no_processes(slurm)
    assert list((slurm.folder / "scratch").iterdir()) == []


def test_exit_codes_of_the_run_and_of_the_health_check_reach_the_job_record(slurm):
    wrong = Job(slurm, "wrong", ["--nodelist=node1"], ["train.stepz=4"])
    unwell = Job(slurm, "unwell", ["--nodelist=node2"], [], SAMEROUTE_MIN_SHM_GB="999999")
    assert unwell.end("FAILED", "COMPLETED")["ExitCode"] == "3:0"
    assert "unwell node2: less than 999999 GB are free in /dev/shm" in unwell.output.read_text()
    assert wrong.end("FAILED", "COMPLETED")["ExitCode"] == "2:0"
    assert "train.stepz: there is no such key" in wrong.output.read_text()
    completed = (slurm.folder / "jobs.txt").read_text()
    assert f"JobId={wrong.number} " in completed
    assert "ExitCode=2:0" in completed


def test_a_run_on_two_nodes_saves_on_usr1_is_queued_again_and_resumes_from_its_checkpoint(slurm):
    job = Job(slurm, "two", ["--nodes=2"], ["train.steps=8", "checkpoint.every_steps=100"], SAMEROUTE_ROLLOUT_NODES="1")
    slurm.wait_for_text(job.log("node1"), "step 2/8")
    facts = json.loads((job.run / "facts.json").read_text())
    assert [rank["host"] for rank in facts["trainer"]] == ["node1"]
    assert [n["host"] for n in facts["ray"]["nodes"] if n["resources"].get("rollout", 0) > 0] == ["node2"]
    slurm.run("scancel", "--signal=USR1", "--batch", str(job.number))
    slurm.wait_for_text(job.output, "ended with exit code 75")
    saved = job.steps()
    assert 2 <= len(saved) < 8
    ended = job.end("COMPLETED", "FAILED")
    assert (ended["Restarts"], ended["ExitCode"]) == ("1", "0:0"), slurm.logs()
    assert job.steps() == list(range(1, 9))  # none twice, none left out
    assert (job.run / "hf" / "model.safetensors").is_file()
    assert job.log("node1", attempt=1).is_file()
    assert no_processes(slurm)
