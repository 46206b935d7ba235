"""A run where the environment is unkind: a proxy that does not answer, and a TMPDIR too long for sockets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.proofs import sampled
from tests.support.receivers import free_port

QUICKSTART = "configs/quickstart.yaml"
SMALL = [
    "supervised.steps=2", "supervised.decay_steps=null", "supervised.warmup_steps=0", "train.decay_steps=null",
    "train.steps=2", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=2",
]  # fmt: skip
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
FOLDERS = [Path(folder) for folder in ("/tmp", "/var/tmp", "/dev/shm")]


@pytest.mark.slow
@pytest.mark.parametrize("transport", sampled(["shared_memory", "distributed"], ["shared_memory"]))
def test_a_run_starts_samples_and_sends_weights_past_a_dead_proxy_and_a_long_tmpdir(tmp_path, transport):
    long = tmp_path / ("t" * max(1, 98 - len(str(tmp_path)) - 1))
    long.mkdir()
    dead = f"http://127.0.0.1:{free_port()}"
    environment = {k: v for k, v in os.environ.items() if k.lower() != "no_proxy"}
    environment |= dict.fromkeys((*PROXIES, *map(str.upper, PROXIES)), dead)
    environment["TMPDIR"] = str(long)
    arguments = [*SMALL, f"weights.transport={transport}", f"run.directory={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "pipeline.commands.main", "train", QUICKSTART, *arguments]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        output, _ = started.communicate(timeout=200)
    finally:
        started.kill()
    assert started.returncode == 0, output
    assert "step 2/2  reward" in output
    assert len(str(long)) >= 98
    # torch.compile's cache is kept for the next run, and goes where the user's TMPDIR is
    assert {path.name for path in long.iterdir()} <= {f"torchinductor_{os.getuid()}"}
    assert [left for folder in FOLDERS for left in folder.glob(f"sameroute-{started.pid}-*")] == []
