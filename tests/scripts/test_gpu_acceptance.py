"""The acceptance goes on where it was stopped, and says of each step what it showed."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.config.load_config import check_precision
from pipeline.loop.engines import shares_gpus
from scripts import gpu_acceptance
from scripts.gpu_acceptance import Step, StepFailed, figures_of_run, left_out, main, run_step, steps_of

SHOWN = {"k3": 1.5, "|log mu|": 0.25}


def row(number: int, **other) -> dict:
    own = {"step": number, "weights/version": float(number), "routing/replayed_fraction": 1.0, "routing/agreement": 0.9}
    own |= {"sync/senders": 1.0}
    gaps = {"mismatch/abs_logprob": 0.01 * number, "mismatch/max_abs_logprob": 0.1 * number, "mismatch/k3": 1e-4}
    return own | gaps | {"reward/mean": number / 10, "time/step_s": 2.0, "time/sync_s": 0.5} | other


def written(directory: Path, rows: list[dict]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return directory


def test_figures_of_a_run(tmp_path):
    shown = figures_of_run(written(tmp_path, [row(1), row(2), row(3)]), 3, replay=True)
    assert shown["mean |log pi_o - log mu|"] == pytest.approx(0.02)
    assert shown["largest |log pi_o - log mu|"] == pytest.approx(0.3)
    assert (shown["reward, first"], shown["reward, last"]) == (0.1, 0.3)


@pytest.mark.parametrize(
    ("rows", "replay", "why"),
    [
        ([row(1)], True, "1 of 2 steps"),
        ([row(1), row(2, **{"weights/version": 1.0})], True, "a transfer is missing"),
        ([row(1), row(2, **{"routing/replayed_fraction": 0.99})], True, "99.0% to 100.0% were replayed"),
        ([row(1), row(2)], False, "100.0% to 100.0% were replayed"),
    ],
)
def test_a_run_that_did_not_show_it_has_failed(rows, replay, why, tmp_path):
    with pytest.raises(StepFailed, match=why):
        figures_of_run(written(tmp_path, rows), 2, replay=replay)


def test_a_run_whose_weights_one_rank_sent_for_all_has_failed(tmp_path):
    rows = [row(1, **{"sync/senders": 2.0}), row(2)]
    with pytest.raises(StepFailed, match=r"sent by \[1, 2\] ranks, not by 2"):
        figures_of_run(written(tmp_path, rows), 2, replay=True, senders=2)
    assert figures_of_run(written(tmp_path, rows[:1]), 1, replay=True, senders=2)["k3"] == 1e-4


def test_a_run_that_wrote_nothing_has_failed(tmp_path):
    with pytest.raises(StepFailed, match="was not written"):
        figures_of_run(tmp_path, 2, replay=True)


def python(program: str, name: str = "one", **other) -> Step:
    return Step(name, "what", [sys.executable, "-c", program], other.pop("figures", lambda _: SHOWN), **other)


def test_a_step_that_ends_well_has_its_figures(tmp_path):
    result = run_step(python("print('said')"), tmp_path)
    assert (result["state"], result["figures"]) == ("passed", SHOWN)
    assert (tmp_path / "one.log").read_text() == "said\n"


def test_what_a_step_said_last_is_why_it_failed(tmp_path):
    result = run_step(python("raise SystemExit('no such card')"), tmp_path)
    assert (result["state"], result["why"]) == ("failed", "exit code 1: no such card")


def test_a_step_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    program = "import subprocess, time; subprocess.Popen(['sleep', '600']); print('on', flush=True); time.sleep(600)"
    result = run_step(python(program, limit_s=1.0), tmp_path)
    assert (result["state"], result["why"]) == ("failed", "it took more than 1 s")


def test_figures_that_cannot_be_read_are_a_failure(tmp_path):
    def figures(out):
        return json.loads((out / "nowhere.json").read_text())

    assert "nowhere.json" in run_step(python("", figures=figures), tmp_path)["why"]


@pytest.fixture
def two_steps(monkeypatch, tmp_path):
    """Steps that count how often they are made; the second fails until a file is there."""
    count = "from pathlib import Path; p = Path({!r}); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    first, second = (count.format(str(tmp_path / name)) for name in ("first", "second"))
    second += f"; assert Path({str(tmp_path / 'mended')!r}).exists()"
    steps = [python(first, "first"), python(second, "second"), python("", "third", package="nowhere")]
    monkeypatch.setattr(gpu_acceptance, "steps_of", lambda *_: steps)
    monkeypatch.setattr(gpu_acceptance, "left_out", lambda step, *_: "no such package" if step.package else None)
    return tmp_path


def test_the_same_command_goes_on_where_it_was(two_steps, capsys):
    out = two_steps / "out"
    assert main([str(out)]) == 1
    assert "2/3 second: failed: exit code 1: AssertionError" in capsys.readouterr().out
    (two_steps / "mended").touch()
    assert main([str(out)]) == 0
    assert "1/3 first: passed on" in capsys.readouterr().out
    assert [(two_steps / name).read_text() for name in ("first", "second")] == ["x", "xx"]
    assert main([str(out), "--again", "first"]) == 0
    assert [(two_steps / name).read_text() for name in ("first", "second")] == ["xx", "xx"]
    found = json.loads((out / "acceptance.json").read_text())
    assert [found[name]["state"] for name in ("first", "second", "third")] == ["passed", "passed", "left out"]
    shown = (out / "acceptance.md").read_text()
    assert "| third | what | left out: no such package |" in shown
    assert "| k3 | 1.5 |" in shown
    assert r"| \|log mu\| | 0.25 |" in shown, "a table of two columns"


def test_what_has_passed_with_other_packages_is_made_again(two_steps, monkeypatch):
    (two_steps / "mended").touch()
    main([str(two_steps / "out")])
    monkeypatch.setattr(gpu_acceptance, "here", lambda _: {"gpus": ["another"], "versions": {}, "git": None})
    main([str(two_steps / "out")])
    assert (two_steps / "first").read_text() == "xx"


def test_a_step_that_is_not_there_is_refused_before_anything_starts(two_steps, capsys):
    with pytest.raises(SystemExit):
        main([str(two_steps / "out"), "--only", "kernel"])
    assert "there is no step kernel; there are first, second, third" in capsys.readouterr().err
    assert not (two_steps / "out").exists()


@pytest.mark.parametrize(("given", "seen"), [(None, "0,1"), ("", "0,1"), ("4,5,6", "4,5")])
def test_gpus_that_engines_are_to_share_are_the_only_ones_that_a_step_sees(given, seen, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    run_step(python("import os; print(os.environ['CUDA_VISIBLE_DEVICES'])", sees=2), tmp_path)
    assert (tmp_path / "one.log").read_text() == f"{seen}\n"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_configuration_of_every_step_is_one(device, tmp_path):
    """`sameroute` would take it: what it would refuse on a machine with GPUs is refused here too."""
    for step in steps_of(tmp_path, device, None, [], "10.0.0.1:6379"):
        if step.words[3:4] == ["train"]:
            check_precision(load_config(step.words[4], step.words[5:]), device)


def test_engines_share_gpus_where_a_step_says_so_and_no_other_has_too_few(tmp_path):
    shared = {}
    for step in steps_of(tmp_path, "cuda", None, []):
        if step.words[3:4] == ["train"]:
            shared[step.name] = shares_gpus(load_config(step.words[4], step.words[5:]), step.sees or max(2, step.gpus))
    assert [name for name, shares in shared.items() if shares] == ["shared_memory", "turns", "servers"]


def test_what_a_machine_cannot_run_is_left_out_with_the_reason(tmp_path, monkeypatch):
    steps = {step.name: step for step in steps_of(tmp_path, "cuda", "preset.yaml", [])}
    assert left_out(steps["process_group"], "cuda", 1) == "it takes 2 GPUs, and there are 1"
    assert left_out(steps["process_group"], "cuda", 2) is None
    assert left_out(steps["kernels"], "cuda", 0) == "it takes 1 GPUs, and there are 0"
    assert left_out(steps["kernels"], "cpu", 0) == left_out(steps["preset"], "cpu", 0) == "it needs a GPU"
    assert left_out(steps["turns"], "cpu", 0) is None
    assert left_out(steps["senders"], "cuda", 3) == "it takes 4 GPUs, and there are 3"
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert left_out(steps["image"], "cuda", 8) == "docker is not installed"
    assert "machines" not in steps
    (asked,) = [step for step in steps_of(tmp_path, "cuda", None, [], "10.0.0.1:6379") if step.name == "machines"]
    assert left_out(asked, "cuda", 2) == "it takes 4 GPUs, and there are 2"


def test_the_pages_have_every_step_and_what_has_never_run_names_one(tmp_path):
    names = [step.name for step in steps_of(tmp_path, "cuda", "preset.yaml", [], "10.0.0.1:6379")]
    page, on_a_gpu = (Path("docs", name).read_text() for name in ("gpu-acceptance.md", "gpu.md"))
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == names
    never = [line for line in on_a_gpu.partition("## What has never run")[2].splitlines() if line.startswith("| ")][1:]
    assert len(never) > 10
    for line in never:
        named = re.findall(r"`(\w+)`", line.rpartition(" | ")[2])
        assert named, line
        assert set(named) <= set(names), line


@pytest.mark.proof
@pytest.mark.usefixtures("preloaded")
def test_the_steps_of_both_engines_pass_on_a_cpu(tmp_path):
    """Three of them, small; the others differ in a setting. Servers and ranks are forked, which a user's are not."""
    assert main([str(tmp_path), "--device", "cpu", "--only", "kernels", "no_replay", "senders", "parted"]) == 0
    found = json.loads((tmp_path / "acceptance.json").read_text())
    assert found["kernels"]["state"] == "left out"
    for name in ("no_replay", "senders", "parted"):
        assert found[name]["figures"]["mean |log pi_o - log mu|"] < 1e-4
    for name in ("senders", "parted"):
        assert found[name]["figures"]["routes that agree"] > 0.99
