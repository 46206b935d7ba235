"""A run that evaluates beside its rollouts; its model evaluated alone; a talk with it. All greedy, so all the same."""

from __future__ import annotations

import io
import json

import pytest
import torch

from pipeline.checkpoints.store import CheckpointStore
from pipeline.checkpoints.weights_of import NoModelError, model_of_run
from pipeline.commands.main import main
from pipeline.loop.talk import chat
from pipeline.observe.report.page import write_report
from tests.support.command import QUICKSTART, SMALL, Command

SET = "{name: held, prompts: 24, temperature: 0, every_steps: 1}"
DIGITS = ["data.task.min_digits=2", "data.task.max_digits=3"]  # few: half the supervised steps learn them
RUN = [*SMALL, *DIGITS, "supervised.steps=60", "supervised.lr=3e-3", "train.steps=2",
       "rollout.max_staleness=1", "checks.first_rollouts=0", f"evaluate=[{SET}]"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, preloaded):
    folder = tmp_path_factory.mktemp("evaluated")
    export = f"checkpoint={{every_steps: 2, best: {{score: eval/held/pass@1, export: {folder / 'best'}}}}}"
    command = Command(folder, *RUN, export)
    assert command.end(300) == 0, command.text()
    assert command.orphans() == []
    return command.run


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def answers_of(rows):
    return [(row["question"], row["response"], row["passed"]) for row in rows]


@pytest.mark.slow
def test_each_evaluation_is_of_one_version_and_stands_in_the_step_and_in_its_own_files(run):
    rows = rows_of(run / "evaluations.jsonl")
    assert [(row["set"], row["step"], row["version"]) for row in rows] == [
        ("held", step, step + 1) for step in range(3)
    ]
    steps = rows_of(run / "metrics.jsonl")
    assert [step["eval/held/pass@1"] for step in steps] == [row["scores"]["pass@1"][0] for row in rows[1:]]
    for row in rows:
        answers = rows_of(run / "evaluations" / "held" / f"step_{row['step']:06d}.jsonl")
        assert sum(a["passed"] for a in answers) / 24 == pytest.approx(row["scores"]["pass@1"][0])
        assert [a["question"] for a in answers] == list(range(24))
    assert steps[1]["rollout/lag_mean"] > 0, "rollouts went on beside it"


@pytest.mark.slow
def test_the_answers_are_those_that_transformers_gives_with_the_same_weights(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(run / "hf"), AutoTokenizer.from_pretrained(run / "hf")
    answers, right = rows_of(run / "evaluations" / "held" / "step_000002.jsonl"), 0
    for answer in answers:
        ids = torch.tensor([tokenizer.encode(answer["prompt"], add_special_tokens=False)])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        given = out[0, ids.shape[1] :].tolist()
        stopped = given[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(given[:-1] if stopped else given)
        assert answer["response"] == text
        right += stopped and text == answer["metadata"]["answer"]
    assert rows_of(run / "evaluations.jsonl")[-1]["scores"]["pass@1"][0] == pytest.approx(right / 24)
    assert right > 0, "a model that is always wrong proves little"


@pytest.mark.slow
def test_alone_on_a_checkpoint_the_scores_are_those_of_the_run(run, tmp_path, capsys):
    out, one = tmp_path / "out", f"run.directory={tmp_path / 'other'}"
    checkpoint = run / "checkpoints" / "step_2"
    sets = f"evaluate=[{SET}, {{name: other, prompts: 2}}]"
    arguments = [QUICKSTART, one, *DIGITS, sets, "--set", "held", "--out", str(out)]
    assert main(["evaluate", *arguments, "--checkpoint", str(checkpoint)]) == 0
    last = rows_of(run / "evaluations.jsonl")[-1]
    (found,) = json.loads((out / "evaluation.json").read_text())["sets"]
    assert found["scores"] == last["scores"]
    assert answers_of(rows_of(out / "held.jsonl")) == answers_of(
        rows_of(run / "evaluations" / "held" / "step_000002.jsonl")
    )
    assert f"{last['scores']['pass@1'][0]:.3f}" in capsys.readouterr().out
    page = (out / "evaluation.html").read_text()
    assert "held" in page
    assert "pass@1" in page
    assert not (tmp_path / "other").exists(), "the run's directory is not touched"


@pytest.mark.slow
def test_the_trained_model_answers_a_line_as_it_did_in_the_evaluation(run):
    asked = rows_of(run / "evaluations" / "held" / "step_000002.jsonl")[:2]
    out = io.StringIO()
    chat(run, temperature=0, said=[asked[0]["metadata"]["question"], "/new", asked[1]["metadata"]["question"]], out=out)
    assert out.getvalue().splitlines() == [answer["response"] for answer in asked]


def test_the_best_checkpoint_is_kept_and_exported_and_the_report_shows_the_scores(run):
    scores = [row["scores"]["pass@1"][0] for row in rows_of(run / "evaluations.jsonl")]
    best = CheckpointStore(run / "checkpoints").best
    higher = [step for step in (1, 2) if scores[step] > max(scores[:step])]
    assert (None if best is None else best.name) == (f"step_{higher[-1]}" if higher else None)
    assert (run.parent / "best" / "model.safetensors").is_file() == bool(higher)
    assert "Evaluation: held" in write_report(run).read_text()


def test_a_model_that_is_not_there_is_named(run, tmp_path):
    with pytest.raises(NoModelError, match="has no checkpoint 'step_9'; it has step_2"):
        model_of_run(run, "step_9")
    with pytest.raises(NoModelError, match="is no run directory"):
        model_of_run(tmp_path)
    assert model_of_run(run) == run / "hf"
    assert model_of_run(run, "step_2") == run / "checkpoints" / "step_2"
