"""Sources of every kind, alone and mixed, as a run takes them."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.config.data import DataConfig
from pipeline.config.model import TinyModelConfig
from pipeline.data.chat import DataError
from pipeline.data.mixture import Mixture
from pipeline.data.prompts import PromptSource
from pipeline.data.tiny_model import make_tiny_model

SYNTHETIC = {"kind": "synthetic", "task": {"min_digits": 2, "max_digits": 3}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("bytes"), TinyModelConfig(layers=1, tokenizer="bytes"), seed=0)


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    """No data set of another test is found again."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def open_source(model):
    def make(*sources, part="train", seed=0, said=None, supervised=False, **fields):
        config = DataConfig.model_validate({"sources": sources} | fields)
        say = (lambda line: None) if said is None else said.append
        return PromptSource(config, model, seed=seed, part=part, supervised=supervised, say=say)

    return make


@pytest.fixture
def rows(tmp_path):
    def write(name, count=20, **more):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"{name} {n}", "answer": n} | more) + "\n" for n in range(count)))
        return {"kind": "jsonl", "path": str(path)}

    return write


def texts(prompts):
    return [prompt.text for prompt in prompts]


def test_every_stretch_of_a_mixture_holds_each_source_by_its_weight(open_source, rows):
    source = open_source(rows("a") | {"weight": 3}, rows("b"), SYNTHETIC | {"weight": 4})
    names = [prompt.origin.partition(":")[0] for prompt in source.take(80)]
    assert Counter(names) == {"a": 30, "b": 10, "digit_sort": 40}
    assert all(abs(Counter(names[:n])["a"] - n * 3 / 8) < 1 for n in range(80))
    assert [prompt.index for prompt in source.take(2)] == [80, 81]


def test_the_order_of_a_mixture_goes_on_as_it_would_have(open_source, rows):
    files = rows("a") | {"weight": 0.7}, rows("b") | {"weight": 0.11}

    def opened():
        return open_source(*files, SYNTHETIC)

    stream, again = opened(), opened()
    stream.take(37), stream.take_supervised(5)
    again.restore(json.loads(json.dumps(stream.state())))
    assert texts(again.take(100)) == texts(stream.take(100))
    assert [p.tokens.tolist() for p in again.take_supervised(9)] == [
        p.tokens.tolist() for p in stream.take_supervised(9)
    ]
    assert again.state() == stream.state()


def test_a_source_that_joins_a_resumed_run_begins_at_its_beginning_and_does_not_catch_up(open_source, rows):
    stream = open_source(rows("a"), rows("b"))
    stream.take(40)
    joined = open_source(rows("a"), rows("b"), rows("c"))
    joined.restore(stream.state())
    names = Counter(prompt.origin.partition(":")[0] for prompt in joined.take(30))
    assert names == {"a": 10, "b": 10, "c": 10}


def test_a_look_ahead_leaves_the_cursor_where_it_is(open_source, rows):
    source = open_source(rows("a"), SYNTHETIC)
    before = source.state()
    ahead = texts(source.peek(9))
    assert source.state() == before
    assert texts(source.take(9)) == ahead


def test_held_out_prompts_are_the_same_whatever_the_seed_and_never_trained_on(open_source, rows):
    file = rows("a", 400) | {"held_out": 0.25}
    train, other = open_source(file), open_source(file, seed=5)
    held_out, again = open_source(file, part="held_out"), open_source(file, part="held_out", seed=5)
    assert texts(train.peek(9)) != texts(other.peek(9))
    assert train.size + held_out.size == 400
    assert 70 < held_out.size < 130
    assert set(texts(held_out.take(held_out.size))) == set(texts(again.take(held_out.size)))
    assert not set(texts(train.take(train.size))) & set(texts(held_out.take(held_out.size)))
    assert train.facts()["a"]["held_out"] == held_out.size


def test_parquet_files_of_a_pattern_are_one_source(open_source, tmp_path):
    from datasets import Dataset

    for part in range(2):
        Dataset.from_dict({"question": [f"{part}{n}" for n in range(3)], "final": [part * 1.0] * 3}).to_parquet(
            tmp_path / f"train-{part}.parquet"
        )
    columns = {"prompt": "question", "answer": "final"}
    source = open_source(
        {"kind": "parquet", "path": str(tmp_path / "train-*.parquet"), "columns": columns}, shuffle=False
    )
    prompts = source.take(6)
    assert [prompt.text for prompt in prompts] == [
        f"<|user|>{part}{n}<|assistant|>" for part in (0, 1) for n in range(3)
    ]
    assert [prompt.metadata["answer"] for prompt in prompts] == ["0"] * 3 + ["1"] * 3
    assert prompts[0].origin == "train:0"


