import asyncio

import pytest

from pipeline.environments.tool_calls import calls_of
from tests.support.served import END, kimi_tokenizer, talk_of


def call(name, arguments, of=None):
    return {"id": of or name, "type": "function", "function": {"name": name, "arguments": arguments}}


def answer(content, of=None):
    return {"role": "tool", "content": content} | ({} if of is None else {"tool_call_id": of})


@pytest.mark.parametrize(
    ("calls", "answers", "found"),
    [
        ([], [answer("36")], (("tool", "(12*3)", "36"),)),
        ([], [], ()),
        ([call("look", {"x": 1})], [answer("36")], (("look", '{"x": 1}', "36"),)),
        (
            [call("look", '{"x": 1}', "a"), call("see", "{}", "b")],
            [answer("B", "b"), answer("A", "a")],
            (("look", '{"x": 1}', "A"), ("see", "{}", "B")),
        ),
        (
            [call("look", "{}", "a"), call("see", "{}", "b")],
            [answer("B", "b")],
            (("look", "{}", ""), ("see", "{}", "B")),
        ),
    ],
)
def test_a_call_has_its_result_by_its_id_else_by_its_place(calls, answers, found):
    message = {"role": "assistant", "content": "(12*3)"} | ({"tool_calls": calls} if calls else {})
    assert calls_of(message, answers) == found


@pytest.mark.parametrize(
    ("calls", "found"),
    [
        ([{"name": "look", "arguments": {"x": 1}}], (("look", '{"x": 1}', "36"),)),  # as templates read it too
        ([{"id": ["a"]}], (("tool", "", "36"),)),
        ([7, {"function": "look"}], (("tool", "7", "36"), ("tool", "look", ""))),
        ("look(1)", (("tool", "look(1)", "36"),)),
        ([call("look", {1})], (("look", "{1}", "36"),)),
    ],
)
def test_whatever_an_environment_sets_as_calls_can_be_shown(calls, found):
    assert calls_of({"role": "assistant", "tool_calls": calls}, [answer("36")]) == found
    assert calls_of({}, [{"role": "tool"}]) == (("tool", "", ""),)


def test_a_conversation_knows_the_calls_of_each_of_its_turns(tmp_path):
    async def run():
        made, _ = talk_of(kimi_tokenizer(tmp_path), [f"one{END}", f"two{END}", f"three{END}"])
        await made.sample()
        made.append([answer("1", "f"), answer("2", "g")])
        await made.sample()
        made.append([{"role": "user", "content": "more"}])
        turn = await made.sample()
        turn.message["tool_calls"] = [call("look", {"x": 3})]
        return made.calls

    assert asyncio.run(run()) == ((("tool", "one", "1"), ("tool", "one", "2")), (), (("look", '{"x": 3}', ""),))
