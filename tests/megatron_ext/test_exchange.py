"""An exchange computes what a network built that way computes, on any layout, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig, TrainerPrecision
from megatron_ext.exchange import Exchange, exchangeable_rope_theta
from megatron_ext.hf.description import describe
from megatron_ext.parts import merge_tokens
from tests.support.jobs import SAMPLES, make_samples
from tests.support.ranks import run_ranks
from tests.support.tiny_families import tiny_config

EXCHANGES = {
    "temperature": Exchange(temperature=0.7),
    "head": Exchange(head="bf16"),
    "rope_theta": Exchange(rope_theta=1e3),
    "label_shift": Exchange(label_shift=-1),
}


def measure(layout, model, other, temperature, samples):
    """Runs on every rank: log-probs under each exchange, under none afterwards, and of a trainer built otherwise."""
    from megatron_ext.trainer import Trainer

    def build(path, **settings):
        trainer = TrainerConfig(micro_batch_tokens=100)
        return Trainer(path, layout, trainer, OptimizerConfig(), replay=False, **settings)

    trainer = build(model)
    found = {name: trainer.logprobs(samples, exchange=exchange) for name, exchange in EXCHANGES.items()}
    found["none"] = trainer.logprobs(samples)
    found["built at the temperature"] = build(model, precision=TrainerPrecision(temperature=temperature)).logprobs(
        samples
    )
    found["built with the base"] = build(other).logprobs(samples)
    return found


@pytest.fixture(scope="module")
def found(tiny_model_dir, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny_model_dir, other)
    hf = json.loads((other / "config.json").read_text())
    hf["rope_parameters"]["rope_theta"] = 1e3
    (other / "config.json").write_text(json.dumps(hf))
    args = (str(tiny_model_dir), str(other), 0.7, make_samples(routes=False))
    answers = run_ranks(measure, ParallelConfig(ranks=2, context=2), *args)
    return {name: np.concatenate(merge_tokens([a[name] for a in answers], SAMPLES)[0]) for name in answers[0]}


def test_an_exchange_equals_a_network_that_is_built_so(found):
    assert np.abs(found["temperature"] - found["built at the temperature"]).max() < 1e-6
    assert np.abs(found["rope_theta"] - found["built with the base"]).max() < 1e-6
    for name in EXCHANGES:
        assert np.abs(found[name] - found["none"]).max() > 1e-4, name


def test_a_shifted_label_is_the_token_before(found):
    """At temperature 1 log-probs of one place differ by their labels only."""
    samples = make_samples(routes=False)
    doubled = [s for s in samples if (s.tokens[s.prompt_length - 1 : -1] == s.tokens[s.prompt_length :]).any()]
    lengths = [s.response_length for s in samples]
    shifted, plain = (np.split(found[name], np.cumsum(lengths)[:-1]) for name in ("label_shift", "none"))
    for sample, a, b in zip(samples, shifted, plain, strict=True):
        same = sample.tokens[sample.prompt_length - 1 : -1] == sample.tokens[sample.prompt_length :]
        assert np.allclose(a[same], b[same], atol=1e-6)
        assert not np.any(np.isclose(a[~same], b[~same], atol=1e-7))
    assert len(doubled) < len(samples)


def test_only_plain_rotary_embeddings_can_be_exchanged():
    qwen3, latent, yarn = (tiny_config(name) for name in ("qwen3_moe with dense layers", "moonlight", "gpt_oss"))
    plain = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert exchangeable_rope_theta(describe(qwen3 | plain)) == 5e5
    assert exchangeable_rope_theta(describe(qwen3 | {"rope_parameters": None, "rope_theta": 1e6})) == 1e6
    assert exchangeable_rope_theta(describe(yarn)) is None
    assert exchangeable_rope_theta(describe(yarn | plain)) == 5e5
    assert exchangeable_rope_theta(describe(latent | plain)) is None
