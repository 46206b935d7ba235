"""The whole loop on both real engines, as a user runs it: what it leaves, and what happens when something dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_ext.batch.layout import Sample
from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.parts import merge_update
from pipeline.config import load_config
from pipeline.dumps.dump import DumpError
from pipeline.loop.compare import DisagreementError
from pipeline.loop.open_loop import open_loop
from pipeline.loop.run import _replay, train
from pipeline.objectives import Denominators, ObjectiveConfig, resolve
from pipeline.observe.report.page import write_report
from pipeline.trainer.losses import LossRow, policy_loss
from pipeline.trainer.samples import to_sample
from tests.support.ranks import run_ranks
from tests.support.receivers import free_port, scrape

QUICKSTART = "configs/quickstart.yaml"
SMALL = ["supervised.steps=5", "supervised.decay_steps=null", "supervised.warmup_steps=0", "train.decay_steps=null",
         "rollout.prompts_per_step=8", "rollout.samples_per_prompt=4"]  # fmt: skip
DUMPED = ["train.steps=3", "parallel={ranks: 2, expert: 2}", "data.reward=tests.support.verifiers:length"]
KEYS = {
    "step", "reward/mean", "mismatch/k3", "mismatch/abs_logprob", "routing/replayed_fraction", "routing/agreement",
    "loss/clip_fraction", "response/length_mean", "weights/version", "time/rollout_s", "time/train_s", "time/sync_s",
    "time/step_s",
}  # fmt: skip
END_S = 60  # a run that cannot go on ends within this


def marked_processes(mark: str) -> list[str]:
    """Command lines of all processes whose environment carries the mark."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # gone between the listing and the reading, or a kernel thread
    return [f for f in found if f]


