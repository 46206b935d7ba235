"""Jobs of a real Slurm that lose a node, each in a cluster of its own."""

from __future__ import annotations

import json

import pytest

from tests.slurm.cluster import SlurmCluster
from tests.slurm.job import Job, no_processes

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_an_asynchronous_run_with_a_server_on_each_node_survives_the_loss_of_the_second():
    """Slurm itself sees the node go down while the run goes on with the server of the first."""
    with SlurmCluster("SlurmdTimeout=10") as slurm:
        ahead = ["rollout.max_staleness=1", "server.replicas=2", "server.probe_timeout_s=10"]
        job = Job(slurm, "lost", ["--nodes=2"], ["train.steps=100", *ahead])
        slurm.wait_for_text(job.log("node1"), "step   5/100")
        weights = (job.run / "logs" / "trainer_rank0.log").read_text()
        assert "http://10.77.0.11:" in weights
        assert "http://10.77.0.12:" in weights
        slurm.lose_second_node()
        slurm.wait_for_text(job.log("node1"), "the run goes on without a server")
        assert job.end("COMPLETED", "FAILED", "NODE_FAIL")["ExitCode"] == "0:0", slurm.logs()
        assert slurm.job(job.number)["Restarts"] == "0"
        assert "node2 down" in slurm.run("sinfo", "-h", "-N", "-o", "%N %T")
        rows = [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, 101))
        serving = [row["servers/serving"] for row in rows]
        assert serving[4] == 2
        assert 1 in serving[5:]  # until the other is up again, on the first node
        assert no_processes(slurm)


def test_a_job_that_loses_its_last_server_with_the_node_goes_back_into_the_queue():
    with SlurmCluster("SlurmdTimeout=10") as slurm:
        saved = ["train.steps=9999", "checkpoint.every_steps=2", "server.probe_timeout_s=10"]
        job = Job(slurm, "last", ["--nodes=2"], saved, SAMEROUTE_ROLLOUT_NODES="1")
        slurm.wait_for_text(job.log("node1"), "step    3/9999")
        slurm.lose_second_node()
        slurm.wait_for_text(job.output, "ended with exit code 1")
        assert "the run goes on without a server" in job.log("node1").read_text()
        assert slurm.wait_for_state(job.number, "PENDING")["Restarts"] == "1"
        assert "a node of the job is lost" in job.output.read_text()
        assert no_processes(slurm)
