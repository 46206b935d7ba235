"""A checkpoint of adapters: nothing of the model, and a trainer goes on from it as if it had not stopped."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.config import LoraConfig, OptimizerConfig, ParallelConfig, TrainerConfig
from tests.conftest import save_tiny_model
from tests.megatron_ext.checkpoint.test_training import EXPERTS, train
from tests.support.lora import stir
from tests.support.ranks import run_ranks

LORA = LoraConfig(rank=4, alpha=8.0, router="trained")
EXPERT = {"ranks": 2, "expert": 2}
ALL = {"ranks": 4, "tensor": 2, "sequence": True, "pipeline": 2, "expert": 2, "expert_tensor": 1}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), seed=0, num_experts=EXPERTS)


def trainer_of(config: ParallelConfig, model: str, lora: LoraConfig | None):
    from megatron_ext.trainer import Trainer

    optimizer = OptimizerConfig(lr=1e-3, warmup_steps=4)
    return Trainer(
        model,
        config,
        TrainerConfig(micro_batch_tokens=100),
        optimizer,
        replay=True,
        critic=OptimizerConfig(lr=1e-3),
        reference=True,
        lora=lora,
        load_weights=False,
    )


def saved(config: ParallelConfig, model: str, folder: str):
    import torch.distributed as dist

    it = trainer_of(config, model, LORA)
    stir(it)
    it.keep_reference()
    it.restart_optimizer(OptimizerConfig(lr=1e-3, warmup_steps=4))
    train(it, 2)
    if dist.get_rank() == 0:
        Path(folder).mkdir()
    dist.barrier()
    save = it.begin_save(Path(folder))
    after = train(it, 2)
    save.written(wait=True)
    dist.barrier()
    save.finish()
    return after


def resumed(config: ParallelConfig, model: str, folder: str, lora: LoraConfig | None):
    it = trainer_of(config, model, lora)
    try:
        it.resume(Path(folder))
    except RuntimeError as error:
        return str(error)
    return train(it, 2)


@functools.cache
def first_run(model: str, folder: str):
    return run_ranks(saved, ParallelConfig(**EXPERT), model, folder)


@pytest.fixture(scope="module")
def checkpoint(model_dir, tmp_path_factory):
    """(what training came to after it, its directory)."""
    folder = str(tmp_path_factory.mktemp("saved") / "checkpoint")
    return first_run(str(model_dir), folder), folder


def test_a_resumed_trainer_is_the_same_bit_for_bit(model_dir, checkpoint):
    straight, folder = checkpoint
    again = run_ranks(resumed, ParallelConfig(**EXPERT), str(model_dir), folder, LORA)
    for one, other in zip(straight, again, strict=True):
        assert one[0] == other[0]
        assert np.array_equal(one[1], other[1])
        assert one[1].min() > 0
        assert all(np.array_equal(one[2][name], other[2][name]) for name in one[2])
        for mine, theirs in zip(one[3], other[3], strict=True):
            assert all(np.array_equal(mine[i], theirs[i]) for i in mine)


@pytest.mark.proof
def test_another_layout_resumes_to_1e_5(model_dir, checkpoint):
    straight, folder = checkpoint
    other = run_ranks(resumed, ParallelConfig(**ALL), str(model_dir), folder, LORA)[0]
    one = straight[0]
    assert other[1] == pytest.approx(one[1], rel=1e-5)
    assert max(np.abs(one[2][name] - other[2][name]).max() for name in one[2]) < 1e-5


def test_it_holds_nothing_of_the_model_but_what_is_trained(model_dir, checkpoint):
    from megatron_ext.checkpoint.shards import stored_tensors

    _, folder = checkpoint
    names = set(stored_tensors(Path(folder)))
    weights = {n for n in names if not n.removeprefix("critic.").startswith("optimizer.")}
    known = ("adapters.", "decoder.layers.mlp.router.", "critic.", "reference.")
    assert all(n.startswith(known) for n in weights), weights
    own = {n.removeprefix("critic.").removeprefix("reference.") for n in weights}
    assert {n for n in own if not n.startswith("adapters.")} == {
        "decoder.layers.mlp.router.weight",
        "output_layer.weight",
    }
    assert json.loads((Path(folder) / "lora.json").read_text())["base"] == str(model_dir)


def test_adapters_of_another_rank_another_model_or_none_are_refused(model_dir, checkpoint, tmp_path):
    _, folder = checkpoint
    one = ParallelConfig()
    (said,) = run_ranks(resumed, one, str(model_dir), folder, LORA.model_copy(update={"rank": 8}))
    assert said == f"{folder} holds adapters of rank 4, and rank 8 is trained"
    (said,) = run_ranks(resumed, one, str(model_dir), folder, None)
    assert said == f"{folder} holds adapters; a whole model would be trained"
    other = save_tiny_model(tmp_path / "other", seed=1, num_experts=EXPERTS)
    (said,) = run_ranks(resumed, one, str(other), folder, LORA)
    assert said.startswith(f"{folder} holds adapters of the model that was {model_dir}, whose weights are others")