class Command:
    """`sameroute train` as a child process whose whole process tree can be found again."""

    def __init__(self, folder: Path, *overrides: str, config: str = QUICKSTART):
        self.mark, self.output, self.run = f"mark-{uuid.uuid4().hex}", folder / "output.txt", folder / "run"
        command = [
            sys.executable,
            "-m",
            "pipeline.commands.main",
            "train",
            config,
            f"run.directory={self.run}",
            *overrides,
        ]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"SAMEROUTE_MARK": self.mark}
            )

    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, words: str, timeout_s: float = 200) -> None:
        deadline = time.monotonic() + timeout_s
        while words not in self.text():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.2)

    def end(self, timeout_s: float = END_S) -> int:
        try:
            return self.process.wait(timeout_s)
        finally:
            self.process.kill()

    def stop(self) -> None:
        """Let nothing outlive a test, whatever it found."""
        if self.process.poll() is None:
            self.process.terminate()
            self.end()

    def orphans(self, within_s: float = 10) -> list[str]:
        """What is left so many seconds after now; [] as soon as nothing is."""
        deadline = time.monotonic() + within_s
        while (left := marked_processes(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left


@pytest.fixture
def command(tmp_path):
    """Starts commands in folders of their own; none outlives the test."""
    started: list[Command] = []

    def start(*overrides: str, folder: Path | None = None) -> Command:
        folder = folder or tmp_path / str(len(started))
        folder.mkdir(exist_ok=True)
        started.append(Command(folder, *overrides))
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("session")
    (folder / "logs").mkdir()
    with open_loop(load_config(QUICKSTART, SMALL), folder, folder / "logs") as opened:
        yield opened


@pytest.fixture
def loop(session):
    return session[0]


@pytest.mark.slow
def test_engines_agree_to_1e_4_before_and_after_ten_updates_and_transfers(loop):
    for number in range(1, 11):
        result = loop.step(number)
        metrics, groups = result.metrics, result.batch.groups
        assert metrics.keys() >= KEYS
        assert metrics["mismatch/max_abs_logprob"] < 1e-4
        assert metrics["routing/replayed_fraction"] == 1.0
        assert metrics["weights/version"] == number
        assert metrics["train/grad_norm"] >= 0
        assert len(groups) == 8
        assert all(len(g.rollouts) == 4 == len(g.rewards) for g in groups)
        assert all((r.weight_versions == number).all() for g in groups for r in g.rollouts)
    assert loop.fleet.version == 11
    loop.probe()


def gspo_update(config: ParallelConfig, model: str, samples: list[Sample]):
    """Runs on a rank: proximal log-probs of rollouts that another policy sampled, then one GSPO update."""
    from megatron_ext.trainer import Trainer

    trainer = Trainer(model, config, TrainerConfig(micro_batch_tokens=128), OptimizerConfig(lr=1e-3), replay=True)
    advantages = np.random.default_rng(0).normal(size=len(samples))
    rows = [replace(s.row, advantage=float(a)) for s, a in zip(samples, advantages, strict=True)]
    tokens = sum(s.response_length for s in samples)
    objective = resolve(ObjectiveConfig(preset="gspo", clip_low=0.02, clip_high=0.03))
    loss = policy_loss(objective, Denominators(len(samples), tokens, max_length=16))
    return trainer.update([replace(s, row=row) for s, row in zip(samples, rows, strict=True)], loss)


@pytest.mark.slow
def test_the_same_rollouts_give_the_same_first_step_on_every_layout(session):
    loop, model = session
    rollouts = loop.step(11).batch.rollouts
    samples = [replace(to_sample(r), row=LossRow(r.rollout_logprobs, r.rollout_logprobs, 0.0)) for r in rollouts]
    layouts = [
        {},
        {"ranks": 2, "expert": 2},
        {"ranks": 2, "tensor": 2, "sequence": True},
        {"ranks": 2, "pipeline": 2},
    ]
    one, *others = [
        merge_update(run_ranks(gspo_update, ParallelConfig(**layout), str(model), samples)) for layout in layouts
    ]
    assert one["train/grad_norm"] > 0
    assert 0 < one["loss/clip_fraction"] < 1
    for other in others:
        assert other["loss/objective"] == pytest.approx(one["loss/objective"], rel=1e-4)
        assert other["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=1e-4)
        assert other["loss/clip_fraction"] == one["loss/clip_fraction"]


@pytest.mark.slow
def test_weights_that_did_not_arrive_stop_the_run(loop):
    pairs = loop.source.take_supervised(16)
    loop.trainers.update_supervised([Sample(p.tokens, p.prompt_length) for p in pairs])
    with pytest.raises(DisagreementError, match=r"differ by .* the weight transfer failed, or"):
        loop.probe()
    loop.sync()
    loop.probe()


@pytest.mark.slow
def test_tokens_of_an_older_version_stop_the_run(loop):
    (server,) = loop.fleet.servers
    server.client.set_weight_version(loop.fleet.version - 1)
    with pytest.raises(DisagreementError, match=r"sampled under weights \[\d+\], the trainer holds"):
        loop.probe()
    server.client.set_weight_version(loop.fleet.version)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps on two ranks, which dumped them."""
    run = Command(tmp_path_factory.mktemp("finished"), *SMALL, *DUMPED, "debug.dump_rollouts=true")
    try:
        assert run.end(240) == 0, run.text()
        yield run
    finally:
        run.stop()


@pytest.mark.slow
def test_a_run_leaves_its_files_and_no_process(finished, command):
    run = finished
    assert run.orphans() == []
    rows = [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert all(r.keys() >= KEYS and r["mismatch/max_abs_logprob"] < 1e-4 for r in rows)
    assert "step 3/3  reward" in run.text()
    assert load_config(run.run / "config.yaml").train.steps == 3
    assert (run.run / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert list((run.run / "tensorboard").glob("events.out.tfevents.*"))
    assert {f.name for f in (run.run / "logs").iterdir()} == {
        "sglang.log", "trainer_rank0.log", "trainer_rank1.log",
    }  # fmt: skip
    assert len(list((run.run / "rollouts").glob("*.txt"))) == 3
    records = [json.loads(line) for line in (run.run / "records.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3]
    assert all(len(r["routing"]) == 4 and sum(r["ratios"]["proximal/rollout"]["counts"]) > 0 for r in records)
    facts = json.loads((run.run / "facts.json").read_text())
    assert [rank["rank"] for rank in facts["trainer"]] == [0, 1]
    assert {rank["node"] for rank in facts["trainer"]} == {node["id"] for node in facts["ray"]["nodes"]}
    found = json.loads((run.run / "diagnose.json").read_text())
    assert found["agree"]
    assert found["sentence"].startswith("The engines agree")
    assert found["sentence"] in run.text()
    assert found["rollouts"] == 16
    assert not (run.run / "diagnose.html").exists()
    page = write_report(run.run).read_text()
    assert "Finished: 3 of 3 steps." in page
    assert "is recorded yet" not in page

    from transformers import AutoModelForCausalLM

    start = AutoModelForCausalLM.from_pretrained(run.run / "model").state_dict()
    trained = AutoModelForCausalLM.from_pretrained(run.run / "hf").state_dict()
    assert start.keys() == trained.keys()
    assert max(float((start[k] - trained[k]).abs().max()) for k in start) > 1e-4

    again = command(*SMALL, "run.overwrite=false", folder=run.run.parent)
    assert again.end() == 2
    assert "holds a run already; set run.directory" in again.text()


@pytest.mark.slow
def test_a_replay_needs_no_server_and_repeats_the_run_bit_for_bit(finished, command):
    dumps = finished.run / "dumps"
    replay = command(*SMALL, *DUMPED, "server.extra_args=[--no-such-argument]", "--from-dump", str(dumps))
    assert replay.end(240) == 0, replay.text()
    assert replay.orphans() == []
    assert not (replay.run / "logs" / "sglang.log").exists()
    before, after = (
        [
            {key: value for key, value in json.loads(line).items() if not key.startswith(("time/", "throughput/"))}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (finished.run, replay.run)
    )
    assert len(before) == 3
    assert all(row["train/grad_norm"] > 0 and row["reward/std"] > 0 for row in before)
    assert after == before
    trained, again = ((folder / "hf" / "model.safetensors").read_bytes() for folder in (finished.run, replay.run))
    assert again == trained
    rollouts = [sorted((folder / "rollouts").glob("*.txt")) for folder in (finished.run, replay.run)]
    assert [f.read_text() for f in rollouts[1]] == [f.read_text() for f in rollouts[0]]


@pytest.mark.slow
def test_diagnose_takes_the_rollouts_of_a_dump_and_tells_by_its_exit_code(finished, tmp_path):
    dump, out = finished.run / "dumps" / "step_000001.safetensors", tmp_path / "out"
    arguments = [*SMALL, *DUMPED, f"run.directory={tmp_path / 'run'}", "--rollouts", str(dump), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.commands.main", "diagnose", QUICKSTART, *arguments],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "diagnose.json").read_text())
    assert found["sentence"] in done.stdout
    assert found["agree"]
    assert found["rollouts"] == 32
    assert len(found["parts"]) == 7
    assert (out / "diagnose.html").is_file()
    assert not (tmp_path / "run").exists()


def test_a_dump_that_the_run_would_delete_is_refused_before_it_does(tmp_path):
    dumps = tmp_path / "dumps"
    dumps.mkdir()
    (tmp_path / "config.yaml").touch()
    with pytest.raises(DumpError, match=r"dumps lies in run\.directory=.*; set run\.directory to another path"):
        train(load_config(QUICKSTART, [f"run.directory={tmp_path}", "run.overwrite=true"]), dumps)
    assert dumps.is_dir()


def test_a_replay_from_other_weights_says_so():
    def step(number, dumped):
        raise DisagreementError("the log-probs differ")

    loop, dumped = SimpleNamespace(config=None, shape=None, step=step), SimpleNamespace(steps=[7], read=lambda *_: None)
    with pytest.raises(DisagreementError, match=r"log-probs differ\. Or these are not the weights that sampled step 7"):
        _replay(loop, dumped, 7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "message"), [("sglang::scheduler", "sglang.log"), ("ray::TrainerRank", "trainer rank 0 died")]
)
def test_a_killed_process_ends_the_run_with_its_name_and_no_orphan(command, victim, message):
    port = free_port()
    run = command(*SMALL, "supervised.steps=0", "train.steps=9999", f"observe.prometheus_port={port}")
    run.wait_for("step    2/9999")
    served = scrape(port)
    assert served["sameroute_steps_total"][0][1] >= 1
    assert served["sameroute_routing_replayed_fraction"] == [({}, 1.0)]
    victims = [
        int(folder.name)
        for folder in Path("/proc").iterdir()
        if folder.name.isdigit()
        and victim.encode() in (folder / "cmdline").read_bytes()
        and run.mark.encode() in (folder / "environ").read_bytes()
    ]
    assert victims
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    assert run.end() == 1
    assert message in run.text()
    assert "Traceback" not in run.text()
    assert run.orphans() == []


@pytest.mark.slow
def test_a_termination_request_ends_the_run_with_no_orphan(command):
    run = command(*SMALL, "supervised.steps=100000")
    run.wait_for("supervised")
    run.process.terminate()
    assert run.end() == 130
    assert "interrupted" in run.text()
    assert run.orphans() == []


def test_what_cannot_start_says_so_at_once_and_costs_no_earlier_run(command, tmp_path):
    import socket

    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "config.yaml").write_text("of an earlier run")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        cases = [
            (["train.stepz=1"], "train.stepz: there is no such key"),
            ([f"server.port={busy.getsockname()[1]}"], "cannot listen on 127.0.0.1"),
            ([f"observe.prometheus_port={busy.getsockname()[1]}"], "observe.prometheus_port: cannot listen on"),
            (["model.tiny=null", "model.path=/nowhere"], "/nowhere is no Hugging Face model directory"),
            (["parallel={ranks: 3, tensor: 2, sequence: true}"], "set parallel.ranks to a multiple of 2"),
            (["data.reward=none.such"], "none.such"),
            (["data.task=null", "data.path=/nowhere.jsonl"], "there is no data file /nowhere.jsonl"),
            (["--from-dump", "/nowhere"], "there is no dump /nowhere"),
        ]
        runs = [command(f"run.directory={earlier}", *overrides) for overrides, _ in cases]
        for run, (_, message) in zip(runs, cases, strict=True):
            assert run.end() in (1, 2)
            assert message in run.text()
            assert "Traceback" not in run.text()
            assert run.orphans() == []

    assert (earlier / "config.yaml").read_text() == "of an earlier run"
