"""Programs and their tests, in all the forms that data sets have, in a real sandbox."""

from __future__ import annotations

import json

import pytest

from pipeline.rewards import Component, Question
from pipeline.rewards.kinds.code import program_in
from pipeline.rewards.program_tests import Call, read_tests, same_output, same_value
from pipeline.rewards.registry import load
from pipeline.rewards.sandbox.calls import values_of
from pipeline.types import Prompt
from tests.support.programs import LIMITS, question

SQUARE = "def square(n):\n    print('noise')\n    return n * n\n"


def settings(**more):
    return {"kind": "code", "tests": "tests", "share": False, "sandbox": LIMITS} | more


@pytest.fixture(scope="module")
def grade():
    verifier = load(Component("code", settings()))

    def ask(program, tests, finish_reason="stop"):
        ids = question("").response_ids
        return verifier(
            Question(Prompt(ids, "", {"tests": tests}, 0), f"So:\n```python\n{program}\n```", ids, finish_reason)
        )

    return ask


FORMS = {
    "lists": {"fn_name": "square", "inputs": [[3], [-2]], "outputs": [9, 4]},
    "lists of one": {"fn_name": "square", "inputs": [[3], [-2]], "outputs": [[9], [4]]},
    "pairs": [{"fn_name": "square", "input": [3], "output": 9}, {"fn_name": "square", "input": [-2], "output": 4}],
    "texts": [{"fn_name": "square", "input": "3", "output": "9"}],
    "asserts": ["assert square(3) == 9", "assert square(-2) == 4", "assert not square(0)", "assert square(2) == 4"],
}


@pytest.mark.parametrize("form", FORMS)
def test_a_function_is_called_and_what_it_returns_compared(grade, form):
    for tests in (FORMS[form], json.dumps(FORMS[form])):
        assert grade(SQUARE, tests) == 1.0
    assert grade(SQUARE.replace("n * n", "n * n + 1"), FORMS[form]) == 0.0


@pytest.mark.parametrize(
    "tests", [{"inputs": ["3\n", "4\n"], "outputs": ["9", "16\n\n"]}, [{"input": "3", "output": "9"}]]
)
def test_a_program_reads_and_prints(grade, tests):
    assert grade("print(int(input()) ** 2)", tests) == 1.0
    assert grade("print(9)", {"inputs": ["3", "4"], "outputs": ["9", "16"]}) == 0.0
    assert grade("print(int(input()) ** 2)", tests, "length") == 0.0


@pytest.mark.parametrize(
    "program",
    [
        "class Equal:\n    def __eq__(self, other): return True\ndef square(n): return Equal()",
        "import json\njson.dumps = lambda value: '{\"value\": true}'\ndef square(n): return 0",
        "def square(n):\n    raise SystemExit(0)",
        "import os\nos._exit(0)",
        "print('{\"value\": 4}')\ndef square(n): pass",
        "def square(n): return True",
        "square = 9",
        "def square(n): return '9'",
        "def square(n): return [9] * 10**6",
        "x = []\nx.append(x)\ndef square(n): return x",
    ],
)
def test_a_program_that_does_not_compute_it_cannot_talk_its_way_to_a_reward(grade, program):
    assert grade(program, ["assert square(3) == 9", "assert square(1) == 1"]) == 0.0


def test_values_come_back_as_they_are(grade):
    program = "def give(kind):\n    return {'t': (1, 2.5), 's': {3, 1}, 'd': {1: 'a'}, 'n': None, 'f': 0.1 + 0.2}[kind]"
    tests = ["assert give('t') == (1, 2.5)", "assert give('s') == {1, 3}", "assert give('d') == {1: 'a'}"]
    tests += ["assert give('n') is None", "assert give('f') == 0.3"]
    assert grade(program, tests) == 1.0


