"""A teacher beside the policy, and the policy's log-probs of tokens that a teacher names: as transformers has them, on
every layout as on one rank."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerPrecision
from megatron_ext.parts import merge_tokens, merge_update
from tests.conftest import save_tiny_model
from tests.megatron_ext.test_trainer import LAYOUTS, TRAINER
from tests.support.jobs import make_samples
from tests.support.proofs import sampled
from tests.support.ranks import run_ranks

TEMPERATURE, NAMED = 0.7, 3


def samples_with_names():
    draw = np.random.default_rng(4)
    return [
        dataclasses.replace(s, named=draw.integers(0, 512, (s.response_length, NAMED)).astype(np.int32))
        for s in make_samples(routes=False)
    ]


def taught(config: ParallelConfig, model: str, teacher: str):
    """Runs on a rank: the teacher's log-probs, one update on all named tokens alone, the teacher's again."""
    from megatron_ext.trainer import Trainer

    precision = TrainerPrecision(temperature=TEMPERATURE)  # pyright: ignore[reportCallIssue]
    it = Trainer(
        model, config, TRAINER, OptimizerConfig(lr=1e-3), replay=False, precision=precision, teacher=teacher
    )  # fmt: skip
    samples, seen = samples_with_names(), {}

    def loss(batch):
        named = batch.quantities[2] * batch.mask[..., None]
        seen.update(zip(batch.indices, named.detach().numpy().copy(), strict=True))
        weights = torch.arange(1, NAMED + 1) / 100
        return -(named * weights).sum(), {}

    before, update = it.teacher_logprobs(samples), it.update(samples, loss)
    frozen = all(p.grad is None and getattr(p, "main_grad", None) is None for p in it.teacher.chunks[0].parameters())
    return before, update, it.teacher_logprobs(samples), seen, frozen


@functools.cache
def on(layout: tuple, model: str, teacher: str):
    answers = run_ranks(taught, ParallelConfig(**dict(layout)), model, teacher)
    count = len(samples_with_names())
    teachers = [np.concatenate(merge_tokens([a[i] for a in answers], count)[0]) for i in (0, 2)]
    assert np.array_equal(*teachers), "an update moves no teacher"
    assert all(a[4] for a in answers), "a teacher has gradients"
    named = {index: rows for a in answers for index, rows in a[3].items()}
    rows = [named[i][: s.response_length] for i, s in enumerate(samples_with_names())]
    return teachers[0], merge_update([a[1] for a in answers]), np.concatenate(rows)


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("teacher"), seed=7, num_hidden_layers=2))


def tables(model: str):
    """Per sample, log-probs of the whole vocabulary after each token but the last, from the response on."""
    from tests.support import reference

    loaded = reference.load(model)
    for sample in samples_with_names():
        yield sample, reference.scores(loaded, sample.tokens, TEMPERATURE)[sample.prompt_length - 1 : -1]


def test_the_teacher_and_the_named_tokens_are_those_of_transformers(tiny_model_dir, teacher_dir):
    teacher, _, named = on((), str(tiny_model_dir), teacher_dir)
    own = [t[np.arange(len(t)), s.tokens[s.prompt_length :]] for s, t in tables(teacher_dir)]
    assert np.abs(np.concatenate(own) - teacher).max() < 1e-5
    expected = [np.take_along_axis(t, s.named.astype(np.int64), 1) for s, t in tables(str(tiny_model_dir))]
    assert np.abs(np.concatenate(expected) - named).max() < 1e-5


@pytest.mark.parametrize("name", sampled(["data 2", "tensor 2", "pipeline 2", "context 2", "all at once"], []))
def test_on_every_layout_as_on_one_rank(tiny_model_dir, teacher_dir, name):
    layout = LAYOUTS[name]
    one, other = (on(tuple(chosen.items()), str(tiny_model_dir), teacher_dir) for chosen in ({}, layout))
    assert np.abs(one[0] - other[0]).max() < 1e-5
    assert np.abs(one[2] - other[2]).max() < 1e-5
    for key in ("loss/objective", "train/grad_norm"):
        assert other[1][key] == pytest.approx(one[1][key], rel=1e-5)
