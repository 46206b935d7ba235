"""A trainer saves, trains on while the files are written, and another goes on from what was saved."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.batch.layout import Sample
from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig, TrainerPrecision
from tests.conftest import save_tiny_model
from tests.pipeline.plan.test_against_models import configs, offload_without_a_gpu
from tests.support.jobs import SAMPLES, make_samples, weighted_likelihood
from tests.support.ranks import run_ranks

EXPERT = {"ranks": 2, "expert": 2}
ALL = {"ranks": 4, "tensor": 2, "sequence": True, "pipeline": 2, "expert": 2, "expert_tensor": 1}
CHUNKS = {"ranks": 2, "pipeline": 2, "virtual_pipeline": 2}
EXPERTS = 4  # two a rank; what a save costs is the number of tensors


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), seed=0, num_experts=EXPERTS)


def trainer_of(config: ParallelConfig, model: str, dtype: str, *, load_weights: bool):
    from megatron_ext.trainer import Trainer

    return Trainer(
        model,
        config,
        TrainerConfig(micro_batch_tokens=100),
        OptimizerConfig(lr=1e-3, warmup_steps=4),
        replay=True,
        precision=TrainerPrecision(weights=dtype),
        critic=OptimizerConfig(lr=1e-3),
        reference=True,
        load_weights=load_weights,
    )


def squared_error(batch):
    return ((batch.quantities[0] - 1) ** 2 * batch.mask).sum() / SAMPLES, {}


def train(it, steps: int):
    """Learning rates, gradient norms of policy and critic, the policy's weights; the critic's values and the
    reference's log-probs, sample -> [N], of the samples that this rank speaks for."""
    samples, rates, norms = make_samples(routes=True, experts=EXPERTS), [], []
    for _ in range(steps):
        parts = it.update(samples, weighted_likelihood), it.update_critic(samples, squared_error)
        rates.append(parts[0].lr)
        norms.append([p.grad_norm for p in parts])
    weights = {name: t.float().numpy().copy() for bucket in it.export() for name, t in bucket}
    seen = [part.quantities for part in (it.values(samples), it.reference_logprobs(samples))]
    return rates, np.array(norms), weights, [q[0] if q else {} for q in seen]


def saved(config: ParallelConfig, model: str, dtype: str, folder: str):
    """Three updates, a save, three more while it is written. What the last three came to, and two random numbers."""
    import torch
    import torch.distributed as dist

    it = trainer_of(config, model, dtype, load_weights=True)
    train(it, 3)
    torch.rand(7)
    if dist.get_rank() == 0:
        Path(folder).mkdir()
    dist.barrier()
    save = it.begin_save(Path(folder))
    after, drawn = train(it, 3), torch.rand(2).tolist()
    save.written(wait=True)
    dist.barrier()
    save.finish()
    return after, drawn


def resumed(config: ParallelConfig, model: str, dtype: str, folder: str):
    import torch

    it = trainer_of(config, model, dtype, load_weights=False)
    it.resume(Path(folder))
    return train(it, 3), torch.rand(2).tolist()


@functools.cache
def first_run(model: str, layout: tuple, dtype: str, folder: str):
    return run_ranks(saved, ParallelConfig(**dict(layout)), model, dtype, folder)


@pytest.mark.parametrize(("layout", "dtype"), [({}, "float32"), ({}, "bfloat16"), (EXPERT, "float32")], ids=str)
def test_a_resumed_trainer_is_the_same_bit_for_bit(model_dir, tmp_path_factory, layout, dtype):
    folder = str(tmp_path_factory.getbasetemp() / f"same_{len(layout)}_{dtype}")
    straight = first_run(str(model_dir), tuple(layout.items()), dtype, folder)
    again = run_ranks(resumed, ParallelConfig(**layout), str(model_dir), dtype, folder)
    for (one, drawn), (other, drawn_again) in zip(straight, again, strict=True):
        assert drawn == drawn_again
        assert one[0] == other[0] == pytest.approx([8e-4, 1e-3, 1e-3])
        assert np.array_equal(one[1], other[1])
        assert one[1].min() > 0
        assert one[2].keys() == other[2].keys()
        assert all(np.array_equal(one[2][name], other[2][name]) for name in one[2])
        for mine, theirs in zip(one[3], other[3], strict=True):
            assert mine.keys() == theirs.keys()
            assert all(np.array_equal(mine[i], theirs[i]) for i in mine)


