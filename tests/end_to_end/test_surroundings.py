"""A run where the environment is unkind: a proxy that does not answer, and a TMPDIR too long for sockets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.forked_driver import ForkedDriver
from tests.support.receivers import free_port

QUICKSTART = "configs/quickstart.yaml"
SMALL = [
    "supervised.steps=2", "supervised.decay_steps=null", "supervised.warmup_steps=0", "train.decay_steps=null",
    "train.steps=2", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=2",
]  # fmt: skip
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
FOLDERS = [Path(folder) for folder in ("/tmp", "/var/tmp", "/dev/shm")]


def started_as_a_user_does(arguments, environment, output):
    command = [sys.executable, "-m", "pipeline.commands.main", *arguments]
    with output.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)


def forked(arguments, environment, output):
    return ForkedDriver(output.with_suffix(".pid"), output, arguments, environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transport", "start"),
    [("shared_memory", forked), pytest.param("distributed", started_as_a_user_does, marks=pytest.mark.proof)],
)
def test_a_run_starts_samples_and_sends_weights_past_a_dead_proxy_and_a_long_tmpdir(tmp_path, transport, start):
    long = tmp_path / ("t" * max(1, 98 - len(str(tmp_path)) - 1))
    long.mkdir()
    dead = f"http://127.0.0.1:{free_port()}"
    environment = {k: v for k, v in os.environ.items() if k.lower() != "no_proxy"}
    environment |= dict.fromkeys((*PROXIES, *map(str.upper, PROXIES)), dead)
    environment["TMPDIR"] = str(long)
    arguments = ["train", QUICKSTART, *SMALL, f"weights.transport={transport}", f"run.directory={tmp_path / 'run'}"]
    started = start(arguments, environment, tmp_path / "output")
    try:
        code = started.wait(200)
    finally:
        started.kill()
    output = (tmp_path / "output").read_text()
    assert code == 0, output
    assert "step 2/2  reward" in output
    assert len(str(long)) >= 98
    # torch.compile's cache is kept for the next run, and goes where the user's TMPDIR is
    assert {path.name for path in long.iterdir()} <= {f"torchinductor_{os.getuid()}"}
    assert [left for folder in FOLDERS for left in folder.glob(f"sameroute-{started.pid}-*")] == []
