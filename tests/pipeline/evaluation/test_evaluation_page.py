"""The table and the page of an evaluation say what it came to."""

from __future__ import annotations

import asyncio

import pytest

from pipeline.config import load_config
from pipeline.evaluation.answering import ask
from pipeline.evaluation.page import pass_rates, table, write_page
from pipeline.evaluation.result import evaluation_of
from pipeline.rollout.grading import OwnGraders


@pytest.fixture
def found(three, fake_servers):
    """Question i has i right answers of four."""
    config = load_config("configs/quickstart.yaml")
    with OwnGraders(three.tokenizer).open(three.rewards, config.grading) as grading:
        answers = asyncio.run(ask(three, fake_servers(), grading, at_once=12))
    return evaluation_of(three, answers, step=0, version=3, seconds=1.0)


def test_the_table_has_each_score_with_its_interval(found):
    lines = table([found]).splitlines()
    assert lines[0].split() == ["set", "score", "value", "95%", "interval", "questions", "length", "cut"]
    row = next(line for line in lines if "pass@4" in line).split()
    score = found.scores["pass@4"]
    assert row == ["pass@4", "0.667", f"{score.low:.3f}", "to", f"{score.high:.3f}", "3"]


def test_pass_rates_are_in_as_many_bars_as_a_question_may_have_rates(found):
    bars = pass_rates(found).plot.data[0]
    assert list(bars.x) == [0, 0.25, 0.5, 0.75, 1]
    assert list(bars.y) == [1, 1, 1, 0, 0]


def test_text_of_a_model_is_only_text_on_the_page(found, tmp_path):
    found.answers[0]["response"] = "<script>alert(1)</script>"
    write_page([found], tmp_path / "page.html", name="a <b>model</b>")
    page = (tmp_path / "page.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>alert(1)" not in page
    assert "a &lt;b&gt;model&lt;/b&gt;" in page
    assert "0.667" in page
