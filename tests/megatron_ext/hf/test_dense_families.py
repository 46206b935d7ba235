"""Models without experts, on their layouts: weights bit for bit, log-probs of transformers, one update."""

import functools

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.hf.description import UnsupportedModel, describe
from megatron_ext.parts import merge_update
from tests.support.jobs import SAMPLES, joined, make_samples, weighted_likelihood
from tests.support.proofs import sampled
from tests.support.ranks import run_ranks
from tests.support.tiny_families import DENSE_FAMILIES, VOCAB, save_family, tiny_config, transformers_says

LAYOUTS = {
    "one rank": {},
    "tensor 2": {"ranks": 2, "tensor": 2},
    "tensor 2, sequence": {"ranks": 2, "tensor": 2, "sequence": True},
    "pipeline 2": {"ranks": 2, "pipeline": 2},
    "pipeline 2, two chunks each": {"ranks": 2, "pipeline": 2, "virtual_pipeline": 2},
    "tensor 2, pipeline 2": {"ranks": 4, "tensor": 2, "sequence": True, "pipeline": 2},
    "data 2, context 2, recomputed": {"ranks": 4, "context": 2},
    "padded rows": {},
}
SETTINGS = {"data 2, context 2, recomputed": {"recompute": "full"}, "padded rows": {"packing": False}}
SAMPLE = ("one rank", "tensor 2", "pipeline 2", "data 2, context 2, recomputed")
every_layout = pytest.mark.parametrize("layout", sampled(LAYOUTS, SAMPLE))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """family -> (directory, what transformers computes with it)."""
    samples = make_samples(routes=False, vocab_size=VOCAB)
    folders = {name: save_family(name, tmp_path_factory.mktemp("dense")) for name in DENSE_FAMILIES}
    return {name: (str(folder), transformers_says(folder, samples)[0]) for name, folder in folders.items()}


def on_a_rank(config: ParallelConfig, trainer: TrainerConfig, folders: list[str], samples):
    """Of each model: tensors that did not come back bit for bit, log-probs, an update, the weights after it."""
    import torch

    from megatron_ext.trainer import Trainer

    out = []
    for folder in folders:
        # with so large an eps Adam's first step is the gradient, times a number near the learning rate
        it = Trainer(folder, config, trainer, OptimizerConfig(lr=1.0, eps=1.0), replay=True)
        original, wrong = load_file(f"{folder}/model.safetensors"), []
        for bucket in it.export():
            for name, tensor in bucket:
                if not np.array_equal(tensor.numpy(), original.pop(name, np.array(None))):
                    wrong.append(name)
        native, update = it.logprobs(samples, "native"), it.update(samples, weighted_likelihood)
        weights = {name: tensor.numpy().copy() for bucket in it.export() for name, tensor in bucket}
        out.append(([*wrong, *original], native, update, weights if torch.distributed.get_rank() == 0 else {}))
    return out


@pytest.fixture(scope="module")
def answers(models):
    """layout -> family -> answers of all ranks, as four tuples; the ranks of a layout run all families, once."""

    @functools.cache
    def on_layout(layout: str):
        trainer = TrainerConfig(micro_batch_tokens=100, **SETTINGS.get(layout, {}))
        samples = make_samples(routes=False, vocab_size=VOCAB)
        folders = [folder for folder, _ in models.values()]
        ranks = run_ranks(on_a_rank, ParallelConfig(**LAYOUTS[layout]), trainer, folders, samples)
        return {
            name: tuple(zip(*parts, strict=True)) for name, parts in zip(models, zip(*ranks, strict=True), strict=True)
        }

    return on_layout


@every_layout
def test_every_rank_streams_every_tensor_bit_for_bit(answers, layout):
    assert {name: [n for rank in answer[0] for n in rank] for name, answer in answers(layout).items()} == {
        name: [] for name in DENSE_FAMILIES
    }


@every_layout
def test_logprobs_equal_transformers(models, answers, layout):
    for name, (_, expected) in models.items():
        ours, routing = joined(answers(layout)[name][1], SAMPLES)
        assert np.abs(ours - expected).max() < 1e-5, name
        assert not routing.any(), name


@pytest.mark.parametrize("layout", sampled([name for name in LAYOUTS if name != "one rank"], SAMPLE[1:]))
def test_an_update_equals_that_of_one_rank(answers, layout):
    for name in DENSE_FAMILIES:
        one, this = answers("one rank")[name], answers(layout)[name]
        first, second = merge_update(one[2]), merge_update(this[2])
        assert second["train/grad_norm"] == pytest.approx(first["train/grad_norm"], rel=1e-5), name
        assert this[3][0].keys() == one[3][0].keys()
        for tensor, weight in one[3][0].items():
            assert np.abs(this[3][0][tensor] - weight).max() < 1e-6, (name, tensor)


def test_a_stretched_rotary_embedding_is_not_the_one_that_megatron_core_has_by_default(models, tmp_path):
    """What holds of llama3 above would hold of Megatron-Core's own numbers too, if these did not count."""
    own = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    folder = save_family("llama", tmp_path, rope_parameters=tiny_config("llama")["rope_parameters"] | own)
    theirs, _ = transformers_says(folder, make_samples(routes=False, vocab_size=VOCAB))
    assert np.abs(theirs - models["llama"][1]).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, "attention_bias=true; with mlp_bias=true"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
            "config.json: rope_type llama3 lacks low_freq_factor, high_freq_factor, original_max_position_embeddings",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=true"),
        ("qwen2", {"rope_parameters": tiny_config("llama")["rope_parameters"]}, "rope_type 'llama3'"),
    ],
)
def test_a_dense_model_that_is_not_built_here_is_refused(name, change, message):
    with pytest.raises(UnsupportedModel, match=message):
        describe(tiny_config(name) | change)


def test_expert_parallelism_of_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match=r"the model has no experts; set parallel\.expert=1"):
        ParallelConfig(ranks=2, expert=2).check_model(describe(tiny_config("llama")))
