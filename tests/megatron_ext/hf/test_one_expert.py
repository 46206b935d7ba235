"""One expert a token, and models without a sparse layer: the log-probs of transformers, on one rank and on several."""

import numpy as np
import pytest

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.hf.description import read_description
from megatron_ext.parts import merge_update
from tests.support.jobs import SAMPLES, joined, make_samples, weighted_likelihood
from tests.support.ranks import run_ranks
from tests.support.tiny_families import VOCAB, save_family, transformers_says

ONE = {"num_experts_per_tok": 1}
ALL_DENSE = [0, 1, 2, 3]
CASES = {
    "qwen3_moe, normalised": ("qwen3_moe with dense layers", ONE),
    "qwen3_moe, not normalised": ("qwen3_moe with dense layers", ONE | {"norm_topk_prob": False}),
    "qwen2_moe": ("qwen2_moe", ONE | {"norm_topk_prob": True}),
    "mixtral": ("mixtral", ONE),
    "deepseek_v3, normalised": ("moonlight", ONE | {"norm_topk_prob": True}),
    "deepseek_v3, not normalised": ("moonlight", ONE | {"norm_topk_prob": False}),
    "glm4_moe": ("glm4_moe", ONE),
    "gpt_oss": ("gpt_oss", ONE),
    "qwen3_moe, all dense": ("qwen3_moe with dense layers", {"mlp_only_layers": ALL_DENSE}),
    "qwen3_moe, no layer of a step": ("qwen3_moe with dense layers", {"decoder_sparse_step": 5}),
    "qwen2_moe, all dense": ("qwen2_moe", {"mlp_only_layers": ALL_DENSE}),
    "deepseek_v3, all dense": ("deepseek_v3", {"first_k_dense_replace": 4}),
    "glm4_moe, more dense layers than layers": ("glm4_moe", {"first_k_dense_replace": 9}),
}
SPLIT = ("qwen3_moe, not normalised", "gpt_oss", "deepseek_v3, all dense")
"""Of the cases those that `make test` cuts up: what differs between the others, one rank has too."""
LAYOUTS = {
    "one rank": {},
    "tensor 2, pipeline 2": {"ranks": 4, "tensor": 2, "sequence": True, "pipeline": 2, "expert_tensor": 1},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """case -> (directory, what transformers computes with it)."""
    samples = make_samples(routes=False, vocab_size=VOCAB)
    folders = {case: save_family(name, tmp_path_factory.mktemp("m"), **more) for case, (name, more) in CASES.items()}
    return {case: (str(folder), transformers_says(folder, samples)[0]) for case, folder in folders.items()}


def on_a_rank(config: ParallelConfig, folders: list[str], samples):
    """Of each model: its log-probs, and the norm of the gradient of an update."""
    from megatron_ext.trainer import Trainer

    out = []
    for folder in folders:
        it = Trainer(folder, config, TrainerConfig(micro_batch_tokens=100), OptimizerConfig(), replay=True)
        native = it.logprobs(samples, "record" if read_description(folder).num_experts else "native")
        out.append((native, it.update(samples, weighted_likelihood)))
    return out


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("one rank", CASES),
        ("tensor 2, pipeline 2", SPLIT),
        pytest.param("tensor 2, pipeline 2", CASES, marks=pytest.mark.proof),
    ],
    ids=["one rank", "split, sample", "split"],
)
def test_logprobs_equal_transformers_and_an_update_is_made(models, name, cases):
    samples = make_samples(routes=False, vocab_size=VOCAB)
    config = ParallelConfig(**LAYOUTS[name])
    ranks = run_ranks(on_a_rank, config, [models[case][0] for case in cases], samples)
    wrong: dict[str, float] = {}
    for case, parts in zip(cases, zip(*ranks, strict=True), strict=True):
        expected = models[case][1]
        ours = joined([native for native, _ in parts], SAMPLES)[0]
        if not np.abs(ours - expected).max() < 1e-5:
            wrong[case] = float(np.abs(ours - expected).max())
        assert 0 < merge_update([update for _, update in parts])["train/grad_norm"] < 1e3, case
    assert wrong == {}
