"""YAML as people write it, in files and in overrides; what is not YAML is named with file and line."""

import math
import re
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ConfigError, load_config
from pipeline.config.file import read_tree
from pipeline.text.yaml_text import YamlError, dump, parse

QUICKSTART = "configs/quickstart.yaml"


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("+2e4", 2e4),
        ("-1e+2", -100.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("1.e-3", 1e-3),
        ("+.5e3", 500.0),
        ("1_000", 1000),
        ("1_000.5", 1000.5),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("-.inf", -math.inf),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("12:30", "12:30"),
        ("2026-11-25", "2026-11-25"),
        ("1_", "1_"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("0x", "0x"),
        ("'1e-3'", "1e-3"),
        ("1.2.3", "1.2.3"),
    ],
)
def test_a_word_is_what_people_mean_by_it(word, value):
    read = parse(f"key: {word}")["key"]
    assert (read, type(read)) == (value, type(value))


def test_a_number_without_a_dot_is_one_in_files_in_overrides_and_where_no_type_is_known(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {tiny: {}}\ndata: {task: {name: digit_sort}}\nrun: {overwrite: yes}\ntrain: {lr: 1e-3, steps: 1_000}\n"
        "trainer: {extra: {moe_aux_loss_coeff: 1e-3}}\n"
    )
    config = load_config(file, ["supervised.lr=2E-3", "trainer.extra.layernorm_epsilon=+1e-6"])
    assert (config.train.lr, config.train.steps, config.supervised.lr, config.run.overwrite) == (1e-3, 1000, 2e-3, True)
    assert config.trainer.extra == {"moe_aux_loss_coeff": 1e-3, "layernorm_epsilon": 1e-6}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3, is not YAML: the key 'a' stands twice, in lines 1 and 3"),
        ("a:\n  x: 1\nb: {x: 1, x: 2}\n", "line 3, .*'x' stands twice, in line 3"),
        ("a:\n  - {b: 1,\n     b: 2}\n", "line 3, .*in lines 2 and 3"),
        ("a: {\n", "line 2, is not YAML"),
        ("a:\n\tb: 1\n", "line 2, .*a tab cannot indent YAML"),
        ("a: 1\n---\nb: 2\n", "line 2, .*a second document begins here"),
        ("a: 1\nb: \x00\n", "line 2: there is a NUL byte"),
        ("a: 1\nb: \x1b[31m\n", "line 2, .*may not stand in YAML"),
        ("a: &x {b: *x}\n", "contains itself"),
        ("a: *nowhere\n", "line 1, .*undefined alias"),
        ("a: 1\n7: x\n", "line 2, .*the key '7' is no text"),
        ("a: 1\n[x]: x\n", "line 2, .*the key is no text"),
        ("a: " + "9" * 5000, "line 1, .*5,000 characters.*at most 4,300 digits"),
        ("a: 1e999", "line 1, .*more than a float64 holds"),
        ("a: !!float word", "line 1, .*'word'.*is no number"),
        ("a: !!python/object:os.system x", "line 1, .*could not determine a constructor"),
        ('a: "\\ud800"', "line 1, .*half of a UTF-16 pair"),
        ("[" * 20_000, "nested more than 100 deep"),
        ("", "holds no settings"),
        ("# a: 1\n", "holds no settings"),
        ("0", "must hold a mapping"),
        ("false", "must hold a mapping"),
    ],
)
def test_what_is_not_yaml_is_named_with_file_and_line(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_bytes(text.encode("utf-8"))
    with pytest.raises(ConfigError, match=f"bad.yaml.*{message}"):
        read_tree(file)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("a: 1\nb: é\n".encode("latin-1"), "line 2: the byte 0xe9 is not UTF-8; .*iconv"),
        ("a: 1\n".encode("utf-16"), "line 1: the file is UTF-16"),
        (b"\x1f\x8b\x08\x00rest", "line 1: the file is gzip"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, raw, message):
    file = tmp_path / "bad.yaml"
    file.write_bytes(raw)
    with pytest.raises(ConfigError, match=message):
        read_tree(file)


def test_a_directory_and_names_that_no_file_can_have_are_named(tmp_path):
    with pytest.raises(ConfigError, match="is a directory; name a YAML file in it"):
        read_tree(tmp_path)
    for name in ("x" * 300, "a\0b", "file.yaml/below.yaml"):
        (tmp_path / "file.yaml").write_text("a: 1")
        with pytest.raises(ConfigError, match=r"no config file|cannot be read: File name too long"):
            read_tree(tmp_path / name)


def test_a_byte_order_mark_anchors_and_merge_keys_are_read(tmp_path):
    file = tmp_path / "good.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: &base {x: 1, y: 2}\nb: {<<: *base, y: 3}\r\n")
    assert read_tree(file)[0] == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr={", r"train\.lr: the value '\{' is not YAML"),
        ("objective={preset: gspo, preset: grpo}", "objective: .*'preset' stands twice"),
        ("train.lr=\t1", "is not YAML: a tab"),
        ("train.lr=1e999", "more than a float64 holds"),
        ("train..lr=1", "names between the dots"),
        (" train.lr=1", "names between the dots"),
        (".lr=1", "names between the dots"),
        ("train=", "train: the section holds nothing; give it fields, or leave it out"),
        ("model.path=7", r"model\.path: .*not 7; write it in quotes"),
        ("trainer.extra.moe_layer_recompute=no", r"trainer\.extra\.moe_layer_recompute: 'no' .*true or false"),
    ],
)
def test_an_override_that_is_not_yaml_is_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(QUICKSTART, [override])


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8"))
    | st.sampled_from(["1e-3", "no", "012", "2026-11-25", "<<", "=", "0x1f", "1_0"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=8,
))  # fmt: skip
def test_what_is_dumped_reads_back_as_it_is(value):
    assert parse(dump({"value": value})) == {"value": value}


