"""The command finds its own packages whatever lies on the path, and so do the processes that it starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SAMEROUTE = str(Path(sys.executable).with_name("sameroute"))
ASK = (
    "import sameroute, os, subprocess, sys; before = list(sys.path); sameroute.own_packages_first(); "
    "import pipeline, megatron_ext; print(pipeline.__file__, megatron_ext.__file__, sys.path == before); "
    "subprocess.run([sys.executable, '-P', '-c', 'import pipeline; print(pipeline.__file__)'], check=True)"
)


@pytest.fixture
def shadowed(tmp_path):
    """A folder with modules of the packages' names, as a file, a package, and a package without a file."""
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "pipeline.py").write_text("raise SystemExit('somebody else')")
    (tmp_path / "package" / "megatron_ext").mkdir(parents=True)
    (tmp_path / "package" / "megatron_ext" / "__init__.py").write_text("raise SystemExit('somebody else')")
    (tmp_path / "bare" / "pipeline").mkdir(parents=True)
    return tmp_path


def run(folder, *command):
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


@pytest.mark.parametrize("kind", ["file", "package", "bare"])
def test_another_module_of_a_packages_name_hides_nothing(shadowed, kind):
    for command in ((SAMEROUTE,), (sys.executable, "-P", "-m", "sameroute")):
        done = run(shadowed / kind, *command, "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("usage: sameroute")


@pytest.mark.parametrize("kind", ["file", "package", "bare"])
def test_children_find_them_too(shadowed, kind):
    done = run(shadowed / kind, sys.executable, "-c", ASK)
    assert done.returncode == 0, done.stderr
    own = str(Path("pipeline/__init__.py").resolve())
    assert done.stdout.split() == [own, str(Path("megatron_ext/__init__.py").resolve()), "False", own]


def test_a_path_on_which_nothing_hides_them_stays_as_it_is(tmp_path):
    done = run(tmp_path, sys.executable, "-c", ASK)
    assert done.stdout.split()[2] == "True", done.stderr
