"""The steps of a folder of dumps, read for a configuration and a model; what does not fit is named."""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.config.replay import Replay
from pipeline.dumps.dump import dump_path, write_dump
from pipeline.dumps.groups import DumpError
from pipeline.dumps.steps import DumpedSteps
from tests.support.dumped_groups import (
    SHAPE,
    make_dump,
    make_group,
    make_scores,
    same,
)
from tests.support.episodes import graded_group


def test_steps_come_in_order_and_without_a_gap(tmp_path, dump):
    for step in (9, 10, 8):
        write_dump(tmp_path, make_dump(*dump.batch.groups, step=step))
    assert DumpedSteps(tmp_path).steps == [8, 9, 10]
    assert DumpedSteps(dump_path(tmp_path, 9)).steps == [9]
    dump_path(tmp_path, 9).unlink()
    with pytest.raises(DumpError, match="lacks step 9"):
        DumpedSteps(tmp_path)
    write_dump(tmp_path, make_dump(*dump.batch.groups, step=9)).rename(tmp_path / "step_copy.safetensors")
    write_dump(tmp_path, make_dump(*dump.batch.groups, step=9))
    with pytest.raises(DumpError, match="both of step 9"):
        DumpedSteps(tmp_path)


def test_a_path_without_dumps_says_where_they_might_be(tmp_path, dump):
    with pytest.raises(DumpError, match="there is no dump"):
        DumpedSteps(tmp_path / "none")
    with pytest.raises(DumpError, match=r"debug\.dump_rollouts=true writes"):
        DumpedSteps(tmp_path)
    write_dump(tmp_path / "dumps", dump)
    with pytest.raises(DumpError, match=r"did you mean .*dumps\?"):
        DumpedSteps(tmp_path)


def config(temperature=1.0, max_new_tokens=5, replay=Replay.R3, masks=False):
    return SimpleNamespace(
        longest_rollout=max_new_tokens,
        environment=None,
        teacher=None,
        precision=SimpleNamespace(temperature=temperature, masks_sampling=masks),
        replay=replay,
    )


def test_a_step_is_read_for_the_model_and_the_configuration_that_it_fits(tmp_path, dump):
    write_dump(tmp_path, dump)
    assert same(DumpedSteps(tmp_path).read(1, config(), SHAPE), dump)


@pytest.mark.parametrize(
    ("asked", "shape", "message"),
    [
        (config(), {"vocab_size": 20}, "outside the model's vocabulary of 20"),
        (config(temperature=0.5), {}, "set precision.temperature=1.0"),
        (config(masks=True), {}, "over other tokens; set precision: top_k=-1"),
        (config(max_new_tokens=4), {}, "set rollout.max_new_tokens=5"),
        (config(), {"num_layers": 4}, "for 3 layers, top 2; the model has 4, top 2"),
        (config(), {"num_experts": 3}, r"outside \[0, 3\)"),
    ],
)
def test_a_step_that_does_not_fit_says_what_to_change(tmp_path, dump, asked, shape, message):
    write_dump(tmp_path, dump)
    with pytest.raises(DumpError, match=message):
        DumpedSteps(tmp_path).read(1, asked, dataclasses.replace(SHAPE, **shape))


def test_a_step_without_routes_or_without_a_response_cannot_be_replayed_as_if_it_had_them(tmp_path):
    rng = np.random.default_rng(0)
    write_dump(tmp_path, make_dump(make_group(rng, routes=None)))
    with pytest.raises(DumpError, match="no routes; set replay=none"):
        DumpedSteps(tmp_path).read(1, config(), SHAPE)
    assert DumpedSteps(tmp_path).read(1, config(replay=Replay.NONE), SHAPE).batch.step == 1
    write_dump(tmp_path, make_dump(make_group(rng, lengths=(2, 0))))
    with pytest.raises(DumpError, match="nothing to train on"):
        DumpedSteps(tmp_path).read(1, config(), SHAPE)


@pytest.mark.parametrize(
    ("had", "asked", "message"),
    [
        (None, 0, "a teacher has not scored it; set teacher.engine=trainer"),
        (4, 0, None),
        (4, 4, None),
        (4, 2, r"gave its 4 likeliest tokens; set objective\.distillation\.top_k=4"),
        (0, 4, r"gave its 0 likeliest tokens; set objective\.distillation\.top_k=0"),
    ],
)
def test_a_step_that_a_teacher_scored_otherwise_says_what_to_change(tmp_path, had, asked, message):
    rng, group = np.random.default_rng(0), make_group(np.random.default_rng(0), lengths=(2, 2))
    rollouts = [
        dataclasses.replace(r, teacher=None if had is None else make_scores(rng, 2, had)) for r in group.rollouts
    ]
    write_dump(tmp_path, make_dump(graded_group(group.prompt, rollouts, [0.0, 1.0])))
    wanted = config()
    wanted.teacher = SimpleNamespace(engine="server")
    wanted.objective = SimpleNamespace(composition=lambda: SimpleNamespace(teacher_top=asked))
    with contextlib.nullcontext() if message is None else pytest.raises(DumpError, match=message):
        DumpedSteps(tmp_path).read(1, wanted, SHAPE)
