"""The example of a Python tool: programs of the policy run in the real sandbox, and what they print is its next turn's
context."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pipeline.rewards.kinds.function import import_from
from pipeline.types import Prompt
from tests.support.served import END, talk_of
from tests.support.templates import FAMILIES, tokenizer_of

FOLDER = "examples/python_tool"


@pytest.fixture(scope="module")
def tool():
    return import_from("python_tool", Path(FOLDER).resolve()).PythonTool(wall_s=3.0)


def led(tool, tmp_path, said):
    """(reward, conversation)"""

    async def run():
        talk, _ = talk_of(tokenizer_of(FAMILIES["smollm2"], tmp_path), [text + END for text in said])
        return await tool.run(talk, Prompt(talk._session.token_ids, "", {"answer": "36"})), talk

    return asyncio.run(run())


def told(talk):
    return [message["content"] for message in talk.messages if message["role"] == "tool"]


def test_what_a_program_prints_comes_back_and_the_turn_that_is_none_is_the_answer(tool, tmp_path):
    reward, talk = led(tool, tmp_path, ["print(12*3)", "36"])
    assert told(talk) == ["36"]
    assert reward.total() == 1
    assert reward.parts == {"right": 1, "programs": 1, "failed_programs": 0}


def test_a_program_that_fails_or_looks_around_is_told_so_and_the_conversation_goes_on(tool, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("36")
    reward, talk = led(tool, tmp_path, ["print(12*", f"print(open({str(secret)!r}).read())", "print('8' * 99)", "35"])
    assert told(talk) == ["error", "error", "8" * 16]
    assert reward.total() == 0
    assert reward.parts == {"right": 0, "programs": 3, "failed_programs": 2}