@pytest.mark.parametrize(("written", "read"), [(EXPERT, {}), (EXPERT, ALL), ({}, CHUNKS)], ids=str)
def test_another_layout_resumes_to_1e_5(model_dir, tmp_path_factory, written, read):
    folder = str(tmp_path_factory.getbasetemp() / f"same_{len(written)}_float32")
    straight = first_run(str(model_dir), tuple(written.items()), "float32", folder)
    again = run_ranks(resumed, ParallelConfig(**read), str(model_dir), "float32", folder)
    one, other = straight[0][0], again[0][0]
    assert one[0] == other[0]
    assert other[1] == pytest.approx(one[1], rel=1e-5)
    assert max(np.abs(one[2][name] - other[2][name]).max() for name in one[2]) < 1e-5
    for which in (0, 1):
        mine, theirs = (
            {i: row for rank in ranks for i, row in rank[0][3][which].items()} for ranks in (straight, again)
        )
        assert set(mine) == set(theirs) == set(range(SAMPLES))
        assert max(np.abs(mine[i] - theirs[i]).max() for i in mine) < 1e-4


def damaged(config: ParallelConfig, model: str, folder: str):
    """What loading says of a byte that changed in a rank's file, in the description, and of a file that is gone."""
    from megatron_ext.checkpoint.names import CheckpointError

    it = trainer_of(config, model, "float32", load_weights=True)
    said = []
    for name in ("__0_0.distcp", ".metadata"):
        file = Path(folder) / name
        content = file.read_bytes()
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        try:
            it.resume(Path(folder))
        except CheckpointError as error:
            said.append(str(error))
        file.write_bytes(content)
    it.resume(Path(folder))
    (Path(folder) / "__0_0.distcp").unlink()
    try:
        it.resume(Path(folder))
    except CheckpointError as error:
        said.append(str(error))
    return said


def test_a_changed_byte_and_a_missing_file_are_named(model_dir, tmp_path, tmp_path_factory):
    folder = str(tmp_path / "it")
    saved_before = str(tmp_path_factory.getbasetemp() / "same_0_float32")
    first_run(str(model_dir), (), "float32", saved_before)
    shutil.copytree(saved_before, folder)
    ((data, description, missing),) = run_ranks(damaged, ParallelConfig(), str(model_dir), folder)
    assert "__0_0.distcp is damaged: its bytes are not those that were written" in data
    assert ".metadata is damaged" in description
    assert "__0_0.distcp is missing" in missing


def offloaded(config: ParallelConfig, hf, samples, folder: str):
    """Adam's steps that are found in a trainer and in the one that resumed, and three more gradient norms of each."""
    import torch

    from megatron_ext.checkpoint.training import Networks, _adam_steps, begin_save, load
    from megatron_ext.hf.description import describe
    from megatron_ext.network import Network

    offload_without_a_gpu()
    torch.manual_seed(0)

    def make():
        settings = TrainerConfig(offload_optimizer=True), TrainerPrecision(weights="bfloat16")
        network = Network(describe(hf), config, *settings, replay=False)
        network.restart_optimizer(OptimizerConfig(lr=0.1, eps=1.0, weight_decay=0.1))
        return network

    def steps(network):
        return [network.step(samples, lambda _, q: (q[0].square().sum() / 100, {}), "native")[0] for _ in range(3)]

    one = make()
    steps(one)
    save = begin_save(Path(folder), Networks(one, None, None))
    save.written(wait=True)
    save.finish()
    expected, other = steps(one), make()
    load(Path(folder), Networks(other, None, None))
    found = _adam_steps(other)
    return found, expected, steps(other), _adam_steps(one), _adam_steps(other)


def test_an_offloaded_optimizer_resumes_bit_for_bit(tmp_path):
    hf = configs()["qwen3_moe"]
    random = np.random.default_rng(0)
    samples = [Sample(random.integers(0, 500, 33).astype(np.int32), 1) for _ in range(4)]
    ((found, expected, norms, *after),) = run_ranks(offloaded, ParallelConfig(), hf, samples, str(tmp_path))
    assert found == 3
    assert norms == expected
    assert after == [6, 6]
