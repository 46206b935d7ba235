"""Which questions a set asks, and which sets are refused before anything starts."""

from __future__ import annotations

import json

import pytest

from pipeline.config import ConfigError, load_config
from pipeline.data.chat import DataError
from pipeline.data.prompts import PromptSource
from pipeline.loop.inputs import prepare_model

HELD = "{name: held, prompts: 30}"


def test_questions_of_the_runs_own_data_are_never_trained_on_and_do_not_depend_on_its_seed(open_quickstart, tmp_path):
    config, (asked,) = open_quickstart(f"evaluate=[{HELD}]")
    _, (again,) = open_quickstart(f"evaluate=[{HELD}]", "run.seed=9")
    assert [p.text for p in asked.prompts] == [p.text for p in again.prompts]
    model = prepare_model(config, tmp_path / "model")
    trained = {p.text for p in PromptSource(config.data, model, seed=0).take(3000)}
    assert not trained & {p.text for p in asked.prompts}


def test_all_rows_of_a_file_are_asked_and_of_one_with_a_held_out_part_only_that(open_quickstart, tmp_path):
    file = tmp_path / "test.jsonl"
    rows = [{"prompt": f"{i:05}", "answer": "".join(sorted(f"{i:05}"))} for i in range(400)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"{{kind: jsonl, path: {file}}}"
    _, (every, part) = open_quickstart(
        f"evaluate=[{{name: every, sources: [{source}]}}, {{name: part, sources: [{source[:-1]}, held_out: 0.25}}]}}]"
    )
    assert len({p.text for p in every.prompts}) == 400
    assert 60 < len(part.prompts) < 140
    _, (few,) = open_quickstart(f"evaluate=[{{name: few, prompts: 7, sources: [{source}]}}]")
    assert [p.text for p in few.prompts] == [p.text for p in every.prompts[:7]]
    with pytest.raises(DataError, match="evaluate, many: 401 questions are asked for, and there are 400"):
        open_quickstart(f"evaluate=[{{name: many, prompts: 401, sources: [{source}]}}]")


def test_a_wrong_row_is_named_with_its_set(open_quickstart, tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_text('{"prompt": "12"}\n')
    with pytest.raises(DataError, match=r"evaluate, bad: .*test.jsonl, line 1: .*answer"):
        open_quickstart(f"evaluate=[{{name: bad, sources: [{{kind: jsonl, path: {file}}}]}}]")


def test_data_that_holds_nothing_out_is_refused(open_quickstart, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"prompt": "21", "answer": "12"}\n')
    with pytest.raises(DataError, match="evaluate, held: train has no held_out prompts; set `held_out`"):
        open_quickstart("data.task=null", f"data.path={file}", "evaluate=[{name: held}]")


def test_of_several_sources_those_count_that_hold_something_out(open_quickstart, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i:05}", "answer": "1"}) + "\n" for i in range(50)))
    sources = f"[{{kind: jsonl, path: {file}}}, {{kind: synthetic, task: {{}}}}]"
    _, (asked,) = open_quickstart("data.task=null", f"data.sources={sources}", f"evaluate=[{HELD}]")
    assert {prompt.source for prompt in asked.prompts} == {"digit_sort"}


def test_a_prompt_without_what_its_verifier_reads_is_named(open_quickstart):
    rewards = "rewards: [{kind: number, answer: truth}]"
    with pytest.raises(DataError, match='evaluate, a: digit_sort:0: the prompt has no "truth", which the verifier'):
        open_quickstart(f"evaluate=[{{name: a, prompts: 2, {rewards}}}]")


def test_each_set_draws_and_is_graded_in_its_own_way(open_quickstart):
    _, (one, other) = open_quickstart(
        "evaluate=[{name: a, prompts: 2, temperature: 0, max_new_tokens: 3, rewards: number}, "
        "{name: b, prompts: 2, top_p: 0.9}]"
    )
    assert (one.sampling.temperature, one.sampling.max_new_tokens, one.rewards[0].kind) == (0, 3, "number")
    assert (other.sampling.temperature, other.sampling.top_p, other.sampling.max_new_tokens) == (1, 0.9, 8)
    assert other.rewards[0].kind == "exact_match"
    assert one.sampling.seed is other.sampling.seed is None
    _, (seeded,) = open_quickstart(
        "evaluate=[{name: a, prompts: 1}]", "server.deterministic=true", "run.seed=9", "precision.min_p=0"
    )
    assert seeded.sampling.seed == 0, "two runs are measured by the same draws"


def test_it_is_due_at_the_start_every_n_steps_and_at_the_end(open_quickstart):
    _, (one, other) = open_quickstart(
        "evaluate=[{name: a, prompts: 1, every_steps: 3}, {name: b, prompts: 1, every_steps: 3, at_start: false}]"
    )
    assert [step for step in range(9) if one.due(step, 8)] == [0, 3, 6, 8]
    assert [step for step in range(9) if other.due(step, 8)] == [3, 6, 8]


BEST = "checkpoint.best.score"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["evaluate=[{name: a}]"], "no end; say how many `prompts` the set a asks"),
        (["evaluate=[{name: a, sources: [{kind: reasoning_gym, tasks: {x: {}}}]}]"], "say how many `prompts`"),
        (["evaluate=[{name: a/b, prompts: 1}]"], "becomes a folder and a metric"),
        (["evaluate=[{name: ../a, prompts: 1}]"], "becomes a folder and a metric"),
        (["evaluate=[{prompts: 1}]"], "name"),
        (
            ["evaluate={name: a, prompts: 1}"],
            "evaluate: this is a list, also of one; write [{'name': 'a', 'prompts': 1}]",
        ),
        (["evaluate=[{name: a, prompts: 1}, {name: a, prompts: 2}]"], "two sets of evaluate are called 'a'"),
        (["evaluate=[{name: a, prompts: 1, samples: 2, k: [4]}]"], "pass@4 needs that many answers, and samples=2"),
        (["evaluate=[{name: a, prompts: 1, k: [0]}]"], "pass@0"),
        (["evaluate=[{name: a, prompts: 1, max_new_tokens: 100}]"], "max_new_tokens of evaluate=100 do not fit"),
        (["evaluate=[{name: a, prompts: 1, rewards: exact}]"], "there is no verifier 'exact'"),
        ([f"{BEST}=eval/a/pass@1"], "no score of this run; write a set under evaluate"),
        (["evaluate=[{name: a, prompts: 1}]", f"{BEST}=eval/a/pass@2"], "there are eval/a/reward, eval/a/pass@1"),
        (["evaluate=[{name: a, prompts: 1}]", f"{BEST}=eval/a/pass@1"], "set checkpoint.every_steps"),
        (
            ["evaluate=[{name: a, prompts: 1, min_p: 0.1}]", "server.deterministic=true"],
            "dies of min_p with seeds; set min_p=0 for the set a",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_write(overrides, words):
    with pytest.raises(ConfigError) as error:
        load_config("configs/quickstart.yaml", overrides)
    assert words in str(error.value)


def test_a_best_score_that_no_verifier_gives_is_refused(open_quickstart):
    with pytest.raises(DataError, match="majority@4 needs a verifier that compares an answer"):
        open_quickstart(
            "evaluate=[{name: a, prompts: 1, samples: 4, rewards: {kind: regex, pattern: a}}]",
            "checkpoint={every_steps: 1, best: {score: eval/a/majority@4}}",
        )
