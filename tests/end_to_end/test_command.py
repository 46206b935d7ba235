"""`sameroute train` as a user runs it: what a run leaves, and what its dumps are good for."""

from __future__ import annotations

import json

import pytest

from pipeline.commands.main import main
from pipeline.config import load_config
from pipeline.observe.report.page import write_report
from tests.support.command import DUMPED, KEYS, QUICKSTART, SMALL, Command

# What took time, what became of prompts, and of grading: a replay draws no prompts and grades nothing.
NOT_REPLAYED = (
    "time/",
    "devices/",
    "straggler/",
    "throughput/",
    "data/",
    "servers/",
    "sync/",
    "reward/failed",
    "reward/failures_",
    "reward/groups_dropped",
    "reward/length",  # the component
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps on two ranks, which dumped them."""
    folder = tmp_path_factory.mktemp("finished")
    run = Command(folder, *SMALL, *DUMPED, "debug.dump_rollouts=true")
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
    assert all((r["servers/serving"], r["servers/lost"], r["servers/wide_routes"]) == (1, 0, 0) for r in rows)
    assert "step 3/3  reward" in run.text()
    assert load_config(run.run / "config.yaml").train.steps == 3
    assert (run.run / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert list((run.run / "tensorboard").glob("events.out.tfevents.*"))
    assert {f.name for f in (run.run / "logs").iterdir()} == {
        "sglang.log", "start.log", "trainer_rank0.log", "trainer_rank1.log",
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
def test_a_replay_needs_no_server_and_repeats_the_run_bit_for_bit(finished, tmp_path, capfd):
    replay, dumps = tmp_path / "replay", ["--from-dump", str(finished.run / "dumps")]
    no_server = "server.attention_backend=no_such_backend"
    arguments = [f"run.directory={replay}", *SMALL, *DUMPED, no_server, *dumps]
    assert main(["train", QUICKSTART, *arguments]) == 0, capfd.readouterr()
    assert not (replay / "logs" / "sglang.log").exists()
    before, after = (
        [
            {key: value for key, value in json.loads(line).items() if not key.startswith(NOT_REPLAYED)}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (finished.run, replay)
    )
    assert len(before) == 3
    assert all(row["train/grad_norm"] > 0 and row["reward/std"] > 0 for row in before)
    assert after == before
    trained, again = ((folder / "hf" / "model.safetensors").read_bytes() for folder in (finished.run, replay))
    assert again == trained
    rollouts = [sorted((folder / "rollouts").glob("*.txt")) for folder in (finished.run, replay)]
    assert [f.read_text() for f in rollouts[1]] == [f.read_text() for f in rollouts[0]]


@pytest.mark.slow
def test_diagnose_takes_the_rollouts_of_a_dump_and_tells_by_its_exit_code(finished, tmp_path, capfd):
    dump, out = finished.run / "dumps" / "step_000001.safetensors", tmp_path / "out"
    other = [*SMALL, *DUMPED, "parallel={}", f"run.directory={tmp_path / 'run'}"]  # of one rank: half the start
    arguments = [*other, "--rollouts", str(dump), "--out", str(out)]
    code, said = main(["diagnose", QUICKSTART, *arguments]), capfd.readouterr()
    assert code == 0, said
    found = json.loads((out / "diagnose.json").read_text())
    assert found["sentence"] in said.out
    assert found["agree"]
    assert found["rollouts"] == 32
    assert len(found["parts"]) == 7
    assert (out / "diagnose.html").is_file()
    assert not (tmp_path / "run").exists()
