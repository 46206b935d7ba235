"""The Dockerfile, as scripts/image_steps.py reads it. Its steps are run by `make test-image`."""

from __future__ import annotations

import re

import pytest

from scripts.image_steps import ROOT, included, needed, stages_of

DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_device_chooses_base_and_packages(device):
    names = [s.name for s in needed(stages_of(DOCKERFILE, {"DEVICE": device}))]
    assert names == [f"base-{device}", "environment", f"packages-{device}", "packages", "image"]


def test_the_default_is_the_image_with_gpus():
    assert "packages-gpu" in [s.name for s in needed(stages_of(DOCKERFILE, {}))]


def test_bases_and_what_is_installed_by_name_are_pinned():
    stages = stages_of(DOCKERFILE, {})
    names = {s.name for s in stages}
    outside = [s.base for s in stages if s.base not in names]
    assert len(outside) == 2
    assert all(re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", base) for base in outside)
    commands = [c for line in DOCKERFILE.replace("\\\n", " ").splitlines() for c in re.split(r"&&|;", line)]
    installs = [command for command in commands if "pip install" in command]
    assert len(installs) == 7
    assert all(re.search(r"==|--constraint|--no-deps|git\+.*@\$APEX_COMMIT", command) for command in installs)
    assert re.search(r"APEX_COMMIT=[0-9a-f]{40}\n", DOCKERFILE)


def test_the_image_runs_as_a_numbered_user_and_has_a_health_check():
    image = stages_of(DOCKERFILE, {})[-1].steps
    assert [value for name, value in image if name == "USER"] == ["10001:10001"]
    assert [name for name, _ in image].count("HEALTHCHECK") == 1


def test_the_locks_have_what_the_project_pins_and_the_gpu_image_adds_the_engines_kernels():
    pins = re.findall(r'"((?:sglang|torch|transformers|megatron-core)==[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert len(pins) == 4
    for name in ("requirements.lock", "requirements-gpu.lock"):
        assert set(pins) <= set((ROOT / name).read_text().splitlines())
    gpu = (ROOT / "requirements-gpu.lock").read_text()
    for package in ("transformer-engine-torch", "transformer-engine-cu13", "sglang-kernel", "sgl-deep-ep", "ray"):
        assert re.search(rf"^{package}==", gpu, re.MULTILINE)
    shared = {line.split("==")[0]: line for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert all(line == shared.get(line.split("==")[0], line) for line in gpu.splitlines())


def test_what_the_image_needs_is_sent_to_docker_and_nothing_else():
    for path in (
        "pipeline/commands/main.py",
        "configs/quickstart.yaml",
        "requirements.lock",
        "sameroute.py",
        "scripts/slurm/common.sh",
    ):
        assert included(path)
    for path in (
        ".git/HEAD",
        ".venv/bin/python",
        "runs/a",
        "tests/conftest.py",
        "pipeline/__pycache__/a.pyc",
        "docs/a.md",
    ):
        assert not included(path)
