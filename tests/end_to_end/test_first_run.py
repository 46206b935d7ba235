"""The commands of docs/first-run.md for questions and a verifier of one's own, as they are written there."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.preloaded import VARIABLES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "first-run.md").read_text(encoding="utf-8")


def block_after(words: str) -> str:
    """The indented block behind a line of the page, without its indent and its continuation marks."""
    lines = PAGE[PAGE.index(words) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("    "))
    end = next((i for i, line in enumerate(lines) if i > start and line.strip() and line[:4] != "    "), len(lines))
    return "\n".join(line[4:] for line in lines[start:end]).strip() + "\n"


@pytest.fixture
def folder(tmp_path):
    """A clone as the page sees it, with what the page says to write; and, by bad luck, a pipeline.py of one's own."""
    for name in ("configs", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "questions.jsonl").write_text(block_after("A file with a line a question"), encoding="utf-8")
    (tmp_path / "grading.py").write_text(block_after("A function in a file beside the YAML file"), encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(block_after("and `mine.yaml`, which names it"), encoding="utf-8")
    (tmp_path / "pipeline.py").write_text("raise SystemExit('somebody else')")
    (tmp_path / "megatron_ext.py").write_text("raise SystemExit('somebody else')")
    return tmp_path


def run(folder: Path, command: str, *, forked: bool) -> str:
    """forked: engines come from the session's preloaded processes; else all of it is as a user has it who, besides, has
    his folder on PYTHONPATH."""
    assert command.startswith(".venv/bin/sameroute train ")
    environment = dict(os.environ)
    if not forked:
        environment = {k: v for k, v in environment.items() if k not in VARIABLES} | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        command, shell=True, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        env=environment,
    )  # fmt: skip
    logs = "".join(log.read_text(errors="replace")[-3000:] for log in folder.glob("runs/*/logs/*.log"))
    assert done.returncode == 0, done.stdout + logs
    return done.stdout


@pytest.mark.proof
def test_questions_of_ones_own_are_trained_on_by_the_command_as_written(folder):
    said = run(folder, block_after("with a tokenizer of bytes it reads any text:"), forked=True)
    assert len(re.findall(r"^step +[1-5]/5 ", said, re.MULTILINE)) == 5
    assert "How many legs has a cat?" in "".join(f.read_text() for f in folder.glob("runs/mine/rollouts/*.txt"))


@pytest.mark.proof
def test_a_verifier_beside_the_yaml_file_is_found_by_the_command_as_written(folder):
    said = run(folder, block_after("Then\n\n    .venv"), forked=False)
    rewards = [float(reward) for reward in re.findall(r"^step +\d/5 +reward (\S+)", said, re.MULTILINE)]
    assert len(rewards) == 5
    assert all(0 <= reward <= 1 for reward in rewards)
    assert f"directory: {folder.resolve()}\n" in (folder / "runs" / "verified" / "config.yaml").read_text()
