"""What a dump gives back is what was written; what is no dump is named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from pipeline.dumps.dump import Dump, dump_path, read_dump, write_dump
from pipeline.dumps.groups import DumpError
from pipeline.dumps.steps import DumpedSteps
from pipeline.step import Batch
from pipeline.types import Episode, Group, Prompt, Rollout
from tests.support.dumped_groups import (
    EXPERTS,
    LAYERS,
    TOPK,
    VOCAB,
    make_dump,
    make_group,
    same,
)

HEADER = {
    "format": "sameroute.rollouts", "format_version": "2", "step": "1", "weight_version": "1", "temperature": "1.0",
}  # fmt: skip

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def make_conversation(rng):
    """An episode of two rollouts: the second begins with another prompt and has tokens that a tool wrote."""
    first = make_group(rng, lengths=(2,)).rollouts[0]
    trained = np.array([True, False, False, True])
    second = Rollout(
        prompt_ids=first.token_ids[:3],
        response_ids=rng.integers(0, VOCAB, 4).astype(np.int32),
        rollout_logprobs=np.where(trained, -0.5, 0).astype(np.float32),
        routes=rng.integers(0, EXPERTS, (6, LAYERS, TOPK)).astype(np.uint8),
        weight_versions=np.where(trained, [1, -1, -1, 2], -1).astype(np.int32),
        finish_reason="stop",
        trained=trained,
    )
    return first, second


def test_a_conversation_of_several_rollouts_and_a_failed_episode_are_read_back(tmp_path):
    first, second = make_conversation(np.random.default_rng(0))
    prompt = Prompt(first.prompt_ids, "question", {"answer": "1"}, 3)
    episodes = (Episode((first, second), 0.5), Episode((first,), failure="the verifier took more than 5 s"))
    dump = Dump(Batch(4, 2, (Group(prompt, episodes),)), 1.0)
    again = read_dump(write_dump(tmp_path, dump))
    assert same(again, dump)
    assert len(again.batch.episodes) == 1
    assert [r.trained_tokens for r in again.batch.rollouts] == [2, 2]


def conversation_dump(*rewards):
    """A dump of a conversation of three turns in two rollouts, its rewards of turns given, and one without."""
    first, second = make_conversation(np.random.default_rng(0))
    prompt = Prompt(first.prompt_ids, "question", {"answer": "1"}, 3)
    episodes = Episode((first, second), 0.5, turn_rewards=rewards), Episode((first,), 1.0)
    return Dump(Batch(4, 2, (Group(prompt, episodes),)), 1.0)


def test_rewards_of_turns_are_read_back(tmp_path):
    dump = conversation_dump(0.25, -0.75, 1.0)
    assert same(read_dump(write_dump(tmp_path, dump)), dump)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda arrays: arrays.pop("has_turn_rewards"), "come together"),
        (lambda arrays: arrays.update(turn_rewards=arrays["turn_rewards"][:2]), "of 3 turns has 2 rewards"),
        (lambda arrays: arrays.update(turn_rewards=np.zeros(4, np.float32)), "more than there are turns"),
        (lambda arrays: arrays.update(turn_rewards=np.full(3, np.nan, np.float32)), "not finite"),
        (lambda arrays: arrays.update(has_turn_rewards=np.ones(3, bool)), "has 3 entries, not 2"),
    ],
)
def test_rewards_of_turns_that_cannot_be_are_named(tmp_path, change, sentence):
    file = write_dump(tmp_path, conversation_dump(0.25, -0.75, 1.0))
    arrays = load_file(file)
    change(arrays)
    save_file(arrays, file, HEADER)
    with pytest.raises(DumpError, match=sentence):
        read_dump(file)


@st.composite
def dumps(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = st.lists(st.integers(0, 6), min_size=1, max_size=3)
    dtype = draw(st.sampled_from([np.uint8, np.int16]))
    groups, kept, top_k = [], draw(st.booleans()), draw(st.sampled_from([None, 0, 3]))
    for index, lengths in enumerate(draw(st.lists(shape, min_size=1, max_size=3))):
        routes = dtype if draw(st.booleans()) else None
        metadata = draw(st.dictionaries(st.text(), json_values, max_size=3))
        groups.append(make_group(rng, index, draw(st.integers(1, 4)), lengths, routes, metadata, kept, top_k))
    temperature = draw(st.floats(1e-3, 10))
    return Dump(Batch(draw(st.integers(0, 10**6)), draw(st.integers(0, 10**6)), tuple(groups)), temperature)


@settings(max_examples=60, deadline=None)
@given(dumps())
def test_any_step_is_read_back_bit_for_bit(tmp_path_factory, dump):
    folder = tmp_path_factory.mktemp("dumps")
    file = write_dump(folder, dump)
    assert file == dump_path(folder, dump.batch.step)
    assert same(read_dump(file), dump)
    assert [f.name for f in folder.iterdir()] == [file.name]


def test_routes_stay_in_their_narrow_type(tmp_path, dump):
    assert load_file(write_dump(tmp_path, dump))["routes"].dtype == np.uint8


def test_a_write_that_fails_leaves_the_dump_that_was_there(tmp_path, dump, monkeypatch):
    file = write_dump(tmp_path, dump)
    before = file.read_bytes()

    def full(tensors, path, header):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="no space"):
        write_dump(tmp_path, dump)
    assert file.read_bytes() == before
    assert DumpedSteps(tmp_path).steps == [1]


def with_group(dump, **changes):
    first, *others = dump.batch.groups
    return make_dump(dataclasses.replace(first, **changes), *others)


def with_rollout(dump, **changes):
    first, *others = dump.batch.groups[0].episodes
    return with_group(dump, episodes=(Episode((dataclasses.replace(first.last, **changes),), first.reward), *others))


def with_episode(dump, **changes):
    first, *others = dump.batch.groups[0].episodes
    return with_group(dump, episodes=(dataclasses.replace(first, **changes), *others))


def with_metadata(dump, metadata):
    return with_group(dump, prompt=dataclasses.replace(dump.batch.groups[0].prompt, metadata=metadata))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: make_dump(), "without rollouts"),
        (lambda d: with_rollout(d, prompt_ids=np.zeros(4, np.int32)), "prompt 0 has a rollout of another prompt"),
        (lambda d: with_rollout(d, routes=np.zeros((6, 3, 2), np.int16)), "one shape and dtype"),
        (lambda d: with_episode(d, reward=None), "prompt 0 has an episode without a reward"),
        (lambda d: with_episode(d, reward=float("nan")), "rewards holds a number that is not finite"),
        (lambda d: with_rollout(d, kept=d.batch.rollouts[0].response_ids[:, None]), "1 of 4 rollouts have kept"),
        (lambda d: with_metadata(d, {"key": {1, 2}}), "metadata of prompt 0 is not JSON"),
        (lambda d: with_metadata(d, {"key": float("nan")}), "metadata of prompt 0 is not JSON"),
        (lambda d: with_metadata(d, {"key": (1, 2)}), "metadata of prompt 0 changes in JSON"),
    ],
)  # fmt: skip
def test_what_could_not_be_read_back_is_refused_by_name(tmp_path, dump, change, message):
    with pytest.raises(DumpError, match=message):
        write_dump(tmp_path, change(dump))
    assert list(tmp_path.glob("step_*")) == []


def without(arrays, name):
    return {k: v for k, v in arrays.items() if k != name}


def taught(arrays):
    told = np.zeros(arrays["response_lengths"].sum(), np.float32)
    return {"has_teacher": np.ones(len(arrays["has_routes"]), bool), "teacher_logprobs": told}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: without(a, "rewards"), "lacks or has more than it should: rewards"),
        (lambda a: a | {"extra": np.zeros(1)}, "lacks or has more than it should: extra"),
        (lambda a: a | {"rewards": a["rewards"].astype(np.float64)}, "rewards is float64, not float32"),
        (lambda a: a | {"rewards": a["rewards"][:, None]}, r"rewards has shape \[4, 1\]"),
        (lambda a: a | {"rewards": a["rewards"][:-1]}, "rewards has 3 entries, not 4"),
        (lambda a: a | {"rewards": a["rewards"] * np.inf}, "rewards holds a number that is not finite"),
        (lambda a: a | {"group_sizes": np.array([4, 0], np.int32)}, "a group has no episodes"),
        (lambda a: a | {"episode_sizes": np.array([1, 1, 2, 0], np.int32)}, "an episode has no rollouts"),
        (lambda a: a | {"response_lengths": a["response_lengths"] + 1}, "entries, not 15"),
        (lambda a: a | {"response_lengths": np.array([3, 1, 8, -1], np.int32)}, "negative length"),
        (lambda a: a | {"prompt_lengths": np.array([4, 4, 4, 0], np.int32)}, "a prompt has no tokens"),
        (lambda a: a | {"routes": a["routes"][:-1]}, "routes has 18 entries, not 19"),
        (lambda a: a | {"weight_versions": a["weight_versions"] - 100}, "a sampled token has no weight version"),
        (lambda a: a | {"finish_reasons": a["finish_reasons"] + np.uint8(9)}, "finish_reasons holds an unknown"),
        (lambda a: a | {"has_routes": ~a["has_routes"]}, "routes has 19 entries, not 0"),
        (lambda a: a | {"routes": a["routes"].astype(np.int16) - 50}, "routes holds -"),
        (lambda a: a | {"kept": a["response_ids"]}, "kept has shape"),
        (lambda a: a | {"kept": a["response_ids"][1:, None]}, "kept has .* entries, not"),
        (lambda a: a | {"kept": a["response_ids"][:, None] + 1}, "is not among those that were kept"),
        (lambda a: a | {"has_teacher": a["has_routes"]}, "a teacher's arrays come together"),
        (lambda a: a | taught(a) | {"teacher_logprobs": np.zeros(3, np.float32)}, "teacher_logprobs has 3 entries"),
        (lambda a: a | taught(a) | {"teacher_top_ids": np.zeros((11, 2), np.int32)}, "top tokens come with"),
        (lambda a: without(a, "routes"), "there are no routes, though has_routes says so"),
        (lambda a: a | {"prompts": a["prompts"][:-1]}, "prompts is not JSON"),
        (lambda a: a | {"prompts": np.frombuffer(b"[]", np.uint8)}, "prompts is not a list of 2"),
        (
            lambda a: a | {"prompts": np.frombuffer(b"[1, 2]", np.uint8)},
            "a prompt is not {text, metadata, index, origin}",
        ),
    ],
)
def test_a_file_that_cannot_be_a_step_is_refused_by_what_is_wrong_with_it(tmp_path, dump, change, message):
    file = write_dump(tmp_path, dump)
    arrays = change({name: array.copy() for name, array in load_file(file).items()})
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, file, HEADER)
    with pytest.raises(DumpError, match=message) as raised:
        read_dump(file)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is no dump of rollouts: its header says format 'other'"),
        ({"format_version": "1"}, "has format version 1; this code reads 2"),
        ({"step": "one"}, "has no number step, but 'one'"),
        ({"temperature": "nan"}, "has temperature nan"),
    ],
)
def test_a_header_that_is_another_format_is_refused(tmp_path, dump, change, message):
    file = write_dump(tmp_path, dump)
    save_file(load_file(file), file, HEADER | change)
    with pytest.raises(DumpError, match=message):
        DumpedSteps(file)


def test_a_file_cut_short_is_refused_before_anything_is_replayed(tmp_path, dump):
    file = write_dump(tmp_path, dump)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(DumpError, match=r"step_000001\.safetensors is no safetensors file, or not a whole one"):
        DumpedSteps(tmp_path)
