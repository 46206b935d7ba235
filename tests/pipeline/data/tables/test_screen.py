"""Rows are looked at before a run starts: wrong ones named or counted, filters counted, little tokenized."""

import functools
import json

import pytest

from pipeline.config.data import DataConfig
from pipeline.config.model import TinyModelConfig
from pipeline.config.rewards import CodeReward, what_lacks
from pipeline.data.chat import DataError
from pipeline.data.held_out import held_out_share
from pipeline.data.prompts import PromptSource
from pipeline.data.tables.jsonl import JsonlTable
from pipeline.data.tiny_model import make_tiny_model

GOOD = {"prompt": "1+1", "answer": "2"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("bytes"), TinyModelConfig(layers=1, tokenizer="bytes"), seed=0)


@pytest.fixture
def opened(tmp_path, model):
    def make(*lines, supervised=False, said=None, raw=None, columns=None, rewards=(), **fields):
        path = tmp_path / "data.jsonl"
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        path.write_bytes(raw if raw is not None else text.encode())
        source = {"kind": "jsonl", "path": path, "columns": columns or {}}
        config = DataConfig.model_validate({"sources": [source], "shuffle": False} | fields)
        say = (lambda line: None) if said is None else said.append
        lacks = functools.partial(what_lacks, rewards)
        return PromptSource(config, model, seed=0, supervised=supervised, lacks=lacks, say=say)

    return make


def test_wrong_lines_are_skipped_and_counted_where_that_is_asked_for(opened):
    said = []
    lines = [
        GOOD,
        "{",
        {"prompt": "x"},
        "",
        {"prompt": "3", "answer": "3"},
        {"messages": [{"role": "tool", "content": ""}]},
    ]
    source = opened(*lines, on_bad_line="skip", said=said)
    assert [prompt.metadata["answer"] for prompt in source.take(2)] == ["2", "3"]
    facts = source.facts()["data"]
    assert (facts["rows"], facts["prompts"], facts["left_out"]["bad_line"]) == (5, 2, 3)
    assert "line 2: not JSON" in facts["first"]["bad_line"]
    assert len(said) == 1
    assert "data: 5 rows, 2 prompts; left out: 3 bad line, the first: " in said[0]


def test_bytes_that_are_no_text_cost_their_own_line_only(opened):
    lines = [json.dumps(GOOD).encode(), b'{"prompt": "\xe9"}', b'{"prompt": "\x00"}', json.dumps(GOOD).encode()]
    source = opened(raw=b"\n".join(lines), on_bad_line="skip")
    assert source.facts()["data"]["left_out"]["bad_line"] == 2
    assert source.size == 2
    assert [prompt.origin for prompt in source.take(2)] == ["data:0", "data:3"]


def test_each_filter_stops_drops_or_keeps(opened):
    lines = [GOOD, {"prompt": " \n", "answer": "2"}, GOOD, {"prompt": "x" * 40, "answer": "1"}]
    drop = {"too_long": "drop", "empty": "drop", "duplicates": "drop"}
    source = opened(*lines, filters=drop, max_prompt_tokens=20)
    assert source.size == 1
    facts = source.facts()["data"]
    assert facts["left_out"] == {"bad_line": 0, "too_long": 1, "empty": 1, "duplicate": 1}
    assert [word in facts["first"][kind] for kind, word in (("too_long", "line 4"), ("duplicate", "line 3"))] == [
        True
    ] * 2
    for name, sentence in (
        ("empty", "line 2: the prompt is empty"),
        ("duplicates", "line 3: an earlier row has this prompt too"),
        ("too_long", "line 4: the prompt has 42 tokens, the limit is 20"),
    ):
        with pytest.raises(DataError, match=sentence):
            opened(*lines, filters=drop | {name: "stop"}, max_prompt_tokens=20)
    kept = opened(*lines, filters={"empty": "keep", "duplicates": "keep"})
    assert kept.size == 4
    assert kept.facts()["data"]["duplicates"] == 1


def test_only_what_may_be_too_long_is_tokenized_at_the_start(opened, monkeypatch):
    seen = []
    from pipeline.data.chat import PromptWriter

    prompts = PromptWriter.prompts
    monkeypatch.setattr(
        PromptWriter, "prompts", lambda self, asked, indices: seen.extend(asked) or prompts(self, asked, indices)
    )
    short, long = {"prompt": "é" * 10, "answer": "1"}, {"prompt": "é" * 480, "answer": "2"}
    opened(*[short] * 50, long, short)
    assert [asked.answer for asked in seen] == ["2"]


def test_answers_are_looked_at_where_they_will_be_imitated(opened):
    with pytest.raises(DataError, match="line 1: there is no answer, and supervised steps imitate one"):
        opened({"prompt": "1"}, supervised=True, columns={"answer": None})
    assert opened({"prompt": "1"}, columns={"answer": None}).size == 1


def test_a_file_of_nothing_but_wrong_lines_says_so(opened):
    with pytest.raises(DataError, match=r"data\.jsonl holds no prompts: 2 rows, 0 prompts; left out: 2 bad line"):
        opened("{", "[1]", on_bad_line="skip")


def test_a_file_that_changes_under_a_run_is_noticed(opened):
    source = opened(GOOD, {"prompt": "3", "answer": "3"})
    source.take(1)
    path = source.sources[0].table.path
    path.write_text(path.read_text().replace("3", "4567"))
    with pytest.raises(DataError, match=r"data\.jsonl was changed while the run reads it"):
        source.take(1)


def test_lines_longer_than_a_block_and_blocks_of_many_lines_are_cut_alike(tmp_path, monkeypatch):
    rows = [{"prompt": "é" * (n % 7) + "x" * (40 * (n % 5)), "answer": str(n)} for n in range(60)]
    text = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) + "\n" * (n % 3) for n, row in enumerate(rows))
    (tmp_path / "x.jsonl").write_text(text, newline="")
    expected = [n for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    for block in (1, 7, 64, 1 << 20):
        monkeypatch.setattr("pipeline.data.tables.jsonl._BLOCK", block)
        table = JsonlTable(tmp_path / "x.jsonl")
        assert [record for _, record in table.scan()] == rows
        assert [table.record(row) for row in range(60)] == rows
        assert [int(table.where(row).rpartition(" ")[2]) for row in range(60)] == expected


def test_a_tenth_of_texts_is_below_a_tenth_and_a_quarter_below_a_quarter():
    shares = [held_out_share(str(n)) for n in range(20_000)]
    assert all(0 <= share < 1 for share in shares)
    for part in (0.01, 0.1, 0.25, 0.9):
        assert sum(share < part for share in shares) / 20_000 == pytest.approx(part, abs=0.01)


def test_a_row_without_what_a_verifier_reads_is_wrong(opened):
    rows = [GOOD | {"tests": ["assert f() == 1"]}, GOOD]
    words = r'data.jsonl, line 2: has no "tests", which the verifier code reads; it has answer'
    with pytest.raises(DataError, match=words):
        opened(*rows, rewards=[CodeReward()])
    assert opened(*rows, rewards=[CodeReward()], on_bad_line="skip").size == 1
    assert opened(*rows, rewards=[CodeReward(sources=("other",))]).size == 2


def test_duplicates_that_are_kept_are_counted_too(opened):
    said = []
    opened(GOOD, GOOD, GOOD, said=said)
    assert said == ["data: 3 rows, 3 prompts; 2 of them a second time"]
