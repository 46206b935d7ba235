"""A dense model becomes a mixture, and every command of the README takes it: trained on, gone on with, from a dump too,
evaluated, talked to, taken apart, converted there and back, reported."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.commands import main as commands
from pipeline.data.tokenizer import VOCAB_SIZE, write_character_tokenizer
from pipeline.loop.talk import chat
from tests.support.command import QUICKSTART, SMALL, Command
from tests.support.convert_cli import convert
from tests.support.tiny_families import save_family

SOURCES = {
    "mixtral": ("llama", ["--experts", "4", "--topk", "2", "--noise", "0.02"]),
}
SET = "evaluate=[{name: held, prompts: 4, temperature: 0, every_steps: 9}]"
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}, "tie_word_embeddings": False}
"""What SGLang's Mixtral can hold of a Llama; it refuses the others."""
RUN = [*SMALL, "model.tiny=null", "parallel={ranks: 2, expert: 2}", "rewards=tests.support.verifiers:length",
       "rollout.prompts_per_step=4", "checkpoint.every_steps=1", "debug.dump_rollouts=true", "run.overwrite=false",
       "data.task.min_digits=2", "data.task.max_digits=3", SET]  # fmt: skip


def upcycled(family: str, folder: Path) -> Path:
    source, recipe = SOURCES[family]
    changes = PLAIN if family == "mixtral" else {}
    dense = save_family(source, folder / "dense", vocab_size=VOCAB_SIZE, **changes)
    write_character_tokenizer(dense)
    assert main(["upcycle", str(dense), str(folder / "moe"), *recipe]) == 0
    assert json.loads((folder / "moe" / "config.json").read_text())["model_type"] == family
    return folder / "moe"


def main(words: list[str]) -> int:
    """The command's exit code; the process is as before: it hides GPUs, and takes SIGTERM."""
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    try:
        return commands.main(words)
    finally:
        os.environ.clear()
        os.environ.update(before)
        signal.signal(signal.SIGTERM, handler)


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("family", SOURCES)
def test_every_command_takes_an_upcycled_model(command, tmp_path, capfd, family):
    model = upcycled(family, tmp_path)
    own = [*RUN, f"model.path={model}"]

    def ends(*words: str) -> Command:
        one = command(*own, *words, folder=tmp_path / "trained")
        assert one.end(200) == 0, one.text()
        return one

    ends("train.steps=2")
    run = ends("train.steps=3", "--resume").run
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["routing/replayed_fraction"] == 1 and row["mismatch/max_abs_logprob"] < 1e-4 for row in rows), rows
    assert any(row["train/grad_norm"] > 0 for row in rows)

    replayed = command(*own, "--from-dump", str(run / "dumps"))
    assert replayed.end(200) == 0, replayed.text()
    assert [r["reward/mean"] for r in rows_of(replayed.run)] == [r["reward/mean"] for r in rows]

    config = [QUICKSTART, *own, f"run.directory={tmp_path / 'other'}"]
    assert main(["evaluate", *config, "--model", str(run / "hf"), "--out", str(tmp_path / "alone")]) == 0
    (alone,) = json.loads((tmp_path / "alone" / "evaluation.json").read_text())["sets"]
    last = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    assert (last["step"], alone["scores"]) == (3, last["scores"])
    out = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        chat(run, temperature=0, said=["321"], out=out)
    assert len(out.getvalue().splitlines()) == 1

    assert main(["diagnose", *config, "--out", str(tmp_path / "parts")]) == 0, capfd.readouterr()
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").stat().st_size > 10_000

    there, back = tmp_path / "megatron", tmp_path / "back"
    answers = convert(["to-megatron", run / "hf", there, "--ep", 2], ["to-hf", there, back])
    assert [answer.code for answer in answers] == [0, 0], answers
    before, after = tensors(run / "hf"), tensors(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
