"""Adapters under every layout: the same adapters, merged tensors, loss, gradients and step as on one rank."""

import functools

import numpy as np
import pytest

from megatron_ext.config import LoraConfig, ParallelConfig, TrainerConfig
from tests.megatron_ext.test_trainer import LAYOUTS
from tests.support.jobs import make_samples
from tests.support.lora import Learned, learn
from tests.support.proofs import sampled

TRAINER = TrainerConfig(micro_batch_tokens=100)
LORA = LoraConfig(rank=4, alpha=8.0)
SAMPLE = ("pipeline 2, two chunks each", "tensor 2, expert 2, expert tensor 1")


@functools.cache
def one_rank(model: str) -> Learned:
    return learn(ParallelConfig(), model, LORA, TRAINER, make_samples(routes=True), replay=True)


def close(a, b) -> None:
    assert a.keys() == b.keys()
    for name, values in b.items():
        assert np.abs(a[name] - values).max() <= 1e-6 + 1e-5 * np.abs(values).max(), name


@pytest.mark.parametrize("layout", sampled(LAYOUTS, SAMPLE))
def test_loss_gradients_and_merged_tensors_equal_one_rank(tiny_model_dir, layout):
    reference = one_rank(str(tiny_model_dir))
    trainer = TRAINER.model_copy(update={"recompute": "full"})
    result = learn(
        ParallelConfig(**LAYOUTS[layout]), tiny_model_dir, LORA, trainer, make_samples(routes=True), replay=True
    )
    for name, values in reference.adapters.items():
        assert np.array_equal(result.adapters[name], values), name
    close(result.sent, reference.sent)
    assert np.abs(result.logprobs - reference.logprobs).max() < 1e-5
    assert result.loss == pytest.approx(reference.loss, rel=1e-5)
    close(result.gradients, reference.gradients)
    assert result.norm == pytest.approx(reference.norm, rel=1e-5)
    assert np.abs(result.after - reference.after).max() < 1e-4
