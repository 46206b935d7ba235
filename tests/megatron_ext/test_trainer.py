"""The trainer on real Megatron-Core: equal to transformers on one rank, equal to one rank on every layout."""

import functools

import numpy as np
import pytest
import torch

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig, TrainerPrecision
from megatron_ext.parts import merge_tokens
from tests.support.jobs import SAMPLES, Outcome, make_samples, outcome, weighted_likelihood
from tests.support.proofs import sampled
from tests.support.ranks import run_ranks

TRAINER = TrainerConfig(micro_batch_tokens=100)
LAYOUTS = {
    "data 2": {"ranks": 2},
    "expert 2": {"ranks": 2, "expert": 2},
    "tensor 2": {"ranks": 2, "tensor": 2, "sequence": True},
    "pipeline 2": {"ranks": 2, "pipeline": 2},
    "pipeline 2, two chunks each": {"ranks": 2, "pipeline": 2, "virtual_pipeline": 2},
    "context 2": {"ranks": 2, "context": 2},
    "pipeline 2, expert 2": {"ranks": 4, "pipeline": 2, "expert": 2},
    "tensor 2, expert 2, expert tensor 1": {
        "ranks": 4, "tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 1, "context": 2,
    },
    "all at once": {"ranks": 8, "tensor": 2, "sequence": True, "pipeline": 2, "expert": 2, "context": 2},
}  # fmt: skip
SAMPLE = ("data 2", "pipeline 2, two chunks each", "tensor 2, expert 2, expert tensor 1")
"""Every kind of cut is in one of them; more of each other `test_replay_layouts.py` and `test_families.py` have."""


@functools.cache
def one_rank(model: str, replay: bool = True) -> Outcome:
    return outcome(ParallelConfig(), model, TRAINER, make_samples(routes=replay), replay)


def transformers_logprobs(model: str, samples) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    out = []
    for sample in samples:
        ids = torch.from_numpy(sample.tokens.astype(np.int64))
        with torch.no_grad():
            scores = torch.log_softmax(reference(ids[None]).logits[0].double(), -1)
        out.append(scores[:-1].gather(1, ids[1:, None])[sample.prompt_length - 1 :, 0].numpy())
    return np.concatenate(out)


def test_logprobs_of_packed_samples_equal_transformers(tiny_model_dir):
    expected = transformers_logprobs(tiny_model_dir, make_samples(routes=False))
    assert np.abs(one_rank(str(tiny_model_dir), replay=False).before - expected).max() < 1e-5


def test_logprobs_of_a_dense_model_equal_transformers(tiny_dense_model_dir):
    samples = make_samples(routes=False)
    dense = outcome(ParallelConfig(), tiny_dense_model_dir, TRAINER, samples, False)
    assert np.abs(dense.before - transformers_logprobs(tiny_dense_model_dir, samples)).max() < 1e-5
    for layout in (
        ParallelConfig(ranks=4, tensor=2, sequence=True, pipeline=2), ParallelConfig(ranks=2, tensor=2)
    ):  # fmt: skip
        split = outcome(layout, tiny_dense_model_dir, TRAINER, samples, False)
        assert split.update["train/grad_norm"] == pytest.approx(dense.update["train/grad_norm"], rel=1e-5)
        assert np.abs(split.after - dense.after).max() < 1e-4


@pytest.mark.parametrize("recompute", sampled(["none", "full"], ["none"]))
@pytest.mark.parametrize("name", sampled(LAYOUTS, SAMPLE))
def test_loss_gradient_norm_logprobs_and_weights_equal_one_rank(tiny_model_dir, name, recompute):
    reference = one_rank(str(tiny_model_dir))
    trainer = TRAINER.model_copy(update={"recompute": recompute})
    result = outcome(ParallelConfig(**LAYOUTS[name]), tiny_model_dir, trainer, make_samples(routes=True), True)
    assert np.abs(result.before - reference.before).max() < 1e-5
    assert result.update["loss/objective"] == pytest.approx(reference.update["loss/objective"], rel=1e-5)
    assert result.update["train/grad_norm"] == pytest.approx(reference.update["train/grad_norm"], rel=1e-5)
    assert np.array_equal(result.routing * reference.routing[:, :1], reference.routing * result.routing[:, :1])
    assert result.weights.keys() == reference.weights.keys()
    for name, weight in reference.weights.items():
        # one Adam step moves a weight by the learning rate, 1e-3, in the sign of its gradient
        assert np.abs(result.weights[name] - weight).max() < 1e-4, name


