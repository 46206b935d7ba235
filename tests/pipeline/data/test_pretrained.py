"""A tokenizer is the one that the model's directory means, or it is refused with a sentence."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from pipeline.data.chat import DataError
from pipeline.data.pretrained import load_tokenizer

OWN_CODE = """
from transformers import PreTrainedTokenizer

class OwnTokenizer(PreTrainedTokenizer):
    def __init__(self, **settings):
        super().__init__(**settings)

    vocab_size = 130

    def get_vocab(self):
        return {chr(i): i for i in range(128)} | self.added_tokens_encoder

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token)

    def _convert_id_to_token(self, index):
        return chr(index)
"""
AUTO_MAP = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}


@pytest.fixture
def directory(model_directory, tmp_path):
    return shutil.copytree(model_directory, tmp_path / "model")


def configure(directory, **settings):
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture
def own_code(directory):
    (directory / "tokenization_own.py").write_text(OWN_CODE)
    (directory / "tokenizer.json").unlink()
    configure(directory, tokenizer_class="OwnTokenizer", auto_map=AUTO_MAP)
    return directory


def test_code_of_the_models_own_runs_only_where_it_is_trusted(own_code, monkeypatch, tmp_path):
    with pytest.raises(DataError, match=r"tokenization_own\.OwnTokenizer, .*set model\.trust_remote_code=true"):
        load_tokenizer(own_code)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    trusted = load_tokenizer(own_code, trust_remote_code=True)
    assert type(trusted).__name__ == "OwnTokenizer"
    assert trusted.encode("Hi", add_special_tokens=False) == [72, 105]


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_moe", "unheard_of"])
def test_code_is_asked_for_whatever_the_model_is(own_code, model_type):
    # transformers passes over auto_map for some types, and loads another pre-tokenizer in silence.
    config = json.loads((own_code / "config.json").read_text())
    (own_code / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    with pytest.raises(DataError, match="trust_remote_code"):
        load_tokenizer(own_code)


@pytest.mark.parametrize("auto_map", ["tokenization_own.OwnTokenizer", ["tokenization_own.OwnTokenizer", None]])
def test_the_older_forms_of_auto_map_ask_too(own_code, auto_map):
    for form in (auto_map, {"AutoTokenizer": auto_map}):
        configure(own_code, auto_map=form)
        with pytest.raises(DataError, match=r"\(tokenization_own\.OwnTokenizer, by auto_map"):
            load_tokenizer(own_code)


def test_trusting_changes_nothing_where_there_is_no_code(directory):
    text = "1+2=3"
    assert load_tokenizer(directory, trust_remote_code=True).encode(text) == load_tokenizer(directory).encode(text)


def test_code_that_is_missing_or_fails_is_a_sentence(own_code, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (own_code / "tokenization_own.py").write_text("raise RuntimeError('no such thing')")
    with pytest.raises(DataError, match="does not load: RuntimeError: no such thing"):
        load_tokenizer(own_code, trust_remote_code=True)
    (own_code / "tokenization_own.py").unlink()
    with pytest.raises(DataError, match=r"the tokenizer of .*model does not load: OSError"):
        load_tokenizer(own_code, trust_remote_code=True)


def byte_level(directory, pre_tokenizer):
    """A tokenizer of bytes, of which the pre-tokenizer is what two classes may differ in."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    ab = {token: i for i, token in enumerate([*symbols, "ĠN", "48"])}
    made = Tokenizer(models.BPE(vocab=ab, merges=[("Ġ", "N"), ("4", "8")]))
    made.pre_tokenizer = pre_tokenizer
    made.save(str(directory / "tokenizer.json"))


def test_a_class_that_cuts_text_otherwise_than_tokenizer_json_is_refused(directory):
    digits_apart = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    byte_level(directory, digits_apart)
    configure(directory, tokenizer_class="GPT2Tokenizer", eos_token="!", bos_token="!", pad_token="!", unk_token=None)
    with pytest.raises(DataError, match=r"loads as GPT2Tokenizer, which cuts text otherwise than tokenizer\.json"):
        load_tokenizer(directory)
    configure(directory, tokenizer_class="PreTrainedTokenizerFast")
    assert len(load_tokenizer(directory).encode("48", add_special_tokens=False)) == 2


def test_a_class_of_another_name_that_cuts_alike_is_taken(directory):
    configure(directory, tokenizer_class="LlamaTokenizerFast")  # as DeepSeek-V3 says; transformers takes the file
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v3"}))
    assert load_tokenizer(directory).encode("12", add_special_tokens=False)


def test_a_class_that_nobody_has_is_refused(directory):
    configure(directory, tokenizer_class="TikTokenTokenizer")
    with pytest.raises(DataError, match="names the tokenizer class TikTokenTokenizer, and transformers loads"):
        load_tokenizer(directory)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json, line 1, is not JSON"),
        ("tokenizer_config.json", "7", "tokenizer_config.json must hold an object, not '7'"),
        ("tokenizer_config.json", "\ud800", "tokenizer_config.json, line 1: the byte 0xed is not UTF-8"),
        ("tokenizer.json", "{", "does not load: "),
        ("tokenizer.json", "{}", "does not load: "),
    ],
)
def test_a_file_that_cannot_be_read_is_named(directory, name, content, sentence):
    (directory / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match=sentence):
        load_tokenizer(directory)
