"""The byte tokenizer of tiny models reads and writes any text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.data import DataConfig
from pipeline.config.model import TinyModelConfig
from pipeline.data.prompts import PromptSource
from pipeline.data.tiny_model import make_tiny_model
from pipeline.data.tokenizer import load_tokenizer

CONFIG = TinyModelConfig(layers=1, tokenizer="bytes")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("bytes"), CONFIG, seed=0)


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model)


def test_every_id_of_the_vocabulary_is_a_token(tokenizer):
    assert len(tokenizer) == CONFIG.vocab_size == CONFIG.hf_config()["vocab_size"] == 320
    assert all(tokenizer.decode([i]) for i in range(320))


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="<")))
def test_any_text_is_its_bytes_and_comes_back(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_english_questions_are_prompts(model, tmp_path):
    (tmp_path / "questions.jsonl").write_text(
        '{"prompt": "How many legs has a cat? \u2014 Say it.", "answer": "Four"}\n'
    )
    source = PromptSource(DataConfig(path=tmp_path / "questions.jsonl"), model, seed=0, supervised=True)
    (prompt,) = source.take(1)
    assert prompt.text == "<|user|>How many legs has a cat? \u2014 Say it.<|assistant|>"
    assert source.tokenizer.decode(source.take_supervised(1)[0].answer_ids) == "Four<|eos|>"