def test_the_words_of_yaml_1_1_are_what_this_reads_otherwise():
    assert yaml.safe_load("1e-3") == "1e-3"  # the reason for a parser of our own: as long as this is so
    with pytest.raises(YamlError):
        parse("a: 1\na: 2")
    assert yaml.safe_load("a: 1\na: 2") == {"a": 2}


def test_a_resolved_configuration_with_texts_that_look_like_numbers_reads_back_as_itself(tmp_path):
    config = load_config(QUICKSTART, ["run.directory='1e-3'", "observe={mlflow: {tracking_uri: '0x1', name: '1_0'}}"])
    (tmp_path / "config.yaml").write_text(dump(config.model_dump(mode="json")))
    assert load_config(tmp_path / "config.yaml") == config


def test_the_example_of_the_page_on_models_is_a_number():
    (example,) = re.findall(r"`(trainer\.extra=\{.*?\})`", Path("docs/models.md").read_text(encoding="utf-8"))
    assert load_config(QUICKSTART, [example]).trainer.extra == {"moe_router_bias_update_rate": 0.001}


BOMBS = {
    "aliases": "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)),
    "aliases of mappings": "a0: &a0 {x: 1}\n"
    + "".join(
        f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(10))}}}\n" for i in range(1, 9)
    ),
    "merge keys": "a0: &a0 {x: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 9)),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_aliases_that_stand_for_millions_of_values_are_refused_at_once(tmp_path, name):
    (tmp_path / "bomb.yaml").write_text(BOMBS[name])
    (tmp_path / "heir.yaml").write_text("base: bomb.yaml\nx: 1\n")
    begun = time.monotonic()
    for file in ("bomb.yaml", "heir.yaml"):
        with pytest.raises(ConfigError, match=r"bomb\.yaml, line 6, .*more than 50,000 values, with its aliases"):
            read_tree(tmp_path / file)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: " + "[" * 50_000, "line 1, .*nested more than 100 deep"),
        ("a: " + "{b: " * 20_000, "line 1, .*nested more than 100 deep"),
        ("\n".join(" " * i + f"a{i}:" for i in range(300)), "line 100, .*nested more than 100 deep"),
        (
            "".join(f"key{i}: 1\n" for i in range(100_000)),
            "has 1,188,890 characters, and settings have 100,000 at most",
        ),
        ("a: '" + "x" * 1_000_000 + "'", "characters, and settings have 100,000 at most"),
    ],
)
def test_what_no_person_writes_is_refused_at_once(tmp_path, text, words):
    (tmp_path / "run.yaml").write_text(text)
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=rf"run\.yaml.*{words}"):
        read_tree(tmp_path / "run.yaml")
    assert time.monotonic() - begun < 5


def test_an_alias_bomb_of_an_override_is_refused_too():
    with pytest.raises(ConfigError, match="more than 100 deep"):
        load_config(QUICKSTART, ["trainer.extra=" + "[" * 5000])
