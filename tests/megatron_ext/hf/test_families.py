"""Every family, on every layout: weights bit for bit, log-probs and routes of transformers, one update of one rank."""

import functools
from dataclasses import dataclass, replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_ext.batch.layout import Sample
from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.parts import merge_routes, merge_update
from tests.support.jobs import SAMPLES, joined, make_samples, weighted_likelihood
from tests.support.proofs import sampled
from tests.support.ranks import run_ranks
from tests.support.tiny_families import FAMILIES, LAYERS, VOCAB, save_family, transformers_says

DENSE = {"qwen3_moe with dense layers": [2]}
DENSE |= {name: [0] for name in ("deepseek_v3", "deepseek_v32", "moonlight", "glm4_moe", "glm4_moe_lite")}
LAYOUTS = {
    "one rank": {},
    "tensor 2": {"ranks": 2, "tensor": 2, "sequence": True},
    "pipeline 2": {"ranks": 2, "pipeline": 2},
    "expert 2": {"ranks": 2, "expert": 2},
    "pipeline 2, two chunks each": {"ranks": 2, "pipeline": 2, "virtual_pipeline": 2},
    "pipeline 2, one layer first": {"ranks": 2, "pipeline": 2, "first_stage_layers": 1},
    "tensor 2, expert tensor 1": {"ranks": 2, "tensor": 2, "sequence": True, "expert_tensor": 1},
    "tensor 2, pipeline 2, expert 2": {
        "ranks": 4, "tensor": 2, "sequence": True, "pipeline": 2, "expert": 2, "expert_tensor": 1,
    },
    "tensor 2, expert 2, expert tensor 2": {"ranks": 4, "tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2},
    "context 2, recomputed": {"ranks": 2, "context": 2},
    "padded rows": {},
}  # fmt: skip
SETTINGS = {"context 2, recomputed": {"recompute": "full"}, "padded rows": {"packing": False}}

every_family = pytest.mark.parametrize("family", FAMILIES)
SAMPLE = ("one rank", "pipeline 2, two chunks each", "tensor 2, pipeline 2, expert 2", "context 2, recomputed")
every_layout = pytest.mark.parametrize("layout", sampled(LAYOUTS, SAMPLE))


@dataclass(frozen=True)
class Answer:
    """All ranks' answer for one family.

    wrong:    tensors that did not come back bit for bit, on any rank.
    native:   log-probs under the routers' own choice, chosen: that choice.
    replayed: log-probs under transformers' routes, routing: how often the routers agreed.
    """

    wrong: list[str]
    native: np.ndarray
    chosen: list[np.ndarray]
    replayed: np.ndarray
    routing: np.ndarray
    update: dict[str, float]
    weights: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """family -> (directory, samples with transformers' routes, transformers' log-probs)."""
    out = {}
    for name in FAMILIES:
        folder = save_family(name, tmp_path_factory.mktemp("family"))
        samples = make_samples(routes=False, vocab_size=VOCAB)
        logprobs, routes = transformers_says(folder, samples)
        routed = [replace(s, routes=r) for s, r in zip(samples, routes, strict=True)]
        out[name] = str(folder), routed, logprobs
    return out


def on_a_rank(config: ParallelConfig, trainer: TrainerConfig, model: str, samples):
    import torch

    from megatron_ext.trainer import Trainer

    # with so large an eps Adam's first step is the gradient, times a number near the learning rate
    it = Trainer(model, config, trainer, OptimizerConfig(lr=1.0, eps=1.0), replay=True)
    original, wrong = load_file(f"{model}/model.safetensors"), []
    for name in it.policy.model.family.indexers(it.policy.model.hf):  # are not built, and stay where they are
        del original[name]
    for bucket in it.export():
        for name, tensor in bucket:
            if not np.array_equal(tensor.numpy(), original.pop(name, np.array(None))):
                wrong.append(name)
    wrong += original
    native = it.logprobs(samples, "record")
    replayed = it.logprobs(samples)
    update = it.update(samples, weighted_likelihood)
    weights = {name: tensor.numpy().copy() for bucket in it.export() for name, tensor in bucket}
    return wrong, native, replayed, update, weights if torch.distributed.get_rank() == 0 else {}


def all_on_a_rank(config: ParallelConfig, trainer: TrainerConfig, jobs):
    return [on_a_rank(config, trainer, model, samples) for model, samples in jobs]


@pytest.fixture(scope="module")
def answers(models):
    """layout -> family -> Answer: the ranks of a layout run all families, once."""

    @functools.cache
    def on_layout(layout: str) -> dict[str, Answer]:
        jobs = [(folder, samples) for folder, samples, _ in models.values()]
        trainer = TrainerConfig(micro_batch_tokens=100, **SETTINGS.get(layout, {}))
        ranks = run_ranks(all_on_a_rank, ParallelConfig(**LAYOUTS[layout]), trainer, jobs)
        out = {}
        for name, parts in zip(models, zip(*ranks, strict=True), strict=True):
            wrong, native, replayed, update, weights = zip(*parts, strict=True)
            logprobs, routing = joined(replayed, SAMPLES)
            out[name] = Answer(
                [n for w in wrong for n in w],
                joined(native, SAMPLES)[0],
                merge_routes(native, SAMPLES, LAYERS, np.dtype(np.uint8)),
                logprobs,
                routing,
                merge_update(update),
                weights[0],
            )
        return out

    return on_layout


@every_layout
@every_family
def test_every_rank_streams_every_tensor_bit_for_bit(answers, layout, family):
    assert answers(layout)[family].wrong == []


@every_layout
@every_family
def test_logprobs_equal_transformers(models, answers, layout, family):
    _, _, expected = models[family]
    assert np.abs(answers(layout)[family].native - expected).max() < 1e-5


@every_layout
@every_family
def test_routers_choose_the_experts_that_transformers_chooses_and_dense_layers_have_none(
    models, answers, layout, family
):
    tokens = sum(s.input_length for s in models[family][1])
    dense = DENSE.get(family, [])
    expected = [[0] * 4 if layer in dense else [tokens, tokens, 0, 0] for layer in range(LAYERS)]
    answer = answers(layout)[family]
    for chosen, sample in zip(answer.chosen, models[family][1], strict=True):
        assert np.array_equal(np.sort(chosen), np.sort(sample.routes))
    assert answer.routing.tolist() == expected
    assert np.abs(answer.replayed - answer.native).max() < 1e-5


@pytest.mark.parametrize("layout", sampled([name for name in LAYOUTS if name != "one rank"], SAMPLE[1:]))
@every_family
def test_an_update_equals_that_of_one_rank(answers, layout, family):
    one, this = answers("one rank")[family], answers(layout)[family]
    assert this.update["train/grad_norm"] == pytest.approx(one.update["train/grad_norm"], rel=1e-5)
    assert this.update["loss/objective"] == pytest.approx(one.update["loss/objective"], rel=1e-5)
    assert this.weights.keys() == one.weights.keys()
    for name, weight in one.weights.items():
        assert np.abs(this.weights[name] - weight).max() < 1e-6, name


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "deepseek_v32", "moonlight", "glm4_moe", "glm4_moe_lite", "minimax_m2"]
)
def test_an_update_leaves_the_routing_bias_and_moves_all_else(models, answers, family):
    before, after = load_file(f"{models[family][0]}/model.safetensors"), answers("one rank")[family].weights
    before = {name: weight for name, weight in before.items() if name in after}
    still = sorted(name for name, weight in before.items() if np.array_equal(after[name], weight))
    sparse = [layer for layer in range(LAYERS) if layer not in DENSE.get(family, [])]
    block = "block_sparse_moe" if family == "minimax_m2" else "mlp.gate"
    assert still == [f"model.layers.{layer}.{block}.e_score_correction_bias" for layer in sparse]
    assert all(np.abs(before[name]).min() > 0 for name in still)


