"""Ray's workers import this package, whatever lies in the working directory or on PYTHONPATH."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sameroute
sameroute.own_packages_first()
import ray
from pipeline.cluster.ray_session import ray_session
from pipeline.config.run import ClusterConfig

@ray.remote
def where():
    import megatron_ext
    import pipeline.types
    return pipeline.__file__, megatron_ext.__file__

with ray_session(ClusterConfig(object_store_gb=0.1), cpus=1):
    print(*ray.get(where.remote()))
"""


@pytest.mark.slow
def test_workers_import_the_packages_that_the_driver_has(tmp_path):
    for name in ("pipeline", "megatron_ext"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('somebody else')")
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-P", "program.py"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    own = [str(Path(name, "__init__.py").resolve()) for name in ("pipeline", "megatron_ext")]
    assert done.stdout.split() == own
