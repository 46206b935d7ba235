"""A number that is not finite is found where it is made: in one expert of one layer, on the rank that holds it."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from pipeline.diagnose.not_finite import where_not_finite
from tests.support.jobs import make_samples
from tests.support.ranks import run_ranks

LAYER, EXPERT = 1, 5


def _found(config, model):
    from megatron_ext.trainer import Trainer

    it = Trainer(model, config, TrainerConfig(micro_batch_tokens=100), OptimizerConfig(), replay=True)
    return it.not_finite(make_samples(routes=True))


@pytest.fixture
def broken(tiny_model_dir, tmp_path):
    """The tiny model with a NaN in one expert."""
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model_dir, folder)
    changed = 0
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if f"layers.{LAYER}.mlp.experts.{EXPERT}.gate_proj" in name:
                tensor.view(-1)[7] = torch.nan
                changed += 1
        save_file(tensors, file, {"format": "pt"})
    assert changed == 1
    return folder


@pytest.mark.parametrize("layout", [{"ranks": 2, "expert": 2}, {"ranks": 2, "pipeline": 2}])
def test_a_nan_in_one_expert_is_named(broken, layout):
    found = run_ranks(_found, ParallelConfig(**layout), str(broken))
    rank = 1 if "expert" in layout else [bool(own) and own[0].kind == "weight" for own in found].index(True)
    words = where_not_finite(found)
    assert words.startswith(
        f"The first output that is not finite is made by trainer rank {rank}, layer {LAYER}, expert {EXPERT}: "
        f"decoder.layers.{LAYER}.mlp.experts.linear_fc1 ("
    )
    assert f"Weights that are not finite: decoder.layers.{LAYER}.mlp.experts.linear_fc1.weight{EXPERT} (1 of" in words


def _beside(config, model, broken):
    """Runs on a rank: what it has that is not finite, its critic and a teacher among it."""
    from megatron_ext.trainer import Trainer

    it = Trainer(
        model, config, TrainerConfig(), OptimizerConfig(), replay=False, critic=OptimizerConfig(), teacher=broken
    )
    head = dict(it.critic.chunks[-1].named_parameters())["output_layer.weight"]
    with torch.no_grad():
        head.view(-1)[0] = torch.inf
    return [str(found) for found in it.weights_not_finite()]


def test_models_beside_the_policy_are_named_as_such(tiny_model_dir, broken):
    (found,) = run_ranks(_beside, ParallelConfig(), str(tiny_model_dir), str(broken))
    assert len(found) == 2
    assert found[0].startswith("output_layer.weight of the critic (1 of ")
    expert = f"decoder.layers.{LAYER}.mlp.experts.linear_fc1.weight{EXPERT} of the teacher (1 of "
    assert found[1].startswith(expert)


def test_a_sound_model_has_none(tiny_model_dir):
    assert run_ranks(_found, ParallelConfig(), str(tiny_model_dir)) == [[]]
