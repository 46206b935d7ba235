"""Step (b): the trainer on one GPU without Transformer Engine, beside the same trainer on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.gpu.checks.training import FAMILIES

pytestmark = pytest.mark.gpu
SMALL = [name for name in FAMILIES if name != "large"]

# Log-prob (nats) before any step, and log-prob, loss and gradient norm (relative) after four. bfloat16 rounds
# activations by 2^-9, on each device at other places.
BOUNDS = {"float32": (1e-4, 5e-3, 1e-3), "bfloat16": (0.25, 0.5, 0.05)}


def run(directory: Path, family: str, dtype: str, *, gpu: bool, make: bool = False, layers: str = "torch") -> dict:
    """What the checks say, in a process of their own. layers: "torch" or "transformer_engine", on the GPU."""
    out = directory / f"{dtype}-{'gpu' if gpu else 'cpu'}.json"
    words = [str(directory), family, dtype, str(out), *["--make"] * make, *["--torch-layers"] * (layers == "torch")]
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.checks.training", *words],
        env=os.environ | hidden | {"OMP_NUM_THREADS": "8"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


def beside_the_cpu(directory: Path, family: str, dtype: str, layers: str) -> None:
    on_cpu = run(directory, family, dtype, gpu=False, make=True)
    # the file is what both start from: the CPU reads what it wrote, too
    on_gpu = run(directory, family, dtype, gpu=True, layers=layers)
    assert on_gpu["layers"] == layers
    early, late, relative = BOUNDS[dtype]
    far = {key: float(np.abs(np.subtract(on_gpu[key], on_cpu[key])).max()) for key in ("before", "after")}
    far |= {key: float(np.abs(np.divide(on_gpu[key], on_cpu[key]) - 1).max()) for key in ("losses", "norms")}
    print(family, dtype, layers, far)
    assert far["before"] < early
    assert far["after"] < late
    assert max(far["losses"], far["norms"]) < relative
    replayed = [counts[0] for counts in on_gpu["routing"]]
    assert replayed == [counts[0] for counts in on_cpu["routing"]]
    assert all(replayed)
    assert on_gpu["losses"][-1] < on_gpu["losses"][0]


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_trainer_is_the_cpus(family, dtype, tmp_path):
    beside_the_cpu(tmp_path, family, dtype, "torch")


def test_a_step_takes_the_memory_of_the_plan(tmp_path):
    said = run(tmp_path, "large", "bfloat16", gpu=True, make=True)
    print(said)
    assert said["held"] == pytest.approx(said["planned_held"], rel=0.05)
    assert said["peak"] < said["planned_all"]