@pytest.mark.parametrize("tokens", [8, 60, 10_000])
def test_the_size_of_micro_batches_does_not_matter(tiny_model_dir, tokens):
    reference = one_rank(str(tiny_model_dir))
    trainer = TRAINER.model_copy(update={"micro_batch_tokens": tokens})
    result = outcome(ParallelConfig(ranks=2), tiny_model_dir, trainer, make_samples(routes=True), True)
    assert result.update["loss/objective"] == pytest.approx(reference.update["loss/objective"], rel=1e-5)
    assert result.update["train/grad_norm"] == pytest.approx(reference.update["train/grad_norm"], rel=1e-5)
    for name in ("length", "sequences", "longest"):
        assert result.update[name] == pytest.approx(reference.update[name])
    assert result.update["sequences"] == SAMPLES


def test_an_update_moves_logprobs_towards_the_loss(tiny_model_dir):
    result = one_rank(str(tiny_model_dir))
    weights = np.concatenate([np.full(s.response_length, s.row["weight"]) for s in make_samples(routes=True)])
    assert ((result.after - result.before) * weights).sum() > 0


def with_a_limit(config: ParallelConfig, model: str):
    from megatron_ext.trainer import Trainer

    it = Trainer(model, config, TRAINER, OptimizerConfig(lr=1e-2), replay=False)
    samples = make_samples(routes=False)
    before = [p.detach().clone() for p in it.policy.chunks[0].parameters()]
    spike = it.update(samples, weighted_likelihood, 1e-3)
    same = all(torch.equal(a, b) for a, b in zip(before, it.policy.chunks[0].parameters(), strict=True))
    made = it.update(samples, weighted_likelihood)
    moved = not all(torch.equal(a, b) for a, b in zip(before, it.policy.chunks[0].parameters(), strict=True))
    return spike.skipped, same, made.skipped, moved, spike.grad_norm


def test_a_gradient_above_the_limit_moves_no_weight_on_any_rank_and_the_next_update_does(tiny_model_dir):
    first, second = run_ranks(with_a_limit, ParallelConfig(ranks=2, expert=2), str(tiny_model_dir))
    assert first[:4] == second[:4] == (True, True, False, True)
    assert first[4] == second[4] > 1e-3


def with_a_nan(config: ParallelConfig, model: str):
    from megatron_ext.trainer import Trainer

    it = Trainer(model, config, TRAINER, OptimizerConfig(lr=1e-2), replay=False)
    samples = make_samples(routes=False)
    before = [p.detach().clone() for p in it.policy.chunks[0].parameters()]

    def of_one_sample(batch):
        loss, metrics = weighted_likelihood(batch)
        return loss * (torch.nan if 0 in batch.indices else 1.0), metrics

    broken = it.update(samples, of_one_sample)
    same = all(torch.equal(a, b) for a, b in zip(before, it.policy.chunks[0].parameters(), strict=True))
    return broken.skipped, broken.grad_norm, same, it.update(samples, weighted_likelihood).skipped


def test_a_gradient_that_is_not_finite_on_one_rank_moves_no_weight_on_any(tiny_model_dir):
    ranks = run_ranks(with_a_nan, ParallelConfig(ranks=2, expert=2), str(tiny_model_dir))
    assert ranks == [(True, 0.0, True, False)] * 2


def with_entropy_bonus(config: ParallelConfig, model: str, trainer: TrainerConfig):
    from megatron_ext.trainer import Trainer

    it = Trainer(model, config, trainer, OptimizerConfig(lr=1e-3), replay=True)
    samples = make_samples(routes=True)

    def bonus(batch):
        return -(batch.quantities[1] * batch.mask).sum() / SAMPLES, {}

    return it.update(samples, bonus), it.logprobs(samples)


def test_an_entropy_bonus_raises_the_entropy_alike_on_every_layout(tiny_model_dir):
    trainer, layouts = TRAINER.model_copy(update={"recompute": "full"}), [{}, LAYOUTS["context 2"], LAYOUTS["tensor 2"]]
    norms = []
    for layout in layouts:
        parts = run_ranks(with_entropy_bonus, ParallelConfig(**layout), str(tiny_model_dir), trainer)
        before = np.concatenate(merge_tokens([update.seen for update, _ in parts], SAMPLES)[1])
        after = np.concatenate(merge_tokens([seen for _, seen in parts], SAMPLES)[1])
        assert after.mean() > before.mean()
        norms.append(parts[0][0].grad_norm)
    assert norms[0] > 0
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-5)


def warmed_up(config: ParallelConfig, model: str):
    from megatron_ext.trainer import Trainer
    from tests.support.jobs import weighted_likelihood

    it = Trainer(model, config, TRAINER, OptimizerConfig(lr=0.3, warmup_steps=2), replay=False)
    samples = make_samples(routes=False)
    rates = [it.update(samples, weighted_likelihood).lr for _ in range(4)]
    it.restart_optimizer(OptimizerConfig(lr=0.1))
    return rates, it.update(samples, weighted_likelihood).lr


