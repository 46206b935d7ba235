"""Where no sandbox can be had, code is refused before anything starts, with what to install or to write instead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.commands.main import main
from pipeline.rewards import VerifierError
from pipeline.rewards.sandbox import Program, open_sandbox
from tests.support.programs import LIMITS
from tests.support.unprivileged import as_nobody

REFUSED = "the verifier 'code' runs programs in a sandbox, and "
CODE = "rewards={kind: code}"


def test_without_user_namespaces_code_is_refused_for_real():
    script = """
from pipeline.config.rewards import CodeReward, GradingConfig
from pipeline.rewards import VerifierError, check_rewards
try:
    check_rewards([CodeReward()], GradingConfig())
except VerifierError as error:
    print(error.exit_code, error)
"""
    words = as_nobody([sys.executable, "-c", script], namespaces=False)
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert said.startswith(
        f"2 {REFUSED}its sandbox (bubblewrap) does not work: bubblewrap ended with exited 1: bwrap: "
    )
    assert "allow user namespaces (sysctl user.max_user_namespaces above 0" in said
    assert said.endswith("or give sandbox: {mode: remote, url: ...} of a SandboxFusion service\n")


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ({}, "bubblewrap is not installed: apt-get install bubblewrap, or give sandbox: {mode: remote, url: ...}"),
        ({"bwrap": "#!/bin/sh\n"}, "prlimit is not installed: apt-get install util-linux"),
        (dict.fromkeys(("bwrap", "prlimit", "setpriv"), "#!/bin/sh\necho bubblewrap 0.6.1\n"), "0.6 is too old"),
    ],
)
def test_what_is_missing_is_named(tmp_path, monkeypatch, there, words):
    for name, text in there.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VerifierError) as caught:
        open_sandbox(LIMITS, name="code")
    assert str(caught.value).startswith(REFUSED)
    assert words in str(caught.value)


def test_the_command_says_it_with_2_and_nothing_is_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    run = tmp_path / "run"
    assert main(["train", "configs/quickstart.yaml", f"run.directory={run}", CODE]) == 2
    assert f"{REFUSED}bubblewrap is not installed: apt-get install bubblewrap" in capsys.readouterr().err
    assert not run.exists()


def test_a_python_that_does_not_run_is_named(tmp_path):
    with pytest.raises(VerifierError, match=rf"does not work: {tmp_path}/python is no Python that runs"):
        open_sandbox(LIMITS | {"python": str(tmp_path / "python")}, name="code")


def test_another_python_runs_programs_with_what_it_has(tmp_path):
    sandbox = open_sandbox(LIMITS | {"python": "/usr/bin/python3"}, name="code")
    outcome = sandbox.run(Program("import sys\nprint(sys.executable)"), 5)
    assert Path(outcome.stdout.strip()).name.startswith("python3")
    assert outcome.stdout.startswith("/usr/bin/")


def test_unsafe_is_asked_for_by_that_word_and_sees_this_machine(tmp_path, monkeypatch):
    (tmp_path / "there").write_text("seen")
    sandbox = open_sandbox(LIMITS | {"mode": "unsafe"}, name="code")
    assert sandbox.run(Program(f"print(open({str(tmp_path / 'there')!r}).read())"), 5).stdout == "seen\n"
    assert sandbox.run(Program("while True: pass"), 1.0).end in ("timeout", "signal")
    monkeypatch.setenv("SECRET_OF_THE_RUN", "1")
    assert "SECRET" not in sandbox.run(Program("import os\nprint(os.environ)"), 5).stdout
