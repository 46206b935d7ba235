"""math_pairs.tsv: what is right, a response, and the verdict on it with its reason. The grader comes to the same."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipeline.rewards import Component, Grader, Question
from pipeline.rewards.kinds.math_verify import as_box, last_box, plain_digits
from pipeline.types import Prompt

LIMIT_S, SHORT_S = 60.0, 2.0
IDS = np.zeros(2, np.int32)


def component(timeout_s=LIMIT_S, **settings):
    return Component("math_verify", {"kind": "math_verify", **settings}, timeout_s=timeout_s)


def question(answer, response, finish_reason="stop"):
    return Question(Prompt(IDS, "a question", {"answer": answer}, 0), response, IDS, finish_reason)


def rows():
    with (Path(__file__).parent / "math_pairs.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def test_the_table_has_three_hundred_pairs_of_each_awkward_kind_with_both_verdicts():
    table = rows()
    assert len({(row["answer"], row["response"]) for row in table}) == len(table) >= 300
    assert all(row["reason"] for row in table)
    kinds = Counter(row["kind"] for row in table)
    for kind in ("fraction", "set", "interval", "unit", "percent", "separator", "prose", "long integer"):
        assert kinds[kind] >= 9
        assert {row["verdict"] for row in table if row["kind"] == kind} == {"right", "wrong"}
    assert {row["verdict"] for row in table if row["kind"] == "never ends"} == {"timeout"}


def test_the_grader_agrees_with_the_table():
    table = [row for row in rows() if row["verdict"] != "timeout"]
    with Grader([component()], workers=2) as grader:
        verdicts = grader.ask([question(row["answer"], row["response"]) for row in table])
    said = [{1.0: "right", 0.0: "wrong"}.get(v.reward, f"{v.kind}: {v.what}") for v in verdicts]
    others = [(row, word) for row, word in zip(table, said, strict=True) if row["verdict"] != word]
    assert others == []


def test_an_expression_that_never_ends_is_stopped_at_its_limit_and_costs_no_other_answer():
    table = [row for row in rows() if row["verdict"] == "timeout"]
    asked = [pair for row in table for pair in (question(row["answer"], row["response"]), question("1", "1"))]
    with Grader([component(SHORT_S)], workers=2) as grader:
        grader.wait_ready()
        verdicts = grader.ask(asked)
    assert [v.kind for v in verdicts[::2]] == ["timeout"] * len(table)
    assert [v.reward for v in verdicts[1::2]] == [1.0] * len(table)
    assert max(v.seconds for v in verdicts) < SHORT_S + 7.0  # on a busy machine


def test_an_answer_that_is_no_expression_is_a_failure_and_a_response_that_is_none_is_wrong():
    with Grader([component()], workers=1) as grader:
        verdicts = grader.ask([question("", "1"), question("1", ""), question("1", r"\boxed{1}", "length")])
    assert verdicts[0].what.startswith("raised ValueError: math-verify finds no expression in the answer ''")
    assert [v.reward for v in verdicts[1:]] == [0.0, 0.0]


def test_only_a_box_counts_where_that_is_asked_for():
    with Grader([component(boxed=True)], workers=1) as grader:
        verdicts = grader.ask(
            [question("5", "The answer is 5"), question("5", r"\boxed{5}"), question("5", r"\fbox{5}")]
        )
    assert [v.reward for v in verdicts] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1}, \boxed{\frac{1}{2}} end", r"\frac{1}{2}"),
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed {\{1\}}", r"\{1\}"),
        ("1", None),
    ],
)
def test_the_last_box_that_closes_counts(text, content):
    assert last_box(text) == content


def test_an_answer_is_read_whole():
    assert as_box("$x+1$") == as_box(r"\(x+1\)") == as_box("x+1") == r"\boxed{x+1}"
    assert as_box(r"\$18") == r"\boxed{\$18}"
    assert plain_digits(r"1\,000{,}000 and 1\,2") == r"1000000 and 1\,2"