def replayed_as_recorded(config: ParallelConfig, models: list[str], samples):
    """The native log-probs, those with the recorded routes of the same pass replayed, and those with wrong ones."""
    from megatron_ext.trainer import Trainer

    out = []
    for model in models:
        it = Trainer(model, config, TrainerConfig(micro_batch_tokens=100), OptimizerConfig(), replay=True)
        native = it.logprobs(samples, "record")
        rows = merge_routes([native], SAMPLES, LAYERS, np.dtype(np.uint8))
        routed = [replace(s, routes=r) for s, r in zip(samples, rows, strict=True)]
        shifted = [replace(s, routes=np.roll(r, 1, 0)) for s, r in zip(samples, rows, strict=True)]
        out.append((native, it.logprobs(routed), it.logprobs(shifted)))
    return out


def test_replaying_native_routes_changes_no_bit_and_wrong_routes_change_much(models):
    samples = make_samples(routes=False, vocab_size=VOCAB)
    (answers,) = run_ranks(replayed_as_recorded, ParallelConfig(), [m[0] for m in models.values()], samples)
    for family, parts in zip(models, answers, strict=True):
        native, replayed, shifted = (joined([part], SAMPLES)[0] for part in parts)
        assert np.array_equal(native, replayed), family
        assert np.abs(native - shifted).max() > 1e-2, family


