"""scripts/slurm/ on a real Slurm of two nodes, as root: `make test-slurm`. A quickstart with fewer steps."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
SHORT = ["supervised.steps=5", "supervised.decay_steps=null", "supervised.warmup_steps=0", "train.decay_steps=null",
         "rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", "checks.first_rollouts=0"]  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture
def slurm(cluster):
    """The cluster; a test that fails leaves no job that the next one would wait for."""
    yield cluster
    cluster.run("scancel", "--user=root")


class Job:
    """A submitted scripts/slurm/train.sbatch whose run directory, logs and output stand in a folder of its own."""

    def __init__(self, slurm: SlurmCluster, name: str, options: list[str], overrides: list[str], **variables: str):
        self.slurm, self.folder = slurm, slurm.folder / name
        self.folder.mkdir()
        self.run, self.output = self.folder / "run", self.folder / "job.out"
        environment = {
            "SAMEROUTE_LOGS": str(self.folder / "logs"),
            "SAMEROUTE_SCRATCH": str(slurm.folder / "scratch"),
            "SAMEROUTE_INTERFACE": "eth0",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        submit = ["sbatch", "--parsable", f"--output={self.output}", "--time=10", "--signal=B:USR1@60", *options]
        script = ["scripts/slurm/train.sbatch", "configs/quickstart.yaml", f"run.directory={self.run}"]
        self.number = int(slurm.run(*submit, *script, *SHORT, *overrides, env=environment | variables))

    def log(self, node: str, attempt: int = 0) -> Path:
        return self.folder / "logs" / str(self.number) / f"attempt_{attempt}" / f"train_{node}.log"

    def end(self, *states: str) -> dict[str, str]:
        return self.slurm.wait_for_state(self.number, *states)

    def steps(self) -> list[int]:
        return [json.loads(line)["step"] for line in (self.run / "metrics.jsonl").read_text().splitlines()]


def no_processes(slurm: SlurmCluster, within_s: float = 15) -> bool:
    deadline = time.monotonic() + within_s
    while (left := slurm.processes()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
    return True


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


@pytest.mark.timeout(900)
def test_a_thousand_hostile_programs_are_contained_and_graded_right_inside_a_job(slurm):
    """As a user without rights, and a tenth of them as root."""
    output = slurm.folder / "hostile.out"
    command = f"{sys.executable} -m tests.hostile --programs 1000"
    number = int(slurm.run("sbatch", "--parsable", f"--output={output}", f"--chdir={ROOT}", f"--wrap={command}"))
    ended = slurm.wait_for_state(number, "COMPLETED", "FAILED", timeout_s=840)
    text = output.read_text()
    assert ended["ExitCode"] == "0:0", text
    assert "user 65534: 1000 right and 1000 hostile programs" in text
    assert text.count("left behind: []") == 2
    assert no_processes(slurm)
