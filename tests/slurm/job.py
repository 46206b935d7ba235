"""A job of scripts/slurm/train.sbatch, a quickstart with fewer steps, in a cluster of the tests."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tests.slurm.cluster import SlurmCluster

ROOT = Path(__file__).parents[2]
SHORT = ["supervised.steps=5", "supervised.decay_steps=null", "supervised.warmup_steps=0", "train.decay_steps=null",
         "rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", "checks.first_rollouts=0"]  # fmt: skip


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


def no_processes(slurm: SlurmCluster, within_s: float = 30) -> bool:
    deadline = time.monotonic() + within_s
    while (left := slurm.processes()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
    return True
