"""`sameroute diagnose --nan` passes its dump and its weights on, and its exit code says what was found."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.commands.main import main


@pytest.mark.parametrize(("found", "code"), [(True, 3), (False, 0)])
def test_the_exit_code_says_whether_a_number_is_not_finite(monkeypatch, found, code):
    asked = []
    monkeypatch.setattr("pipeline.loop.check_engines.find_not_finite", lambda *given: asked.append(given[1:]) or found)
    options = ["--nan", "dumps/step_000041.safetensors", "--checkpoint", "checkpoints/step_40", "--out", "out"]
    assert main(["diagnose", "configs/quickstart.yaml", *options]) == code
    assert asked == [(Path("out"), Path("dumps/step_000041.safetensors"), Path("checkpoints/step_40"))]
