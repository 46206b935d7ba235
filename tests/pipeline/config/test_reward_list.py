"""`rewards`: its short and long forms, and what is refused with what to write instead."""

from __future__ import annotations

import pytest

from pipeline.config import ConfigError, load_config
from pipeline.config.rewards import KINDS as CONFIGURED
from pipeline.rewards.registry import KINDS

QUICKSTART = "configs/quickstart.yaml"


def rewards(value):
    return load_config(QUICKSTART, [f"rewards={value}"]).rewards


def test_every_kind_that_can_be_written_can_be_loaded():
    assert CONFIGURED.keys() == KINDS.keys()


@pytest.mark.parametrize(
    ("written", "metrics"),
    [
        ("exact_match", ["exact_match"]),
        ("[exact_match]", ["exact_match"]),
        ("checks:last_number", ["last_number"]),
        ("{kind: number}", ["number"]),
        ("[number, {kind: length, free_tokens: 1, full_tokens: 2, weight: 0.1, name: short}]", ["number", "short"]),
        ("[{function: a.b:c}, code]", ["c", "code"]),
    ],
)
def test_a_verifier_is_written_in_short_or_in_full(written, metrics):
    assert [reward.metric for reward in rewards(written)] == metrics


def test_without_a_word_answers_are_matched_exactly():
    assert [reward.metric for reward in load_config(QUICKSTART).rewards] == ["exact_match"]


def test_what_a_run_writes_down_reads_back_as_it_is():
    before = load_config(QUICKSTART, ["rewards=[code, {function: a:b, weight: 2}, {kind: math_verify, boxed: true}]"])
    after = type(before).model_validate(before.model_dump(mode="json"))
    assert after == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "rewards=exact",
            r"rewards: there is no verifier 'exact'; there are code, exact_match, .*write your own as",
        ),
        ("rewards=[]", "rewards: a run needs one verifier at least"),
        ("rewards=7", "rewards: a list of verifiers, not 7; write rewards="),
        ("rewards=[7]", "rewards: a verifier is a kind, package.module:function, or a mapping with a kind, not 7"),
        ("rewards=[number, number]", "2 verifiers have the name 'number'; give each a name of its own"),
        ("rewards={function: a:mean}", "the metric reward/mean is another one; give this verifier another name"),
        ("rewards=grading.py:grade", "'grading.py:grade' names a file; write its module, grading:grade$"),
        (
            "rewards=own/verifiers/g.py:f",
            r"names a file; write its module, g:f, with directory: own/verifiers, or the file beside",
        ),
        ("rewards=../g:f", r"names a file; write its module, g:f, with directory: \.\.,"),
        ('rewards=":f"', "a verifier of your own is package.module:function, not ':f'"),
        ("rewards=a:b:c", "a verifier of your own is package.module:function, not 'a:b:c'"),
        ("rewards={kind: code, test: x}", r"rewards\.0\.code\.test: there is no such key; there are .*tests"),
        ("rewards={kind: code, sandbox: {cpu: 1}}", r"sandbox\.cpu: there is no such key; there are cpu_s, "),
        ("rewards={kind: code, sandbox: {mode: remote}}", "mode: remote and url go together"),
        ("rewards={kind: code, sandbox: {url: 'http://x'}}", "mode: remote and url go together"),
        ("rewards={kind: regex, pattern: '('}", r"the pattern '\(' is none of Python's re"),
        ("rewards={kind: length, free_tokens: 3, full_tokens: 3}", "free_tokens=3 is not less than full_tokens=3"),
        ("rewards={kind: judge, url: 'http://x', model: m, template: x}", r"the template needs \{response\}"),
        ("rewards={kind: judge, url: 'http://x', model: m, template: '{response}', pattern: x}", "has 0 groups"),
        ("rewards={kind: judge, url: 'http://x', model: m, template: '{response}', scale: [1, 1]}", "two different"),
        (
            "rewards={kind: code, sandbox: {memory_mb: 4000}}",
            "memory_mb=4000 does not fit grading.memory_gb=4 ",
        ),
        ("data.reward=exact_match", r"data\.reward: there is no such key; it is rewards now"),
        ("data.on_reward_failure=zero", r"it is grading\.on_failure now"),
    ],
)
def test_what_is_wrong_is_named_with_what_to_write(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(QUICKSTART, [override])


SOURCES = (
    "data={max_prompt_tokens: 16, sources: [{kind: synthetic, name: sorting, task: {}}, "
    "{kind: reasoning_gym, name: gym, tasks: {countdown: {}, chain_sum: {}}}]}"
)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (
            "[{kind: number, sources: [sort]}, length]",
            "names the source 'sort'; there are sorting, gym.countdown, gym.",
        ),
        (
            "[{kind: number, sources: [sorting, gym.countdown]}]",
            "no verifier grades the source 'gym.chain_sum'; name it",
        ),
        ("[{kind: number, sources: [sorting]}, {kind: reasoning_gym, sources: [gym]}]", None),
    ],
)
def test_every_source_has_a_verifier_and_every_name_is_that_of_a_source(rewards, message):
    rewards = rewards.replace("length", "{kind: length, free_tokens: 1, full_tokens: 2}")
    if message is None:
        load_config(QUICKSTART, [SOURCES, f"rewards={rewards}"])
        return
    with pytest.raises(ConfigError, match=message):
        load_config(QUICKSTART, [SOURCES, f"rewards={rewards}"])


def test_a_set_with_verifiers_of_its_own_names_its_own_sources():
    one = "{name: one, prompts: 2, sources: [{kind: synthetic, name: sums, task: {}}], rewards: [VERIFIER]}"
    load_config(QUICKSTART, ["evaluate=[" + one.replace("VERIFIER", "{kind: number, sources: [sums]}") + "]"])
    with pytest.raises(ConfigError, match="names the source 'digit_sort'; there are sums"):
        load_config(QUICKSTART, ["evaluate=[" + one.replace("VERIFIER", "{kind: number, sources: [digit_sort]}") + "]"])


@pytest.mark.parametrize(
    ("reward", "metadata", "key"),
    [
        ("exact_match", {"answer": "1"}, None),
        ("exact_match", {}, "answer"),
        ("{kind: number, answer: truth}", {"answer": "1", "truth": None}, "truth"),
        ("{kind: regex, pattern: x}", {}, None),
        ("{kind: regex, pattern: '(?P<answer>x)'}", {}, "answer"),
        ("code", {"answer": "1"}, "tests"),
        ("reasoning_gym", {"answer": "1"}, "reasoning_gym"),
        ("reasoning_gym", {"metadata": {"source_dataset": "countdown"}}, None),
        ("{kind: reward_model, url: 'http://a', body: {text: ['{prompt}{response}', '{style}']}}", {}, "style"),
        ("{kind: judge, url: 'http://a', model: m, template: '{response} {answer}'}", {}, "answer"),
        ("{kind: judge, url: 'http://a', model: m, template: '{response} {\"a\": 1}'}", {}, None),
        ("{kind: length, free_tokens: 1, full_tokens: 2}", {}, None),
    ],
)
def test_what_a_verifier_needs_of_a_prompt_is_known(reward, metadata, key):
    (one,) = rewards(f"[{reward}]")
    assert one.lacks(metadata) == key
