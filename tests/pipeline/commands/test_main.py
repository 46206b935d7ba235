"""The parser: what it imports, and where it takes overrides."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipeline.commands.main import COMMANDS, main

HEAVY = {"torch", "ray", "transformers", "numpy", "sglang", "megatron", "pydantic", "matplotlib", "rich"}
PROBE = """
import sys
from pipeline.commands.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print("code", end.code)
print("imported", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--help"], 0), *([[name, "--help"], 0] for name in COMMANDS), (["train"], 2), (["plan", "x", "--gpu", "y"], 2)],
)
def test_nothing_heavy_is_imported_before_the_arguments_are_read(words, code):
    done = subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert f"code {code}" in lines
    assert not HEAVY & set(lines[-1].split())


def test_overrides_may_stand_behind_options(capsys):
    assert main(["train", "nowhere.yaml", "--resume", "train.steps=1"]) == 2
    assert "there is no config file nowhere.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["report", "run", "train.steps=1"], ["train", "nowhere.yaml", "--resum=1"]])
def test_words_that_no_command_takes_are_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage:")


def test_an_unknown_objective_is_refused_by_name(capsys):
    assert main(["objectives", "gspoo"]) == 2
    assert "gspoo" in capsys.readouterr().err
