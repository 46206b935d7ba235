from __future__ import annotations

import pytest

from pipeline.environments.turn_parser import ParserError, Said, TurnParser
from tests.support.served import TOOL


@pytest.mark.parametrize(
    ("parser", "field"),
    [(TurnParser(tools="qwen99"), "tool_parser"), (TurnParser(thinking="qwen99"), "reasoning_parser")],
)
def test_a_parser_that_is_not_sglangs_is_refused_with_those_that_are(parser, field):
    with pytest.raises(ParserError, match=rf"environment\.{field}=qwen99.*qwen"):
        parser.load()


def test_without_a_parser_all_is_content():
    assert TurnParser().parse("<think>a</think>", [{"function": {"name": "f"}}]) == Said("<think>a</think>")


@pytest.mark.parametrize(
    ("name", "told"),
    [("mistral", "c00002001"), ("kimi_k2", "functions.look:4"), ("kimi_k3", "look:4"), (None, "c00002001")],
)
def test_ids_of_calls_are_what_the_models_templates_take(name, told):
    assert TurnParser(name).call_id(2, 1, 3, "look") == told


@pytest.mark.parametrize("text", ['<|python_tag|>["look"]', "<|python_tag|>" + "[" * 3000])
def test_what_a_parser_raises_at_is_a_turn_without_calls(text, caplog):
    """SGLang's own parser takes a list of texts for a list of calls, and reads brackets until the stack is full."""
    parser = TurnParser("llama3")
    assert parser.parse(text, [TOOL]) == Said(text)
    assert "found no calls in" in caplog.text
    stream = parser.stream([TOOL])
    for part in (text[:20], text[20:]):
        stream.take(part)
    stream.end()
    assert (stream.said.content, stream.said.calls) == (text, ())
