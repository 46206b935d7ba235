import pytest

from pipeline.data.chat import DataError
from pipeline.data.tokenizer import CHARACTERS, VOCAB_SIZE, load_tokenizer


def test_every_character_is_one_token_and_comes_back(tokenizer):
    ids = tokenizer.encode(CHARACTERS, add_special_tokens=False)
    assert len(ids) == len(set(ids)) == len(CHARACTERS)
    assert tokenizer.decode(ids) == CHARACTERS


def test_every_id_of_the_vocabulary_has_a_token(tokenizer):
    assert len(tokenizer) == VOCAB_SIZE
    assert all(tokenizer.decode([i]) for i in range(VOCAB_SIZE))


def test_chat_template_opens_the_assistants_turn_and_closes_its_answers(tokenizer):
    messages = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    opened = tokenizer.apply_chat_template(messages[:1], tokenize=True, add_generation_prompt=True)["input_ids"]
    assert whole == [*opened, *tokenizer.encode("3"), tokenizer.eos_token_id]
    assert tokenizer.decode(whole) == "<|user|>1+2<|assistant|>3<|eos|>"


def test_a_role_token_is_special_and_digits_are_not(tokenizer):
    ids = tokenizer.encode("<|user|>12")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "12"


def test_it_survives_save_pretrained(tokenizer, tmp_path):
    tokenizer.save_pretrained(str(tmp_path))
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template


def test_a_directory_without_a_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer_config\.json"):
        load_tokenizer(tmp_path)
