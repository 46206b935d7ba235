import bz2
import gzip
import json
import shutil

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.config.data import DataConfig, SyntheticTaskConfig
from pipeline.data.chat import DataError, token_ids
from pipeline.data.prompts import PromptSource
from pipeline.data.tokenizer import load_tokenizer

TASK = SyntheticTaskConfig(min_digits=2, max_digits=3)
ROWS = [{"prompt": f"{n}+1", "answer": str(n + 1), "source": "made"} for n in range(5)]
GOOD = b'{"prompt": "1+1", "answer": "2"}\n'


@pytest.fixture
def source(model_directory):
    return lambda seed=0, part="train", say=print, **fields: PromptSource(
        DataConfig(**fields), model_directory, seed=seed, part=part, say=say
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
    assert again.state() == stream.state()
    assert (stream.state()["prompts"], stream.state()["supervised"]) == (10, 13)


@pytest.mark.parametrize(
    "state", [{}, {"prompts": 1}, {"prompts": -1, "supervised": 0}, {"prompts": 1, "supervised": 1, "sources": 3}]
)
def test_a_state_of_another_kind_is_refused(state, source):
    with pytest.raises(DataError, match="not what this version of sameroute saves"):
        source(task=TASK).restore(state)


def test_a_state_with_more_than_there_is_to_it_is_refused(source):
    stream = source(task=TASK)
    with pytest.raises(DataError, match="more keys than it has"):
        stream.restore(stream.state() | {"more": 1})


def test_a_failed_take_does_not_move_the_cursor(source):
    stream = source(task=SyntheticTaskConfig(min_digits=8, max_digits=8), max_prompt_tokens=9)
    with pytest.raises(DataError, match=r"question 0: the prompt has 10 tokens, the limit is 9; raise data\.max_p"):
        stream.take(1)
    assert stream.state()["prompts"] == 0


def test_answers_stop_at_the_models_end_of_sequence(source, model_directory):
    stream = source(task=TASK)
    assert stream.stop_token_ids == (stream.tokenizer.eos_token_id,)
    assert stream.take_supervised(1)[0].answer_ids[-1] == stream.tokenizer.eos_token_id


def test_the_held_out_stream_of_a_task_is_another(source):
    train = {p.metadata["question"] for p in source(task=TASK).take(300)}
    held_out = {p.metadata["question"] for p in source(task=TASK, part="held_out").take(50)}
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
        ('{"prompt": "1"', "not JSON: .*at column"),
        ('{"prompt": "1", "answer": "1"} {}', "not JSON: Extra data, at column 32"),
        ("{", "must stand on one line"),
        ('{"prompt": "1", "answer": "\\ud800"}', "half of a UTF-16 pair stands alone in 'answer'"),
        ('{"prompt": "\\udfff1", "answer": "1"}', "half of a UTF-16 pair stands alone in 'prompt'"),
        ('{"prompt": "1", "answer": "1", "more": {"x": ["\\ud83d"]}}', "half of a UTF-16 pair .* 'more'"),
        ('{"prompt": "1", "answer": "1", "\\ud83d": 1}', "half of a UTF-16 pair"),
        ('{"prompt": "1", "answer": "1", "n": ' + "9" * 5000 + "}", "an integer of 5,000 digits"),
        ('{"prompt": "1", "answer": "1", "n": -1e999}', "more than a float64 holds"),
        ('{"prompt": "1", "answer": "1", "n": NaN}', "NaN is no JSON; write null"),
        ('{"prompt": "1", "answer": "1", "n": [-Infinity]}', "-Infinity is no JSON"),
        ('{"prompt": "1", "answer": "1", "n": ' + "[" * 100 + "]" * 100 + "}", "nested more than 64 deep in 'n'"),
        ('{"prompt": "1", "answer": "1", "n": ' + '{"a":' * 9999 + "1" + "}" * 9999 + "}", "nested more than 64 deep"),
        ('{"prompt": "1", "answer": "1", "answer": "2"}', "the key 'answer' stands twice"),
        ('{"prompt": "1", "answer": "1", "n": {"a": 1, "a": 2}}', "the key 'a' stands twice"),
        ("[1]", "holds an object"),
        ({"answer": "1"}, 'exactly one of the keys "prompt" and "messages"'),
        ({"prompt": "1", "messages": [], "answer": "1"}, "exactly one of the keys"),
        ({"prompt": "1"}, 'needs the key "answer"'),
        ({"prompt": "1", "answer": [1]}, 'needs the key "answer", a text or a number'),
        ({"prompt": "1", "answer": True}, 'needs the key "answer", a text or a number'),
        ({"prompt": "1", "answer": " "}, "the answer is empty"),
        ({"prompt": 1, "answer": "1"}, '"prompt" is a text'),
        ({"messages": [], "answer": "1"}, '"prompt" is a text'),
        ({"messages": [{"role": "user"}], "answer": "1"}, '"messages" a list of'),
        ({"messages": [{"role": "robot", "content": "1"}], "answer": "1"}, "chat template refused"),
        ({"prompt": "É", "answer": "1"}, "no token for some character"),
        ({"prompt": "1" * 30, "answer": "1"}, "has 32 tokens, the limit is 20"),
    ],
)
def test_a_bad_line_is_named_before_anything_starts(line, sentence, source, jsonl):
    with pytest.raises(DataError, match=f"data.jsonl, line 3:? .*{sentence}"):
        source(path=jsonl(ROWS[0], "", line), max_prompt_tokens=20)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (GOOD + '{"prompt": "é", "answer": "1"}'.encode("latin-1"), "line 2: the byte 0xe9 is not UTF-8; .*iconv"),
        (GOOD + GOOD + b'{"prompt": "1\x001"}', "line 3: there is a NUL byte"),
        (GOOD.decode().encode("utf-16"), "line 1: the file is UTF-16.*iconv"),
        (GOOD.decode().encode("utf-16-le"), "line 1: there is a NUL byte; .* UTF-16 without its mark"),
        (GOOD.decode().encode("utf-32"), "line 1: the file is UTF-32"),
        (gzip.compress(GOOD, mtime=0), "line 1: the file is gzip, not text in UTF-8; unpack it"),
        (bz2.compress(GOOD), "line 1: the file is bzip2"),
        (b"PAR1\x15\x04", "line 1: the file is Parquet.*to_json"),
        (b"[\n" + GOOD + b"]\n", "line 1: not JSON: the object must stand on one line, without a list"),
        (b"", "holds no prompts"),
        (b"\xef\xbb\xbf\n \n", "holds no prompts"),
        ((GOOD + GOOD).replace(b"\n", b"\r"), "line 1: lines of this file end in CR alone; write it with LF"),
        (GOOD + b"no\rjson", "line 2: lines of this file end in CR alone"),
    ],
)
def test_another_kind_of_file_is_named_with_its_line(raw, sentence, source, tmp_path):
    (tmp_path / "data.jsonl").write_bytes(raw)
    with pytest.raises(DataError, match=f"data.jsonl,? {sentence}"):
        source(path=tmp_path / "data.jsonl")


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_no_mistakes(source, tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\r\n  \n\n" + GOOD)
    assert source(path=tmp_path / "data.jsonl").size == 2


def test_a_character_that_is_written_as_a_whole_pair_is_kept(source, jsonl):
    line = '{"prompt": "1", "answer": "1", "more": "\\ud83d\\ude00"}'
    (prompt,) = source(path=jsonl(line)).take(1)
    assert prompt.metadata["more"] == "\U0001f600"


def test_a_directory_in_place_of_a_data_file_is_named(source, tmp_path):
    with pytest.raises(DataError, match=r"the data file .* cannot be read: Is a directory"):
        source(path=tmp_path)


def widened(directory, target, *tokens):
    """A copy of the model whose tokenizer has more tokens than the model has embeddings."""
    shutil.copytree(directory, target)
    wider = load_tokenizer(target)
    wider.add_tokens(list(tokens))
    wider.save_pretrained(str(target))
    return target


def test_a_token_that_the_model_has_no_embedding_of_is_named_with_its_line(model_directory, tmp_path, jsonl):
    model = widened(model_directory, tmp_path / "wider", "<think>")
    path = jsonl(*ROWS, {"prompt": "<think>1", "answer": "1"})
    with pytest.raises(DataError, match=r"data\.jsonl, line 6: the token '<think>' has the id 64, .*vocab_size is 64"):
        PromptSource(DataConfig(path=path), model, seed=0)
    path = jsonl(*ROWS, {"prompt": "1", "answer": "<think>1"})
    source = PromptSource(DataConfig(path=path, shuffle=False), model, seed=0)
    with pytest.raises(DataError, match=r"line 6: the answer: the token '<think>'"):
        source.take_supervised(6)
    with pytest.raises(DataError, match=r"line 6: the answer: the token '<think>'"):
        PromptSource(DataConfig(path=path), model, seed=0, supervised=True)


def test_a_token_of_the_chat_template_or_of_a_task_beyond_the_vocabulary_is_found_too(model_directory, tmp_path, jsonl):
    model = widened(model_directory, tmp_path / "wider", "<go>")
    task = SyntheticTaskConfig(question="<go>{question}")
    with pytest.raises(DataError, match="question 0: the token '<go>' has the id 64"):
        PromptSource(DataConfig(task=task), model, seed=0).take(1)
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}<go>")
    with pytest.raises(DataError, match="line 1: the token '<go>' has the id 64"):
        PromptSource(DataConfig(path=jsonl(*ROWS)), model, seed=0)


