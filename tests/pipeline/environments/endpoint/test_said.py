from __future__ import annotations

import pytest

from pipeline.environments.endpoint.chat_request import ChatMessage
from pipeline.environments.endpoint.said import rest, to_message, tool_call, wants_text
from pipeline.environments.templates import TemplateWriter
from pipeline.types import Opening
from tests.support.templates import FAMILIES, tokenizer_of

SAID = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "", "tool_calls": [tool_call("c1", "look", '{"x": 1, "y": 2}', as_text=False)]},
    {"role": "tool", "tool_call_id": "c1", "content": "3"},
]
NEW = {"role": "user", "content": "more"}


def sent(**change):
    """SAID as a client sends it back, and NEW; change: fields of the assistant's message."""
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"y":2,"x":1}'}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]} | change
    return [to_message(ChatMessage.model_validate(m), as_text=False) for m in (SAID[0], answer, SAID[2], NEW)]


@pytest.mark.parametrize(
    "change", [{}, {"content": ""}, {"content": []}, {"refusal": None, "annotations": []}, {"reasoning_content": "hm"}]
)
def test_what_means_the_same_goes_on(change):
    assert rest(SAID, sent(**change)) == [NEW]


@pytest.mark.parametrize(
    "change",
    [
        {"content": "x"},
        {"tool_calls": None},
        {"tool_calls": [{"id": "c2", "function": {"name": "look", "arguments": '{"y":2,"x":1}'}}]},
        {"tool_calls": [{"id": "c1", "function": {"name": "look", "arguments": '{"y":2,"x":3}'}}]},
        {"tool_calls": [{"id": "c1", "function": {"name": "see", "arguments": '{"y":2,"x":1}'}}]},
        {"tool_calls": [{"id": "c1", "function": {"name": "look", "arguments": "no JSON"}}]},
        {"role": "user", "tool_calls": None},
    ],
)
def test_what_means_something_else_does_not(change):
    assert rest(SAID, sent(**change)) is None


def test_fewer_messages_than_were_said_do_not_go_on_and_the_same_ones_have_no_rest():
    assert rest(SAID, SAID[:2]) is None
    assert rest(SAID, SAID) == []


@pytest.mark.parametrize(("name", "text"), [("deepseek-v3", True), ("kimi-k2", False), ("glm-4.5", False)])
def test_arguments_reach_a_template_in_the_form_that_it_takes(name, text, tmp_path):
    tokenizer = tokenizer_of(FAMILIES[name], tmp_path)
    writer = TemplateWriter(tokenizer, Opening(({"role": "user", "content": "q"},)), [1])
    assert wants_text(writer) is text
    call = tool_call("c1", "look", '{"x": 1}', as_text=text)
    assert "look" in writer.render([SAID[0], {"role": "assistant", "content": "", "tool_calls": [call]}]) or not text