@pytest.mark.parametrize(
    ("value", "right", "same"),
    [
        (True, 1.0, False),
        (1.0, True, False),
        (1, True, False),
        (1, 1.0, True),
        (0.1 + 0.2, 0.3, True),
        (0.3001, 0.3, False),
        ("1", 1, False),
        ([1, 2], (1, 2), True),
        ([9], [9], True),
        (9, [9], True),  # data sets write what is right in a list of its own
        (9, [9, 9], False),
        (10**400, 1.0, False),
    ],
)
def test_a_value_is_compared_by_its_kind_and_decimals_nearly(value, right, same):
    assert same_value(value, Call(right)) is same


def test_a_method_of_a_solution_is_called_as_a_function(grade):
    program = "class Solution:\n    def square(self, n):\n        return n * n"
    assert grade(program, FORMS["lists"]) == 1.0


def test_a_share_of_the_tests_may_count():
    verifier = load(Component("code", settings(share=True)))
    asked = question("n = int(input())\nprint(49 if n == 7 else 0)")
    asked.prompt.metadata["tests"] = {"inputs": ["7", "2", "3", "7"], "outputs": ["49", "4", "9", "49"]}
    assert verifier(asked) == 0.5
    asked.prompt.metadata["tests"] = ["assert f(1) == 1", "assert f(2) == 3"]
    calls = Question(asked.prompt, "```\ndef f(n): return n\n```", asked.response_ids, "stop")
    assert verifier(calls) == 0.5


def test_all_tests_together_have_a_time_and_what_comes_later_is_wrong():
    limits = LIMITS | {"wall_s": 0.6, "total_s": 1.0, "cpu_s": 5}
    verifier = load(Component("code", settings(share=True, sandbox=limits)))
    asked = question("input()\nprint(49)\nimport time\ntime.sleep(0 if input() == 'quick' else 99)")
    asked.prompt.metadata["tests"] = {"inputs": ["7\nslow", "7\nslow", "7\nquick"], "outputs": ["49"] * 3}
    assert verifier(asked) == 0.0


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("nothing", "the tests are no JSON: 'nothing'"),
        ([], "tests are a list of at least one"),
        ({"inputs": ["1"], "outputs": []}, "tests need as many inputs as outputs"),
        ([{"input": "1"}], 'a test has the keys "input" and "output"'),
        (["assert f(1) == g(1)"], "a test that is a text reads `assert call == value` with a literal"),
        (["f(1)"], "a test that is a text reads"),
        (["assert f("], "a test that is a text reads"),
        ([{"fn_name": "f", "input": "x y", "output": "1"}], "the arguments of a call are a list, or JSON a line"),
        ([{"fn_name": "f", "input": 3, "output": 1}], "the arguments of a call are a list"),
    ],
)
def test_tests_of_no_form_are_named(tests, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        read_tests(tests)


@pytest.mark.parametrize(
    ("printed", "right", "same"),
    [
        ("1 2\n", "1 2", True),
        ("1  \n2\n\n", "1\n2", True),
        ("0.5", "0.50", True),
        ("0.3333333", "0.33333333", True),
        ("1", "2", False),
        ("7", "007", False),
        ("1\n2", "1", False),
        ("yes", "YES", False),
        ("", "1", False),
    ],
)
def test_what_is_printed_is_compared_line_by_line_and_decimals_by_their_values(printed, right, same):
    assert same_output(printed, right) is same


def test_the_last_block_of_python_is_the_program():
    response = "```python\nprint(1)\n```\nor\n```py\nprint(2)\n```\noutput:\n```text\n2\n```"
    assert program_in(response) == "print(2)\n"
    assert program_in("print(3)") == "print(3)"
    assert program_in("```\nprint(4)\n```") == "print(4)\n"


def test_lines_that_are_no_answers_end_what_a_program_said():
    assert values_of('{"value": 1}\n[\n{"value": 2}') == [1]
    assert values_of("[" * 100_000) == []
    assert values_of('3\n{"raised": "X"}') == [NotImplemented, NotImplemented]