@pytest.mark.parametrize("saved_as", ["splits", "one", "files"])
def test_a_local_data_set_is_read_however_it_was_saved(saved_as, open_source, tmp_path):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_dict({"prompt": ["1+1", "1+2"], "answer": [2, 3]})
    place = tmp_path / "sums"
    if saved_as == "splits":
        DatasetDict(train=data, test=data.select([1])).save_to_disk(place)
    elif saved_as == "one":
        data.save_to_disk(place)
    else:
        place.mkdir()
        data.to_parquet(place / "train.parquet")
    source = open_source({"kind": "huggingface", "path": str(place)}, shuffle=False)
    assert [(p.text, p.metadata["answer"]) for p in source.take(2)] == [
        ("<|user|>1+1<|assistant|>", "2"),
        ("<|user|>1+2<|assistant|>", "3"),
    ]
    if saved_as == "splits":
        assert open_source({"kind": "huggingface", "path": str(place), "split": "test"}).size == 1
        with pytest.raises(DataError, match="has no split 'dev'; it has train, test"):
            open_source({"kind": "huggingface", "path": str(place), "split": "dev"})


def test_a_data_set_that_does_not_load_is_one_sentence(open_source, tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"the data set .*x\.parquet does not load: "):
        open_source({"kind": "parquet", "path": str(tmp_path / "x.parquet")})
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"does not load: .*; a machine without a network takes a local directory"):
        open_source({"kind": "huggingface", "path": "some/where"})
    (tmp_path / "here").mkdir()
    with pytest.raises(DataError, match="does not load: ") as refused:
        open_source({"kind": "huggingface", "path": str(tmp_path / "here")})
    assert "network" not in str(refused.value)


def test_a_row_that_json_does_not_hold_is_named(open_source, tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"prompt": ["a", "b"], "answer": ["1", "2"], "image": [b"1", b"2"]}).save_to_disk(tmp_path / "d")
    source = {"kind": "huggingface", "path": str(tmp_path / "d")}
    with pytest.raises(DataError, match=r'd \(train\), row 0: "image" holds bytes.* name the columns to `keep`'):
        open_source(source)
    assert open_source(source | {"keep": {}}).size == 2


def test_thinking_a_system_prompt_and_tools_reach_the_template(model, tmp_path, rows):
    import shutil

    there = tmp_path / "thinks"
    shutil.copytree(model, there)
    (there / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% for t in tools or [] %}({{ t.name }})"
        "{% endfor %}{{ style }}{% if not enable_thinking %}<think></think>{% endif %}"
    )
    chat = {
        "system_prompt": "be brief",
        "enable_thinking": False,
        "variables": {"style": "!"},
        "tools": [{"name": "t"}],
    }
    own = {"chat": {"enable_thinking": True}, "columns": {"tools": "tools"}}
    config = {"sources": [rows("a"), rows("b", tools=[{"name": "u"}]) | own], "chat": chat, "shuffle": False}
    source = PromptSource(DataConfig.model_validate(config), there, seed=0)
    assert texts(source.take(2)) == ["[system]be brief[user]a 0(t)!<think></think>", "[user]b 0(u)"]


def test_a_variable_that_the_template_never_reads_is_refused(open_source, rows):
    with pytest.raises(DataError, match="the chat template reads no variable 'enable_thinking'"):
        open_source(rows("a"), chat={"enable_thinking": False})
    with pytest.raises(DataError, match="the chat template reads no variable 'tools'"):
        open_source(rows("a") | {"columns": {"tools": "tools"}})


def test_too_long_questions_of_a_generator_are_dropped_and_counted(open_source):
    task = {"kind": "synthetic", "task": {"min_digits": 4, "max_digits": 6}}
    source = open_source(task, max_prompt_tokens=7, filters={"too_long": "drop"})
    prompts = source.take(30)
    assert {len(prompt.ids) for prompt in prompts} == {6, 7}
    assert [prompt.index for prompt in prompts] == list(range(30))
    dropped = source.metrics()["data/digit_sort/dropped_too_long"]
    assert dropped == int(prompts[-1].origin.partition(":")[2]) + 1 - 30