def test_a_prompt_of_no_tokens_is_refused(model_directory, tmp_path, jsonl):
    model = tmp_path / "bare"
    shutil.copytree(model_directory, model)
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    path = jsonl(ROWS[0], {"prompt": "", "answer": "1"})
    with pytest.raises(DataError, match="line 2: the prompt is empty"):
        PromptSource(DataConfig(path=path), model, seed=0)
    with pytest.raises(DataError, match="line 2: it is no token at all"):
        PromptSource(DataConfig(path=path, filters={"empty": "keep"}), model, seed=0)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "generation_config.json, line 1, is not JSON"),
        ("[]", "generation_config.json must hold an object, not '\\[\\]'"),
        ('{"eos_token_id": "x"}', "eos_token_id of .* is a token id or a list of them, not 'x'"),
        ('{"eos_token_id": [true]}', "is a token id or a list of them"),
    ],
)
def test_a_generation_config_that_cannot_be_read_is_named(content, sentence, model_directory, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(model_directory, model)
    (model / "generation_config.json").write_text(content)
    with pytest.raises(DataError, match=sentence):
        PromptSource(DataConfig(task=TASK), model, seed=0)


def test_prompts_that_need_a_look_are_tokenized_in_batches_and_a_line_says_how_far_it_is(
    source, jsonl, monkeypatch, tokenizer
):
    calls = []
    monkeypatch.setattr(
        "pipeline.data.chat.token_ids", lambda t, texts: calls.append(len(texts)) or token_ids(t, texts)
    )
    monkeypatch.setattr("pipeline.data.tables.screen._PROGRESS_S", -1.0)
    monkeypatch.setattr("pipeline.data.tables.screen._OFTEN", 500)
    lines = []
    path = jsonl(*({"prompt": f"{n}+1", "answer": str(n + 1)} for n in range(1200)))
    stream = source(path=path, shuffle=False, say=lines.append)
    assert [n for n in calls if n > 1] == [512, 512, 176]
    assert lines == [f"data: {n} rows are read" for n in ("0", "500", "1,000")]
    alone = tokenizer.encode("<|user|>1100+1<|assistant|>", add_special_tokens=False)
    assert stream.take(1101)[-1].ids.tolist() == alone


def test_a_missing_and_an_empty_file_are_named(source, jsonl, tmp_path):
    with pytest.raises(DataError, match=r"there is no data file .*nowhere\.jsonl"):
        source(path=tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="holds no prompts"):
        source(path=jsonl("", " "))


def test_a_file_has_no_held_out_stream(source, jsonl):
    with pytest.raises(DataError, match="has no held_out prompts; set `held_out`"):
        source(path=jsonl(*ROWS), part="held_out")


@pytest.mark.parametrize("fields", [{}, {"task": TASK, "path": "x.jsonl"}])
def test_exactly_one_origin_of_prompts(fields):
    with pytest.raises(ValidationError, match=r"exactly one of data\.task"):
        DataConfig(**fields)