def test_the_learning_rate_warms_up_and_a_restart_forgets(tiny_model_dir):
    ((rates, after),) = run_ranks(warmed_up, ParallelConfig(), str(tiny_model_dir))
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.3])
    assert after == pytest.approx(0.1)


def test_the_learning_rate_rises_then_falls_linearly():
    config = OptimizerConfig(lr=1.0, warmup_steps=2, decay_steps=6, final_lr_fraction=0.2)
    assert [config.rate(step) for step in range(8)] == pytest.approx([1 / 3, 2 / 3, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2])
    with pytest.raises(ValueError, match="must exceed warmup_steps=2"):
        OptimizerConfig(warmup_steps=2, decay_steps=2)


def in_bfloat16(config: ParallelConfig, model: str):
    from megatron_ext.trainer import Trainer
    from tests.support.jobs import weighted_likelihood

    half = TrainerPrecision(weights="bfloat16")
    it = Trainer(model, config, TrainerConfig(), OptimizerConfig(lr=1e-3), replay=True, precision=half)
    samples = make_samples(routes=True)
    update = it.update(samples, weighted_likelihood)
    return it.logprobs(samples), update, {str(p.dtype) for c in it.policy.chunks for p in c.parameters()}


def test_bfloat16_trains_with_an_fp32_optimizer(tiny_model_dir):
    ((part, update, dtypes),) = run_ranks(in_bfloat16, ParallelConfig(), str(tiny_model_dir))
    assert dtypes == {"torch.bfloat16"}
    assert update.grad_norm > 0
    after = one_rank(str(tiny_model_dir)).after
    mine = np.concatenate([part.quantities[0][i] for i in range(SAMPLES)])
    assert np.abs(mine - after).mean() < 0.1


def optimizers_alive(config: ParallelConfig, model: str) -> list[bool]:
    """Whether the last optimizer was there still when each was made."""
    import weakref

    from megatron_ext import network
    from megatron_ext.trainer import Trainer

    made, alive = network.get_megatron_optimizer, []
    last: list = []

    def make(*args):
        alive.append(bool(last) and last[-1]() is not None)
        optimizer = made(*args)
        last.append(weakref.ref(optimizer))
        return optimizer

    network.get_megatron_optimizer = make
    try:
        trainer = Trainer(model, config, TRAINER, OptimizerConfig(), replay=True)
        trainer.update(make_samples(routes=True), weighted_likelihood)
        trainer.restart_optimizer(OptimizerConfig())
    finally:
        network.get_megatron_optimizer = made
    return alive


def test_there_is_never_a_second_optimizer(tiny_model_dir):
    assert run_ranks(optimizers_alive, ParallelConfig(), str(tiny_model_dir)) == [[False, False]]


def steps_around_a_turn(layout, model: str, dtype: str, turns: bool) -> tuple[list[dict], list[int]]:
    """Two steps of a policy and a critic beside a reference; in between, memory is given away and taken back."""
    from megatron_ext.trainer import Trainer

    optimizer = OptimizerConfig(lr=1e-3)
    trainer = Trainer(model, layout, TRAINER, optimizer, replay=False, reference=True, critic=optimizer,
                      precision=TrainerPrecision(weights=dtype))  # fmt: skip
    samples, seen, held = make_samples(routes=False), [], []

    def bytes_held():
        networks = [network for _, network in trainer._networks.items()]
        tensors = [t for n in networks for t in (*n.weight_tensors, *n.optimizer_tensors, *n.gradient_buffers)]
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())

    for _ in range(2):
        parts = [trainer.update(samples, weighted_likelihood), trainer.update_critic(samples, weighted_likelihood)]
        measured = [trainer.logprobs(samples), trainer.reference_logprobs(samples), trainer.values(samples)]
        seen.append([part.grad_norm for part in parts] + [part.quantities[0] for part in measured])
        for part in ("optimizer", "weights") if turns else ():
            held.append(bytes_held())
            trainer.release_memory(part)
            trainer.release_memory(part)
        for part in ("weights", "optimizer") if turns else ():
            held.append(bytes_held())
            trainer.resume_memory(part)
            trainer.resume_memory(part)
    return seen, held


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trainer_whose_memory_was_away_goes_on_as_if_it_had_not_been(tiny_model_dir, dtype):
    ((apart, _),) = run_ranks(steps_around_a_turn, ParallelConfig(), str(tiny_model_dir), dtype, False)
    ((turns, held),) = run_ranks(steps_around_a_turn, ParallelConfig(), str(tiny_model_dir), dtype, True)
    for one, other in zip(apart, turns, strict=True):
        assert one[:2] == other[:2]
        for a, b in zip(one[2:], other[2:], strict=True):
            assert a.keys() == b.keys()
            assert all(np.array_equal(a[i], b[i]) for i in a)
    whole, weights_left, nothing, weights_back = held[:4]
    assert nothing == 0
    assert 0 < weights_left == weights_back < whole