def test_a_source_of_nothing_but_too_long_prompts_says_so_and_does_not_search_for_ever(open_source, monkeypatch):
    monkeypatch.setattr("pipeline.data.prompts._MOST_DROPPED", 5)
    task = {"kind": "synthetic", "task": {"min_digits": 8, "max_digits": 8}}
    source = open_source(task, max_prompt_tokens=7, filters={"too_long": "drop"})
    with pytest.raises(DataError, match="the prompt has 10 tokens, the limit is 7"):
        source.take(1)


def test_epochs_and_pass_rates_are_metrics_of_each_source(open_source, rows):
    source = open_source(rows("a", 4), SYNTHETIC)
    taken = source.take(6)
    for prompt in taken:
        source.learned(prompt, [1.0, 0.0] if prompt.origin.startswith("a:") else np.array([1.0, 1.0]))
    metrics = source.metrics()
    assert metrics["data/a/epoch"] == 0.75
    assert (metrics["data/a/pass_rate"], metrics["data/digit_sort/pass_rate"]) == (0.5, 1.0)
    assert (metrics["data/a/seen"], metrics["data/a/sometimes_solved"]) == (3, 1)
    assert "data/a/pass_rate" not in source.metrics()
    source.learned(taken[0], [])
    assert "data/a/pass_rate" not in source.metrics(), "of a group without rewards nothing is learned"
    fresh = open_source(rows("a", 4), SYNTHETIC)
    source.restore(fresh.state())
    assert source.metrics()["data/a/seen"] == 0, "what was learned after a checkpoint is not its"


def test_the_curriculum_asks_unseen_prompts_and_those_in_the_band_and_goes_on_the_same_after_a_resumption(
    open_source, rows
):
    file, curriculum = rows("a", 40), {"band": [0.2, 0.8], "outside": 0.0}

    def rewards(prompt):
        number = int(prompt.origin.partition(":")[2])
        return [1.0] * (number % 3) + [0.0] * (2 - number % 3)

    source = open_source(file, curriculum=curriculum)
    first = source.take(40)
    assert len({prompt.origin for prompt in first}) == 40
    for prompt in first:
        source.learned(prompt, rewards(prompt))
    again = open_source(file, curriculum=curriculum)
    again.restore(json.loads(json.dumps(source.state())))
    second = source.take(26)
    assert texts(again.take(26)) == texts(second)
    assert {int(prompt.origin.partition(":")[2]) % 3 for prompt in second} == {1}
    assert len({prompt.origin for prompt in second}) == 13
    assert [prompt.index for prompt in second] == list(range(40, 66))


def test_other_prompts_outside_the_band_are_asked_in_each_epoch(open_source, rows):
    source = open_source(rows("a", 40), curriculum={"band": [0.2, 0.8], "outside": 0.5})
    for prompt in source.take(40):
        source.learned(prompt, [0.0, 0.0])
    prompts = source.take(60)
    assert len({prompt.origin for prompt in prompts}) > 28  # of 40, about 20 an epoch


def test_without_a_curriculum_nothing_is_passed_over(open_source, rows):
    file = rows("a", 10)
    source, plain = open_source(file), open_source(file)
    for prompt in source.take(10):
        source.learned(prompt, [1.0, 1.0])
    plain.take(10)
    assert texts(source.take(10)) == texts(plain.take(10))


def test_the_end_of_what_is_to_be_learned_is_said(open_source, rows):
    source = open_source(rows("a", 5), curriculum={"drop_solved_after": 2})
    for _ in range(2):
        for prompt in source.take(5):
            source.learned(prompt, [1.0, 1.0])
    with pytest.raises(DataError, match=r"data\.curriculum leaves none of 5 prompts to be asked"):
        source.take(1)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"sources": []}, "give exactly one of data.task"),
        ({"sources": [SYNTHETIC, SYNTHETIC]}, "two of data.sources are called 'digit_sort'; give one"),
        ({"sources": [{"kind": "csv", "path": "x"}]}, "does not match any of the expected tags: 'jsonl'"),
        ({"sources": [{"path": "x"}]}, "Unable to extract tag"),
        ({"sources": [SYNTHETIC | {"weight": 0}]}, "greater than 0"),
        ({"sources": [{"kind": "reasoning_gym", "tasks": {}}]}, "tasks names no task"),
        ({"sources": [{"kind": "reasoning_gym", "tasks": {"ab": {"weight": "x"}}}]}, "is a number above 0"),
        ({"sources": [{"kind": "reasoning_gym", "tasks": {"ab": {"seed": 1}}}]}, "cannot set seed; there is `seed`"),
        ({"sources": [SYNTHETIC], "curriculum": {"band": [0.9, 0.1]}}, "the lower one first"),
    ],
)
def test_what_cannot_be_a_source_is_refused(wrong, sentence):
    with pytest.raises(ValidationError, match=sentence):
        DataConfig.model_validate(wrong)


