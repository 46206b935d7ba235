"""A verifier that cannot be loaded is named before anything starts."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from pipeline import waiting
from pipeline.commands.main import main
from pipeline.config.rewards import FunctionReward, GradingConfig
from pipeline.rewards import VerifierError, check_rewards
from pipeline.rewards.grader import Grader
from pipeline.rewards.protocol import Limits
from tests.support.hostile import question

CASES = {
    "syntax": ("def verify(:\n", r"SyntaxError: .*broken_syntax\.py, line 1"),
    "name": ("x = 1\ny = nothing\n", r"NameError: name 'nothing' is not defined \(broken_name\.py, line 2\)"),
    "inner": ("import no_such_package\n", "ModuleNotFoundError: No module named 'no_such_package'"),
    "function": ("def check(*_):\n    return 1.0\n", r"broken_function\.py has no function 'verify'"),
    "raises": ("raise RuntimeError('not\\ntoday')\n", r"RuntimeError: not today \(broken_raises\.py, line 1\)"),
    "exits": ("import sys\nsys.exit(0)\n", r"its module calls sys\.exit\(0\) when it is imported"),
    "ends": ("import os\nos._exit(0)\n", "it ended its process with code 0 while it was imported"),
    "interrupts": ("raise KeyboardInterrupt\n", r"KeyboardInterrupt \(broken_interrupts\.py, line 1\)"),
    "leaves": ("raise GeneratorExit('so')\n", r"GeneratorExit: so \(broken_leaves\.py, line 1\)"),
    "silent": (
        "class E(Exception):\n    __str__ = None\nraise E\n",
        r"E: it cannot be printed \(broken_silent\.py, line 3\)",
    ),
    "dies": ("import os\nprint('words')\nos.kill(os.getpid(), 9)\n", "died of SIGKILL while it was imported; it had"),
    "closes": ("import os\nos.closerange(0, 64)\n", "closed what its worker speaks to the run through while it was"),
}


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Writes the module of a case; returns the verifier's name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(case, text):
        (tmp_path / f"broken_{case}.py").write_text(text)
        return f"broken_{case}:verify"

    return write


@pytest.mark.parametrize("case", CASES)
def test_a_module_that_cannot_be_imported_is_named_with_what_is_wrong(broken, case):
    text, message = CASES[case]
    name = broken(case, text)
    with pytest.raises(VerifierError, match=rf"the verifier '{name}' cannot be imported: .*{message}") as caught:
        check_rewards([FunctionReward(function=name)], GradingConfig())
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_module_that_hangs_is_said_and_named_in_time(broken, monkeypatch, capfd):
    monkeypatch.setattr(waiting, "FIRST_S", 0.3)
    name = broken("hangs", "import time\ntime.sleep(1000)\n")
    start = time.monotonic()
    with (
        pytest.raises(VerifierError, match=f"'{name}' cannot be imported: it took more than 1 s while it was imported"),
        Grader(name, workers=1, limits=Limits(start_s=1.0)) as grader,
    ):
        grader.wait_ready()
    assert time.monotonic() - start < 5
    assert f"waiting for the verifier '{name}' in its import, for " in capfd.readouterr().err


def test_what_a_module_starts_at_import_may_stay(broken):
    text = """
import subprocess, sys, threading, time
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])

def verify(*_):
    return 1.0
"""
    with Grader(broken("starts", text), workers=1) as grader:
        assert [v.reward for v in grader.ask([question()] * 5)] == [1.0] * 5


def test_a_verifier_that_cannot_be_loaded_a_second_time_fails_its_answers_and_blocks_nothing(broken, tmp_path):
    text = f"""
import os, pathlib
if pathlib.Path({str(tmp_path / "once")!r}).exists():
    raise RuntimeError("only once")
pathlib.Path({str(tmp_path / "once")!r}).touch()

def verify(*_):
    os._exit(0)
"""
    with Grader(broken("once", text), workers=1) as grader:
        assert [v.kind for v in grader.ask([question()] * 3)] == ["exited", "not_loaded", "not_loaded"]
        (tmp_path / "once").unlink()
        assert [v.kind for v in grader.ask([question()])] == ["exited"]


def test_the_command_says_it_with_2_and_an_earlier_run_stays(broken, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("of an earlier run")
    name = broken("command", "import sys\nsys.exit(0)\n")
    assert main(["train", "configs/quickstart.yaml", f"run.directory={run}", f"rewards={name}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"sameroute: the verifier '{name}' cannot be imported")
    assert "Traceback" not in said
    assert main(["train", "configs/quickstart.yaml", f"run.directory={run}", "rewards=exact"]) == 2
    assert "there is no verifier 'exact'" in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == "of an earlier run"


@pytest.mark.parametrize("parameters", ["a, b", "", "a, b, c, d, e", "*, prompt"])
def test_a_function_with_other_parameters_is_named_before_anything_starts(broken, parameters):
    case = f"signature{len(parameters)}"
    name = broken(case, f"def verify({parameters}):\n    return 1.0\n")
    words = rf"the verifier '{name}' is called with \(prompt, .*, and it takes \("
    with pytest.raises(VerifierError, match=words) as caught:
        check_rewards([FunctionReward(function=name)], GradingConfig())
    assert caught.value.exit_code == 2


def test_what_workers_share_is_imported_once_without_a_word_and_leaves_no_thread_before_they_are_forked():
    script = """
import os, sys
from pipeline.rewards.registry import KINDS, Component, preload
preload([Component(kind, {"kind": kind}) for kind in KINDS])
assert {"math_verify", "reasoning_gym", "aiohttp"} <= sys.modules.keys(), sys.modules.keys()
assert len(os.listdir("/proc/self/task")) == 1
"""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | one_thread)
    assert (done.returncode, done.stderr) == (0, "")
