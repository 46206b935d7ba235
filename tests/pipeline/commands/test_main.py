"""The parser: what it imports, and where it takes overrides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from pipeline.commands.main import COMMANDS, main
from tests.support.runs import MadeRun

HEAVY = {"torch", "ray", "transformers", "numpy", "sglang", "megatron", "pydantic", "matplotlib", "rich"}
PROBE = """
import contextlib, io, json, sys
from pipeline.commands.main import main
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def imported_by(commands):
    """(exit code, top-level modules) after each of the commands, which one process runs one after the other: what none
    has imported is imported by none alone."""
    probe = [sys.executable, "-c", PROBE, json.dumps(commands)]
    done = subprocess.run(probe, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(commands)
    return found


def test_nothing_heavy_is_imported_before_the_arguments_are_read():
    commands = {
        ("--help",): 0,
        ("--version",): 0,
        **{(name, "--help"): 0 for name in COMMANDS},
        ("train",): 2,
        ("plan", "x", "--gpu", "y"): 2,
    }
    for (words, expected), (code, imported) in zip(commands.items(), imported_by(list(commands)), strict=True):
        assert (code, HEAVY & set(imported)) == (expected, set()), words


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


ENGINES = {"torch", "ray", "transformers", "sglang", "megatron", "tensorboard", "wandb", "mlflow", "matplotlib"}
QUICKSTART = "configs/quickstart.yaml"
REFUSED = {"numpy", "rich", "plotly"}


@pytest.mark.parametrize(
    ("needless", "commands"),
    [
        (
            {"numpy", "rich"},
            {("objectives",): 0, ("objectives", "gspo"): 0, ("objectives", "gspoo"): 2},
        ),
        (
            REFUSED,
            {
                ("train", "nowhere.yaml"): 2,
                ("train", QUICKSTART, "train.lrr=1"): 2,
                ("train", QUICKSTART, "train.lr=fast"): 2,
                ("train", QUICKSTART, "objective.preset=gspoo"): 2,
                ("train", QUICKSTART, "objective=grpo"): 2,
                ("train", QUICKSTART, "model.tiny=null", "model.path=nowhere"): 2,
                ("diagnose", QUICKSTART, "train.lrr=1"): 2,
                ("launch", "slurm", QUICKSTART, "train.lrr=1"): 2,
            },
        ),
        (
            {"rich", "plotly"},
            {
                ("train", QUICKSTART, "data.task=null", "data.path=nowhere.jsonl"): 2,
                ("train", QUICKSTART, "--from-dump", "nowhere"): 2,
            },
        ),
        ({"plotly"}, {("plan", "configs/qwen3-30b-a3b/2-nodes.yaml"): 0, ("plan", QUICKSTART): 0}),
        (set(), {("report", "nowhere"): 2}),
    ],
)
def test_what_needs_no_engine_imports_none(needless, commands):
    """Of what a command imports, not of its seconds, which depend on the machine."""
    for (words, expected), (code, imported) in zip(commands.items(), imported_by(list(commands)), strict=True):
        assert (code, (ENGINES | needless) & set(imported)) == (expected, set()), words


def test_a_whole_report_imports_no_engine(tmp_path):
    run = MadeRun(tmp_path)
    run.write(1)
    program = "import sys\nfrom pipeline.commands.main import main\nassert main(['report', sys.argv[1]]) == 0\n"
    program += "print('imported', *sorted({name.partition('.')[0] for name in sys.modules}))"
    command = [sys.executable, "-c", program, str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not ENGINES & set(done.stdout.splitlines()[-1].split())


def test_the_version_is_that_of_the_metadata_with_the_engines(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    for package in ("sameroute", "megatron-core", "sglang", "torch", "ray", "transformers"):
        assert said[package] == version(package)


READERS = [
    (["--help"], 0, ""),
    (["--version"], 0, ""),
    (["objectives"], 0, ""),
    (["objectives"], 0, "1"),
    (["objectives", "gspoo"], 2, ""),
    (["plan", "configs/qwen3-30b-a3b/2-nodes.yaml"], 0, "1"),
    (["plan", "configs/kimi-k2/gspo.yaml", "--gpu", "h100"], 1, ""),
    (["launch", "slurm", "configs/qwen3-30b-a3b/2-nodes.yaml", "--dry-run"], 0, ""),
    (["trian"], 2, ""),
]


@pytest.mark.parametrize(
    ("words", "code", "unbuffered", "both_streams"),
    [
        *((*case, False) for case in READERS),
        # one without an error, and those that say theirs to the stream that is gone
        *(pytest.param(*x, True, marks=() if x[1] or x[0] == ["--help"] else pytest.mark.proof) for x in READERS),
    ],
)
def test_a_reader_that_has_gone_changes_neither_the_exit_code_nor_the_words(words, code, unbuffered, both_streams):
    """As in `sameroute objectives | head`, or with 2>&1 before the pipe."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "pipeline.commands.main", *words]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    try:
        done = subprocess.run(
            command, stdout=write, stderr=write if both_streams else subprocess.PIPE, env=environment, text=True
        )
    finally:
        os.close(write)
    assert done.returncode == code
    assert both_streams or ("Traceback" not in done.stderr and "Broken" not in done.stderr)