def test_two_tasks_of_a_name_are_refused(open_source):
    gym = {"kind": "reasoning_gym", "tasks": {"chain_sum": {}}}
    with pytest.raises(DataError, match=r"two of data\.sources are called 'chain_sum'"):
        open_source(gym, gym | {"seed": 1})
    assert open_source(gym, gym | {"name": "other"}).size is None


def test_epochs_of_a_shuffled_file_differ_and_each_row_comes_once(open_source, rows):
    source = open_source(rows("a", 9))
    epochs = [tuple(texts(source.take(9))) for _ in range(4)]
    assert all(sorted(one) == sorted(other) for one, other in pairwise(epochs))
    assert len(set(epochs)) == 4


def test_pairs_to_imitate_come_in_an_order_of_their_own_and_a_curriculum_passes_none_over(open_source, rows):
    source = open_source(rows("a", 20), supervised=True, curriculum={"drop_solved_after": 1})
    prompts, pairs = texts(source.take(20)), texts(pair.prompt for pair in source.take_supervised(20))
    assert sorted(pairs) == sorted(prompts)
    assert pairs != prompts
    for number in range(20):
        source.learned(source.at(number), [1.0])
    assert sorted(texts(pair.prompt for pair in source.take_supervised(20))) == sorted(prompts)


def test_the_last_prompt_that_is_to_be_learned_is_found_wherever_it_stands(open_source, rows):
    source = open_source(rows("a", 40), curriculum={"drop_solved_after": 1})
    first = source.take(40)
    for prompt in first[1:]:
        source.learned(prompt, [1.0])
    assert texts(source.take(3)) == [first[0].text] * 3


def test_a_row_that_a_file_no_longer_has_is_named(open_source, rows):
    source = open_source(rows("a", 5))
    assert source.sources[0].again(4)
    with pytest.raises(DataError, match="has no row 5 any more"):
        source.sources[0].again(5)


@pytest.mark.parametrize("position", [-1, True, "3", None])
def test_a_position_that_is_no_count_is_refused(position):
    with pytest.raises(ValueError, match="the position of a is a count"):
        Mixture(["a"], [1]).restored(3, {"a": [position, "0"]})


def test_a_prompt_that_was_taken_comes_again_as_it_was_also_after_a_resumption(open_source, rows):
    file, gym = rows("a", 7), {"kind": "reasoning_gym", "tasks": {"chain_sum": {}}}
    source, again = (open_source(file, SYNTHETIC, gym, curriculum={"drop_solved_after": 1}) for _ in range(2))
    taken = source.take(30)
    for prompt in taken[:9]:
        source.learned(prompt, [1.0])
    taken += source.take(10)
    again.restore(json.loads(json.dumps(source.state())))
    for prompt in taken:
        for opened in (source, again):
            same = opened.at(prompt.index)
            assert np.array_equal(same.ids, prompt.ids)
            assert (same.text, same.metadata, same.index, same.origin) == (
                prompt.text, prompt.metadata, prompt.index, prompt.origin,
            )  # fmt: skip
    for index in (-1, 40):
        with pytest.raises(DataError, match=f"prompt {index} is not one of the last 40 that were taken"):
            again.at(index)
    other = open_source(gym)
    other.restore(source.state())
    with pytest.raises(DataError, match=r"is of the source 'a', which is not in data.sources any more"):
        other.at(next(prompt.index for prompt in taken if prompt.origin.startswith("a:")))


def test_only_the_last_prompts_are_remembered(open_source, rows, monkeypatch):
    monkeypatch.setattr("pipeline.data.prompts._REMEMBERED", 5)
    source = open_source(rows("a"))
    prompts = source.take(8)
    assert source.at(3).text == prompts[3].text
    with pytest.raises(DataError, match="prompt 2 is not one of the last 5"):
        source.at(2)