def of_lengths(config: ParallelConfig, models: list[str], samples):
    """Log-probs of each model, or why it has none."""
    from megatron_ext.trainer import Trainer

    out = []
    for model in models:
        it = Trainer(model, config, TrainerConfig(), OptimizerConfig(), replay=False)
        try:
            out.append(it.logprobs(samples))
        except ValueError as error:
            out.append(str(error))
    return out


def test_an_indexer_changes_nothing_up_to_as_many_tokens_as_it_chooses_and_more_are_refused(tmp_path):
    tokens = np.random.default_rng(3).integers(0, VOCAB, 41).astype(np.int32)
    samples, folders = [Sample(tokens, 4)], []
    for chosen in (40, 39):
        folders.append(str(save_family("deepseek_v32", tmp_path / str(chosen), index_topk=chosen)))
    (all_of_them, one_less), _ = zip(*(transformers_says(f, samples) for f in folders), strict=True)
    ((answer, refused),) = run_ranks(of_lengths, ParallelConfig(), folders, samples)
    assert np.abs(joined([answer], 1)[0] - all_of_them).max() < 1e-5
    assert np.abs(one_less - all_of_them)[:-1].max() < 1e-5
    assert np.abs(one_less - all_of_them)[-1] > 1e-4  # the last token's attention lacks one that it had
    assert refused == (
        "a sequence of 40 tokens is longer than index_topk=39, behind which the attention of deepseek_v32 is sparse, "
        "which the trainer does not compute; leave out what is longer"
    )


def reference_of_a_moved_policy(config: ParallelConfig, model: str, samples):
    import torch

    from megatron_ext.trainer import Trainer

    it = Trainer(model, config, TrainerConfig(), OptimizerConfig(), replay=False, reference=True)
    with torch.no_grad():
        for chunk in it.policy.chunks:
            for tensor in (*chunk.parameters(), *chunk.buffers()):
                tensor.mul_(0.5)
    before = it.reference_logprobs(samples)
    it.keep_reference()
    return it.logprobs(samples), before, it.reference_logprobs(samples)


def test_a_reference_copies_routing_biases_too(models):
    folder, samples, _ = models["deepseek_v3"]
    (parts,) = run_ranks(reference_of_a_moved_policy, ParallelConfig(), folder, samples)
    policy, before, after = (joined([part], SAMPLES)[0] for part in parts)
    assert np.array_equal(after, policy)
    assert np.abs(before - policy).max() > 1e-2
