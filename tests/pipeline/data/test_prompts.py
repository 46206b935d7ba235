import json

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.config.data import DataConfig, SyntheticTaskConfig
from pipeline.data.chat import DataError
from pipeline.data.prompts import PromptSource

TASK = SyntheticTaskConfig(min_digits=2, max_digits=3)
ROWS = [{"prompt": f"{n}+1", "answer": str(n + 1), "source": "made"} for n in range(5)]


@pytest.fixture
def source(model_directory):
    return lambda seed=0, stream="train", **fields: PromptSource(
        DataConfig(**fields), model_directory, seed=seed, stream=stream
    )


@pytest.fixture
def jsonl(tmp_path):
    def write(*lines):
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
        return path

    return write


def texts(prompts):
    return [p.text for p in prompts]


def test_prompts_go_on_where_the_last_call_ended(source):
    stream = source(task=TASK)
    first, second = stream.take(3), stream.take(4)
    assert [p.index for p in first + second] == list(range(7))
    assert texts(source(task=TASK).take(7)) == texts(first + second)


@pytest.mark.parametrize("kind", ["task", "path"])
def test_a_restored_cursor_gives_what_would_have_come_next(kind, source, jsonl):
    fields = {"task": TASK} if kind == "task" else {"path": jsonl(*ROWS)}
    stream, again = source(**fields), source(**fields)
    stream.take(4), stream.take_supervised(7)
    again.restore(json.loads(json.dumps(stream.state())))
    assert texts(again.take(6)) == texts(stream.take(6))
    expected = [p.tokens.tolist() for p in stream.take_supervised(6)]
    assert [p.tokens.tolist() for p in again.take_supervised(6)] == expected
    assert again.state() == stream.state() == {"prompts": 10, "supervised": 13}


@pytest.mark.parametrize("state", [{}, {"prompts": 1}, {"prompts": -1, "supervised": 0}])
def test_a_state_of_another_kind_is_refused(state, source):
    with pytest.raises(ValueError, match="two counts"):
        source(task=TASK).restore(state)


def test_a_failed_take_does_not_move_the_cursor(source):
    stream = source(task=SyntheticTaskConfig(min_digits=8, max_digits=8), max_prompt_tokens=9)
    with pytest.raises(DataError, match=r"prompt 0 has 10 tokens, the limit is 9; raise data\.max_prompt_tokens"):
        stream.take(1)
    assert stream.state()["prompts"] == 0


def test_answers_stop_at_the_models_end_of_sequence(source, model_directory):
    stream = source(task=TASK)
    assert stream.stop_token_ids == (stream.tokenizer.eos_token_id,)
    assert stream.take_supervised(1)[0].answer_ids[-1] == stream.tokenizer.eos_token_id


def test_the_held_out_stream_of_a_task_is_another(source):
    train = {p.metadata["question"] for p in source(task=TASK).take(300)}
    held_out = {p.metadata["question"] for p in source(task=TASK, stream="held_out").take(50)}
    assert not train & held_out


def test_a_file_is_read_once_an_epoch_in_another_order_each(source, jsonl):
    stream = source(path=jsonl(*ROWS))
    epochs = [texts(stream.take(5)) for _ in range(6)]
    expected = sorted(f"<|user|>{n}+1<|assistant|>" for n in range(5))
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [p.index for p in stream.take(2)] == [30, 31]


def test_an_unshuffled_file_keeps_its_order_and_its_other_keys(source, jsonl):
    prompts = source(path=jsonl(*ROWS), shuffle=False).take(6)
    assert [p.metadata["answer"] for p in prompts] == ["1", "2", "3", "4", "5", "1"]
    assert prompts[0].metadata == {"answer": "1", "source": "made"}


def test_messages_go_through_the_chat_template(source, jsonl):
    messages = [{"role": "system", "content": "add"}, {"role": "user", "content": "1+1"}]
    (prompt,) = source(path=jsonl({"messages": messages, "answer": "2"})).take(1)
    assert prompt.text == "<|system|>add<|user|>1+1<|assistant|>"
    assert prompt.ids.dtype == np.int32


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"prompt": "1"', "not JSON"),
        ("[1]", "holds an object"),
        ({"answer": "1"}, 'exactly one of the keys "prompt" and "messages"'),
        ({"prompt": "1", "messages": [], "answer": "1"}, "exactly one of the keys"),
        ({"prompt": "1"}, 'needs the key "answer"'),
        ({"prompt": "1", "answer": 1}, "write a number in quotes"),
        ({"prompt": 1, "answer": "1"}, '"prompt" is a text'),
        ({"messages": [], "answer": "1"}, '"prompt" is a text'),
        ({"messages": [{"role": "user"}], "answer": "1"}, '"messages" a list of'),
        ({"messages": [{"role": "tool", "content": "1"}], "answer": "1"}, "chat template refused"),
        ({"prompt": "É", "answer": "1"}, "no token for some character"),
        ({"prompt": "1" * 30, "answer": "1"}, "has 32 tokens, the limit is 20"),
    ],
)
def test_a_bad_line_is_named_before_anything_starts(line, sentence, source, jsonl):
    with pytest.raises(DataError, match=f"data.jsonl, line 3:? .*{sentence}"):
        source(path=jsonl(ROWS[0], "", line), max_prompt_tokens=20)


def test_a_missing_and_an_empty_file_are_named(source, jsonl, tmp_path):
    with pytest.raises(DataError, match=r"there is no data file .*nowhere\.jsonl"):
        source(path=tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="holds no prompts"):
        source(path=jsonl("", " "))


def test_a_file_has_no_held_out_stream(source, jsonl):
    with pytest.raises(DataError, match="give another file"):
        source(path=jsonl(*ROWS), stream="held_out")


@pytest.mark.parametrize("fields", [{}, {"task": TASK, "path": "x.jsonl"}])
def test_exactly_one_origin_of_prompts(fields):
    with pytest.raises(ValidationError, match=r"exactly one of data\.task"):
        DataConfig(**fields)
