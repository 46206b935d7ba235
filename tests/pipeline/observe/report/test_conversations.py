"""A conversation in the report, in a real browser: turns, what is folded, and what has a colour."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.objectives import ObjectiveConfig, resolve
from pipeline.observe.report.page import write_report
from pipeline.types import Group, Prompt
from tests.support.browser import CONTRAST, CONTRAST_OF, Browser, new_page
from tests.support.episodes import conversation, step_result
from tests.support.runs import MadeRun, metrics, routing

TALK = [["(12*3)<|eos|>", "<|tool|>36<|assistant|>", "36?<|eos|>"], ["36<|eos|>"]]
LONG = [text for _ in range(3) for text in ("7" * 400 + "<|eos|>", "<|tool|>" + "8" * 400 + "<|assistant|>")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One step of a conversation of three turns in two rollouts, and a long one without rewards of turns."""
    made = MadeRun(tmp_path_factory.mktemp("conversations"))
    calls = [[("look", '{"x": 12}', "36"), ("see", '{"y": "<b>"}', "8" * 90)], [], []]
    told = conversation(made.tokenizer, TALK, 1, reward=1.5, turn_rewards=(0.0, 0.5, 1.0), calls=calls)
    long = conversation(made.tokenizer, [[*LONG, "9<|eos|>"]], 1, reward=0.0)
    group = Group(Prompt(np.zeros(1, np.int32), "<|user|>12*3<|assistant|>", {"answer": "36"}), (told, long))
    rows = [r.rollout_logprobs for r in group.rollouts]
    advantages = [np.where(r.turn_numbers == 0, -0.5, 0.25).astype(np.float32) for r in group.rollouts]
    result = step_result(1, [group], [row + np.float32(0.02) for row in rows], rows, rows, advantages, routing(1))
    made.directory.record(metrics(1))
    made.directory.write_step(result, resolve(ObjectiveConfig(preset="grpo", credit="turn")), made.tokenizer)
    made.directory.finish()
    return made.path


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    with new_page(tmp_path_factory.mktemp("profile")) as page:
        yield Browser(page).look_at(write_report(run))


def test_earlier_turns_are_folded_into_a_line_with_reward_advantage_what_was_said_and_the_reply(page):
    card = page.locator(".card").nth(0)
    folded = card.locator("details.turn")
    assert folded.count() == 2
    assert [folded.nth(k).get_attribute("open") for k in range(2)] == [None, None]
    first, second = (folded.nth(k).locator("> summary").inner_text() for k in range(2))
    assert first == "Turn 1, reward 0, advantage -0.5: (12*3)<|eos|> \u2192 <|tool|>36<|assistant|>"
    assert second == "Turn 2, reward 0.5, advantage +0.25: 36?<|eos|>"
    assert card.locator("p.turn").inner_text() == "Turn 3, reward 1, advantage -0.5, in a rollout of its own:"
    shown = [card.locator(".answer").nth(k).is_visible() for k in range(3)]
    assert shown == [False, False, True]
    assert card.locator(".answer").nth(2).inner_text() == "36<|eos|>"
    assert "turns 3" in card.inner_text().replace("\n", " ")


def test_a_folded_turn_opens_and_only_what_the_policy_said_has_colours(page):
    turn = page.locator(".card").nth(0).locator("details.turn").nth(0)
    turn.locator("> summary").click()
    assert turn.locator(".answer").inner_text() == "(12*3)<|eos|>"
    turn.locator("details.call").last.locator("summary").click()
    assert turn.locator(".reply").last.inner_text() == "<|tool|>36<|assistant|>"
    assert turn.locator(".reply .token").count() == 0
    shade = "e => getComputedStyle(e).backgroundColor"
    assert turn.locator(".token").first.evaluate(shade) != "rgba(0, 0, 0, 0)"
    assert turn.locator(".reply").last.evaluate(shade) == "rgba(0, 0, 0, 0)"
    page.select_option("#colouring", "s")
    assert turn.locator(".token").last.evaluate(shade) != "rgba(0, 0, 0, 0)"
    page.select_option("#colouring", "m")
    for selector in (".reply", "summary", ".token"):
        assert turn.locator(selector).first.evaluate(CONTRAST_OF) >= CONTRAST


def test_each_call_of_a_tool_is_folded_with_its_result_and_opens_by_itself(page):
    turn = page.locator(".card").nth(0).locator("details.turn").nth(0)
    if turn.get_attribute("open") is None:
        turn.locator("> summary").click()
    calls = turn.locator("details.call")
    lines = [calls.nth(k).locator("summary").inner_text() for k in range(calls.count())]
    assert lines[0] == 'look: {"x": 12} \u2192 36'
    assert lines[1] == f'see: {{"y": "<b>"}} \u2192 {"8" * 60}\u2026'
    assert len(lines) == 3  # and what it was told, as tokens
    assert [calls.nth(k).get_attribute("open") for k in range(2)] == [None, None]
    calls.nth(1).locator("summary").click()
    assert calls.nth(1).locator(".reply").all_inner_texts() == ['{"y": "<b>"}', "8" * 90]
    assert not calls.nth(0).locator(".reply").first.is_visible()
    assert calls.locator(".token").count() == 0
    assert page.locator(".card").nth(0).locator("details.turn").nth(1).locator("details.call").count() == 0


def test_of_a_long_conversation_every_turn_is_there_and_what_is_left_out_is_counted(page):
    card, share = page.locator(".card").nth(1), 512 // 7
    assert card.locator("details.turn").count() == 3
    for turn in card.locator("details.turn").all():
        turn.locator("> summary").click()
        assert turn.locator(".token").count() == share
        assert len(turn.locator("> summary").inner_text()) < 250
    more = card.locator("details.turn").first.locator(".more").all_inner_texts()
    assert more == [f"{401 - share} more tokens are not shown.", f"{402 - share} more tokens of others are not shown."]
    assert card.locator("p.turn").inner_text() == "Turn 4, advantage +0.25:"
    assert card.locator(".answer").last.inner_text() == "9<|eos|>"
    assert page.evaluate("document.documentElement.scrollWidth") <= 1366
