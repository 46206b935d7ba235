"""Tokens get the colour of their decade."""

import pytest

from pipeline.observe.report.page import write_report
from pipeline.observe.report.rollouts import card, signed_level, surprise_level
from tests.support.runs import MadeRun

ROLLOUT = {
    "prompt": "p", "index": 3, "sample": 0, "samples": 2, "metadata": {"answer": "7"}, "reward": 1.0, "advantage": None,
    "finish_reason": "length", "versions": [4, 5], "length": 9, "text": ["a\n", "b"], "rollout": [-0.5, None],
    "proximal": [-0.25, -1.0], "current": [-0.25, -1.0], "entropy": [0.5, 0.5],
}  # fmt: skip


@pytest.mark.parametrize(
    ("log_ratio", "level"),
    [(0.0, 0), (9e-8, 0), (1.1e-7, 1), (-5e-7, -1), (2e-2, 6), (-2e-2, -6), (0.2, 7), (-30.0, -7), (None, 7)],
)
def test_a_log_ratio_has_the_level_of_its_decade(log_ratio, level):
    assert signed_level(log_ratio) == level


@pytest.mark.parametrize(("logprob", "level"), [(0.0, 0), (-0.05, 0), (-0.2, 1), (-1.0, 2), (-9.0, 6), (None, 6)])
def test_an_improbable_token_has_a_high_level(logprob, level):
    assert surprise_level(logprob) == level


def test_a_card_says_what_is_not_shown_and_what_is_no_number():
    made = card(ROLLOUT)
    (turn,) = made.turns
    assert (turn.title, turn.hidden, turn.reply) == ("", 7, "")
    assert dict(made.facts) == {
        "reward": "1", "advantage": "not finite", "ended by": "the limit", "tokens": "9", "sample": "1 of 2, prompt 3",
        "weights": "4, 5", "answer": "7",
    }  # fmt: skip
    first, second = turn.tokens
    assert first.text == "a\u23ce\n"
    assert first.classes == "m7 u0 s1"
    assert "trainer - server +2.50e-01" in first.title
    assert "server not finite" in second.title


def test_what_a_prompt_or_an_answer_holds_acts_neither_on_a_terminal_nor_on_the_page(tmp_path):
    run = MadeRun(tmp_path)
    run.write(1, prompt="<|user|>\x1b[2J\u202e\ud800</script><b>bold</b>")
    run.directory.close()
    text = (run.path / "rollouts" / "step_000001.txt").read_text(encoding="utf-8")
    page = write_report(run.path).read_text(encoding="utf-8")
    for written in (text, page):
        assert "\\x1b[2J\\u202e\\ud800" in written
        assert not {"\x1b", "\u202e"} & set(written.partition("<|user|>")[2][:2000])
    assert "&lt;/script&gt;&lt;b&gt;bold&lt;/b&gt;" in page
