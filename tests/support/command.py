"""`sameroute train` as a child process, as a user runs it, whose whole process tree can be found again."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

from tests.support.forked_driver import ForkedDriver

QUICKSTART = "configs/quickstart.yaml"
SMALL = ["supervised.steps=5", "supervised.decay_steps=null", "supervised.warmup_steps=0", "train.decay_steps=null",
         "rollout.prompts_per_step=8", "rollout.samples_per_prompt=4"]  # fmt: skip
DUMPED = ["train.steps=3", "parallel={ranks: 2, expert: 2}", "rewards=tests.support.verifiers:length"]
KEYS = {
    "step", "reward/mean", "mismatch/k3", "mismatch/abs_logprob", "routing/replayed_fraction", "routing/agreement",
    "loss/clip_fraction", "response/length_mean", "weights/version", "time/rollout_s", "time/train_s", "time/sync_s",
    "time/step_s",
}  # fmt: skip
"""Metrics that every step has."""

END_S = 60  # a run that cannot go on ends within this


def marked_processes(mark: str) -> list[str]:
    """Command lines of all processes whose environment carries the mark."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # gone between the listing and the reading, or a kernel thread
    return [f for f in found if f]


class Command:
    """`sameroute train` as a child process whose whole process tree can be found again."""

    def __init__(self, folder: Path, *overrides: str, config: str = QUICKSTART):
        """It, its server and its ranks come from the session's `preloaded` processes."""
        self.mark, self.output, self.run = f"mark-{uuid.uuid4().hex}", folder / "output.txt", folder / "run"
        self.process = ForkedDriver(
            folder / f"{self.mark}.pid",
            self.output,
            ["train", config, f"run.directory={self.run}", *overrides],
            os.environ | {"SAMEROUTE_MARK": self.mark},
        )

    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, words: str, timeout_s: float = 200) -> None:
        deadline = time.monotonic() + timeout_s
        while words not in self.text():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.2)

    def end(self, timeout_s: float = END_S) -> int:
        try:
            return self.process.wait(timeout_s)
        finally:
            self.process.kill()

    def stop(self) -> None:
        """Let nothing outlive a test, whatever it found."""
        if self.process.poll() is None:
            self.process.terminate()
            self.end()

    def own_orphans(self) -> list[str]:
        """But for Ray's, whose agents take a minute to end on a machine that does much else."""
        return [line for line in self.orphans(2) if not line.startswith("ray::")]

    def orphans(self, within_s: float = 10) -> list[str]:
        """What is left so many seconds after now; [] as soon as nothing is."""
        deadline = time.monotonic() + within_s
        while (left := marked_processes(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left
