"""What the trainer computes with: heads, routers, rounded keys and values, and log-probs over kept tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_ext.batch.layout import Sample
from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig, TrainerPrecision
from megatron_ext.model.kv_cache import round_key_values
from megatron_ext.parts import merge_tokens, merge_update
from tests.support.jobs import make_samples, weighted_likelihood
from tests.support.ranks import run_ranks

VOCAB = 512
WIDER = {"bfloat16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def whole(parts, count):
    return [np.concatenate(q) for q in merge_tokens(parts, count)]


def under_each(config: ParallelConfig, model: str, samples: list[Sample], precisions: list[TrainerPrecision]):
    """Runs on a rank."""
    from megatron_ext.trainer import Trainer

    settings = TrainerConfig(), OptimizerConfig()
    return [Trainer(model, config, *settings, replay=True, precision=p).logprobs(samples) for p in precisions]


def logprobs_under(model, precisions, samples=None):
    samples = make_samples(routes=True) if samples is None else samples
    ((parts),) = run_ranks(under_each, ParallelConfig(), str(model), samples, precisions)
    return [whole([part], len(samples))[0] for part in parts]


def test_each_head_and_router_rounds_as_much_as_it_says_and_temperature_is_that_of_a_softmax(tiny_model_dir):
    half = TrainerPrecision(weights="bfloat16")
    assert half.head == "fp32_accumulate"
    assert TrainerPrecision().head == "fp32"
    changes = [{}, {"head": "fp32"}, {"head": "bf16"}, {"router": "bf16"}, {"temperature": 0.5}]
    accumulated, full, rounded, router, cold = logprobs_under(
        tiny_model_dir, [half.model_copy(update=change) for change in changes]
    )
    assert np.abs(full - accumulated).max() < 1e-5  # in the order of sums alone
    assert 1e-4 < np.abs(rounded - accumulated).mean() < 2e-2
    assert 1e-4 < np.abs(router - accumulated).mean() < 5e-2
    assert np.abs(cold - accumulated).mean() > 0.1


def rounded_attention(dtype):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attention(module, query, key, value, *args, **kwargs):
        key, value = (x.to(dtype).to(x.dtype) for x in (key, value))
        if dtype.itemsize == 1:
            query = query.to(dtype).to(query.dtype)
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    return attention


@torch.no_grad()
def transformers_logprobs(model, samples, kv_cache):
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(kv_cache, rounded_attention(WIDER[kv_cache]))
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation=kv_cache)
    out = []
    for sample in samples:
        ids = torch.from_numpy(sample.tokens.astype(np.int64))
        scores = torch.log_softmax(reference(ids[None]).logits[0].double(), -1)
        out.append(scores[:-1].gather(1, ids[1:, None])[sample.prompt_length - 1 :, 0].numpy())
    return np.concatenate(out)


def test_keys_and_values_are_rounded_where_the_cache_would_round_them_and_fp8_queries_too(tiny_model_dir):
    samples = make_samples(routes=False)
    caches = list(WIDER)
    plain, *rounded = logprobs_under(
        tiny_model_dir, [TrainerPrecision(), *(TrainerPrecision(kv_cache=c) for c in caches)], samples
    )
    for cache, mine in zip(caches, rounded, strict=True):
        error = np.abs(mine - transformers_logprobs(tiny_model_dir, samples, cache)).mean()
        assert error < 0.05 * np.abs(mine - plain).mean(), cache  # a few elements fall on the other side of a tie


def test_the_gradient_passes_through_a_rounded_cache():
    class Attention(torch.nn.Module):
        def forward(self, query, key, value, mask):
            return (query * key * value).sum()

    model = torch.nn.ModuleDict({"self_attention": torch.nn.ModuleDict({"core_attention": Attention()})})
    model.config = object()
    round_key_values([model], "fp8_e5m2")
    query, key, value = (torch.tensor([x], requires_grad=True) for x in (1.05, 1.1, 3.3))
    output = model["self_attention"]["core_attention"](query, key, value, None)
    output.backward()
    assert output.item() == 3.5
    assert (float(query.grad), float(key.grad), float(value.grad)) == (3.5, 3.5, 1.0)


def test_a_latent_cache_is_refused():
    model = torch.nn.Module()
    model.config = type("Config", (), {"multi_latent_attention": True})()
    with pytest.raises(ValueError, match=r"set precision\.kv_cache=same"):
        round_key_values([model], "bfloat16")


def with_kept(samples: list[Sample]) -> list[Sample]:
    """Each response token among 1 to 9 others, in any order; every third sample from the whole vocabulary."""
    rng, out = np.random.default_rng(5), []
    for i, sample in enumerate(samples):
        kept = np.full((sample.response_length, 10 if i % 2 else 7), -1, np.int32)
        for row, token in zip(kept, sample.tokens[sample.prompt_length :], strict=True):
            others = np.setdiff1d(rng.integers(0, VOCAB, rng.integers(1, kept.shape[1])), [token])
            row[: len(others) + 1] = rng.permutation(np.append(others, token))
        out.append(replace(sample, kept=None if i % 3 == 0 else kept))
    return out


def over_kept(config: ParallelConfig, model: str, packing: bool, samples: list[Sample]):
    """Runs on a rank."""
    from megatron_ext.trainer import Trainer

    settings = TrainerConfig(micro_batch_tokens=60, packing=packing), OptimizerConfig(lr=1e-3)
    it = Trainer(model, config, *settings, replay=False, precision=TrainerPrecision(temperature=0.7))
    return it.logprobs(samples), it.update(samples, weighted_likelihood)


@torch.no_grad()
def reference_over_kept(model, samples):
    from transformers import AutoModelForCausalLM

    reference, logprobs, entropies = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), [], []
    for sample in samples:
        ids = torch.from_numpy(sample.tokens.astype(np.int64))
        logits = reference(ids[None]).logits[0, sample.prompt_length - 1 : -1].double() / 0.7
        if sample.kept is not None:
            allowed = torch.zeros(len(logits), VOCAB + 1, dtype=torch.bool)
            allowed.scatter_(1, torch.from_numpy(np.where(sample.kept < 0, VOCAB, sample.kept)).long(), True)
            logits = logits.masked_fill(~allowed[:, :VOCAB], -torch.inf)
        scores = torch.log_softmax(logits, -1)
        logprobs.append(scores.gather(1, ids[sample.prompt_length :, None])[:, 0])
        entropies.append(torch.special.entr(scores.exp()).sum(1))
    return torch.cat(logprobs).numpy(), torch.cat(entropies).numpy()


def test_logprobs_entropies_and_updates_over_kept_tokens_are_exact_on_every_layout(tiny_model_dir):
    samples = with_kept(make_samples(routes=False))
    logprobs, entropies = reference_over_kept(tiny_model_dir, samples)
    norms = []
    for layout, packing in (
        ({}, True),
        ({"ranks": 4, "tensor": 2, "sequence": True, "context": 2}, True),
        ({"ranks": 2, "pipeline": 2}, False),
    ):
        parts = run_ranks(over_kept, ParallelConfig(**layout), str(tiny_model_dir), packing, samples)
        mine = whole([p[0] for p in parts], len(samples))
        assert np.abs(mine[0] - logprobs).max() < 1e-5
        assert np.abs(mine[1] - entropies).max() < 1e-5
        norms.append(merge_update([p[1] for p in parts])["train/grad_norm"])
    assert norms[1:] == pytest.approx(norms[:1] * 2, rel=1e-4)


def test_a_kept_set_of_another_response_is_refused():
    with pytest.raises(ValueError, match="kept has 3 rows for a response of 2 tokens"):
        Sample(np.arange(4, dtype=np.int32), 2, kept=np.zeros((3, 1), np.int32))
