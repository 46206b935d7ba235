import json
from datetime import date, datetime, timedelta
from decimal import Decimal

import pytest

from pipeline.config.sources import JsonlSource
from pipeline.data.chat import DataError
from pipeline.data.tables.row_reader import RowReader, as_json, as_text, columns_of, filled


def read(record, **fields):
    return RowReader(JsonlSource.model_validate({"path": "x.jsonl"} | fields), "x")(record, 4, "x.jsonl, line 5")


def said(asked):
    return [(message["role"], message["content"]) for message in asked.messages]


def test_a_row_without_a_mapping_has_a_prompt_and_an_answer():
    asked = read({"prompt": "1+1", "answer": "2", "level": 3})
    assert said(asked) == [("user", "1+1")]
    assert (asked.answer, asked.metadata) == ("2", {"answer": "2", "level": 3})
    assert (asked.where, asked.origin) == ("x.jsonl, line 5", "x:4")


def test_columns_may_lie_inside_objects_and_a_prompt_may_be_messages():
    record = {"prompt": [{"role": "user", "content": "1+1", "name": None}], "reward_model": {"ground_truth": "2"}}
    asked = read(record, columns={"answer": "reward_model.ground_truth"})
    assert asked.messages == [{"role": "user", "content": "1+1"}]
    assert asked.metadata == {"reward_model": {"ground_truth": "2"}, "answer": "2"}


def test_a_column_with_a_dot_in_its_name_is_found_before_one_inside_an_object():
    assert read({"prompt": "1", "a.b": "x", "a": {"b": "y"}}, columns={"answer": "a.b"}).answer == "x"


@pytest.mark.parametrize(
    ("value", "text"),
    [(42, "42"), (42.0, "42"), (-0.5, "-0.5"), (1e300, "1e+300"), (10**30, "1" + "0" * 30), ("007", "007")],
)
def test_a_number_is_an_answer_as_a_person_writes_it(value, text):
    assert read({"prompt": "1", "answer": value}).answer == text == as_text(value)


def test_a_template_takes_any_column_and_leaves_other_braces():
    template = "{question}\nWrite \\boxed{} around it, as \\boxed{{answer}}, {{like this}}. {meta.unit}"
    record = {"question": "1+1", "meta": {"unit": 7}}
    assert filled(template, record) == "1+1\nWrite \\boxed{} around it, as \\boxed{answer}, {like this}. 7"
    assert columns_of(template) == {"question", "meta.unit"}
    assert said(read(record | {"answer": "2"}, prompt_template=template))[0][1].startswith("1+1\nWrite")


def test_a_template_does_not_fill_what_a_row_says():
    assert filled("{a}", {"a": "{b}", "b": "no"}) == "{b}"


def test_an_answer_is_taken_out_by_its_pattern():
    answer = "48/2 = <<48/2=24>>24 clips.\n#### 1,072"
    assert read({"prompt": "1", "answer": answer}, answer_pattern=r"####\s*(.+)").answer == "1,072"
    with pytest.raises(DataError, match=r"answer_pattern '#### \(\.\+\)' finds nothing in 'no idea'"):
        read({"prompt": "1", "answer": "no idea"}, answer_pattern="#### (.+)")


@pytest.mark.parametrize(("pattern", "sentence"), [("####", "has no group"), ("(", "is no regular expression")])
def test_a_pattern_that_finds_no_answer_ever_is_refused(pattern, sentence):
    with pytest.raises(DataError, match=sentence):
        read({"prompt": "1", "answer": "1"}, answer_pattern=pattern)


def test_rows_may_have_no_answer():
    asked = read({"prompt": "write a poem"}, columns={"answer": None}, metadata={"judge": "poems"})
    assert (asked.answer, asked.metadata) == (None, {"judge": "poems"})


def test_what_verifiers_get_is_chosen_and_json_in_text_is_read():
    tests = {"inputs": ["1\n"], "outputs": ["2\n"]}
    record = {"question": "add 1", "input_output": json.dumps(tests), "solutions": ["..."], "id": 3}
    columns = {"prompt": "question", "answer": None}
    asked = read(record, columns=columns, json_columns=["input_output"], keep={"tests": "input_output", "number": "id"})
    assert asked.metadata == {"tests": tests, "number": 3}
    with pytest.raises(DataError, match='lacks "tests", which `keep` names; it has question'):
        read(record, columns=columns, keep={"tests": "tests"})
    with pytest.raises(DataError, match='"solutions" is no JSON'):
        read(record, columns=columns, json_columns=["solutions"])
    with pytest.raises(DataError, match='"x" is no JSON: NaN is none of its values'):
        read({"question": "1", "x": "[NaN]"}, columns=columns, json_columns=["x"])


def test_tools_come_as_a_list_or_as_text():
    tools = [{"name": "search"}]
    for column in (tools, json.dumps(tools)):
        asked = read({"prompt": "1", "answer": "1", "t": column}, columns={"tools": "t"})
        assert asked.tools == tools
        assert "t" not in asked.metadata
    with pytest.raises(DataError, match='"t" is a list of JSON schemas'):
        read({"prompt": "1", "answer": "1", "t": {"name": "search"}}, columns={"tools": "t"})


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (float("nan"), None),
        ((1, [2.5]), [1, [2.5]]),
        (datetime(2026, 1, 2, 3), "2026-01-02T03:00:00"),
        (date(2026, 1, 2), "2026-01-02"),
        (Decimal("1.50"), "1.50"),
        (timedelta(seconds=3), "0:00:03"),
        ({"a": {"b": None}}, {"a": {"b": None}}),
    ],
)
def test_a_value_of_a_data_set_is_what_json_gives_back(value, kept):
    assert as_json(value, "c") == kept
    assert json.loads(json.dumps(as_json(value, "c"), allow_nan=False)) == kept


@pytest.mark.parametrize("value", [b"x", [{"a": b"x"}], float("inf"), object()])
def test_what_json_does_not_hold_is_named_by_its_column(value):
    with pytest.raises(DataError, match='"c" holds'):
        as_json(value, "c")
