"""What a person writes is read without the engines: a refused config does not wait for torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pipeline.objectives

ENGINES = ("torch", "transformers", "ray", "sglang", "megatron")


@pytest.mark.parametrize(
    "module",
    [
        "pipeline.objectives",
        "pipeline.objectives.composition",
        "pipeline.objectives.config",
        "pipeline.objectives.describe",
        "pipeline.objectives.presets",
        "pipeline.config",
    ],
)
def test_importing_it_imports_no_engine(module: str) -> None:
    code = f"import sys, {module}; print(sorted(set({ENGINES}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_of_the_package_is_there_and_no_other() -> None:
    for name in pipeline.objectives.__all__:
        assert getattr(pipeline.objectives, name).__name__ == name if name != "PRESETS" else True
    with pytest.raises(AttributeError, match="has no attribute 'resolv'"):
        _ = pipeline.objectives.resolv  # pyright: ignore[reportAttributeAccessIssue]
