"""The parser: what it imports, and where it takes overrides."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from pipeline.commands.main import COMMANDS, main
from tests.support.runs import MadeRun

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
    [
        (["--help"], 0),
        (["--version"], 0),
        *([[name, "--help"], 0] for name in COMMANDS),
        (["train"], 2),
        (["plan", "x", "--gpu", "y"], 2),
    ],
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


ENGINES = {"torch", "ray", "transformers", "sglang", "megatron", "tensorboard", "wandb", "mlflow", "matplotlib"}
QUICKSTART = "configs/quickstart.yaml"
REFUSED = {"numpy", "rich", "plotly"}


@pytest.mark.parametrize(
    ("words", "code", "needless"),
    [
        (["objectives"], 0, {"numpy", "rich"}),
        (["objectives", "gspo"], 0, {"numpy", "rich"}),
        (["objectives", "gspoo"], 2, {"numpy", "rich"}),
        (["plan", "configs/qwen3-30b-a3b/2-nodes.yaml"], 0, {"plotly"}),
        (["plan", QUICKSTART], 0, {"plotly"}),
        (["report", "nowhere"], 2, set()),
        (["train", "nowhere.yaml"], 2, REFUSED),
        (["train", QUICKSTART, "train.lrr=1"], 2, REFUSED),
        (["train", QUICKSTART, "train.lr=fast"], 2, REFUSED),
        (["train", QUICKSTART, "objective.preset=gspoo"], 2, REFUSED),
        (["train", QUICKSTART, "objective=grpo"], 2, REFUSED),
        (["train", QUICKSTART, "model.tiny=null", "model.path=nowhere"], 2, REFUSED),
        (["train", QUICKSTART, "data.task=null", "data.path=nowhere.jsonl"], 2, {"rich", "plotly"}),
        (["train", QUICKSTART, "--from-dump", "nowhere"], 2, {"rich", "plotly"}),
        (["diagnose", QUICKSTART, "train.lrr=1"], 2, REFUSED),
        (["launch", "slurm", QUICKSTART, "train.lrr=1"], 2, REFUSED),
    ],
)
def test_what_needs_no_engine_imports_none(words, code, needless):
    """Of what a command imports, not of its seconds, which depend on the machine."""
    program = f"import sys\nfrom pipeline.commands.main import main\ncode = main({words!r})\n"
    program += "print('\\nimported', code, *sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    _, ended, *imported = done.stdout.splitlines()[-1].split()
    assert int(ended) == code
    assert not (ENGINES | needless) & set(imported)


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


@pytest.mark.parametrize("both_streams", [False, True])
@pytest.mark.parametrize(
    ("words", "code", "unbuffered"),
    [
        (["--help"], 0, ""),
        (["--version"], 0, ""),
        (["objectives"], 0, ""),
        (["objectives"], 0, "1"),
        (["objectives", "gspoo"], 2, ""),
        (["plan", "configs/qwen3-30b-a3b/2-nodes.yaml"], 0, "1"),
        (["plan", "configs/kimi-k2/gspo.yaml", "--gpu", "h100"], 1, ""),
        (["launch", "slurm", "configs/qwen3-30b-a3b/2-nodes.yaml", "--dry-run"], 0, ""),
        (["trian"], 2, ""),
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
