"""A checkpoint of adapters becomes a merged model, and a directory that PEFT reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.config import LoraConfig, OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.hf.companions import write_companions
from tests.conftest import save_tiny_model
from tests.support.convert_cli import convert
from tests.support.lora import stir
from tests.support.ranks import run_ranks

EXPERTS = 4
PEFT = Path(".venv/peft").resolve()
LORA = LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "o_proj", "experts"))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), seed=0, num_experts=EXPERTS)


def saved(config: ParallelConfig, model: str, folder: str):
    """The merged stream of adapters that are saved, and in peft/ beside the checkpoint what a run writes."""
    import torch.distributed as dist

    from megatron_ext.lora.peft import write_peft
    from megatron_ext.lora.whole import whole_adapters
    from megatron_ext.trainer import Trainer

    it = Trainer(model, config, TrainerConfig(), OptimizerConfig(), replay=False, lora=LORA)
    stir(it)
    sent = {name: t.numpy().copy() for bucket in it.export() for name, t in bucket}
    whole = whole_adapters(it.policy.chunks)
    if dist.get_rank() == 0:
        Path(folder).mkdir()
        write_companions(Path(model), Path(folder) / "hf", "float32")
        peft = Path(folder).parent / "peft"
        peft.mkdir()
        write_peft(peft, it.policy.model, LORA, model, whole.__getitem__)
    dist.barrier()
    save = it.begin_save(Path(folder))
    save.written(wait=True)
    dist.barrier()
    save.finish()
    return sent


@pytest.fixture(scope="module")
def checkpoint(model_dir, tmp_path_factory):
    """(merged tensors, directory)."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    layout = ParallelConfig(ranks=4, tensor=2, sequence=True, pipeline=2, expert=2, expert_tensor=1)
    return run_ranks(saved, layout, str(model_dir), str(folder))[0], folder


def test_the_merged_model_is_what_the_trainer_sent(checkpoint, tmp_path):
    from safetensors.numpy import load_file

    sent, folder = checkpoint
    (done,) = convert(["to-hf", folder, tmp_path / "hf"])
    assert done.code == 0, done.text
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert written.keys() == sent.keys()
    for name, tensor in sent.items():
        assert np.abs(written[name] - tensor).max() <= 2e-7 * max(1, np.abs(tensor).max()), name


def test_the_directory_for_peft_is_the_one_that_a_run_writes(checkpoint, model_dir, tmp_path):
    from safetensors.numpy import load_file

    sent, folder = checkpoint
    (done,) = convert(["to-peft", folder, tmp_path / "peft"])
    assert done.code == 0, done.text
    mine, runs = tmp_path / "peft", folder.parent / "peft"
    assert json.loads((mine / "adapter_config.json").read_text()) == json.loads(
        (runs / "adapter_config.json").read_text()
    )
    found, theirs = (load_file(place / "adapter_model.safetensors") for place in (mine, runs))
    assert found.keys() == theirs.keys()
    assert all(np.array_equal(found[name], theirs[name]) for name in found)
    assert len(found) == 2 * 4 * (3 + 3 * EXPERTS)
    base = load_file(model_dir / "model.safetensors")
    for name, a in found.items():
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = found[name.replace("lora_A", "lora_B")]
            apart = np.abs(base[f"{module}.weight"] + 2.0 * b @ a - sent[f"{module}.weight"]).max()
            assert apart <= 1e-6, name
    settings = json.loads((mine / "adapter_config.json").read_text())
    assert settings["r"], settings["lora_alpha"] == (4, 8.0)
    assert settings["target_modules"] == ["down_proj", "gate_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.proof
def test_peft_loads_what_a_run_writes_and_gives_the_merged_models_logits(checkpoint, model_dir, tmp_path):
    """On transformers 5, which holds the experts of a layer in two tensors."""
    assert (PEFT / "peft").is_dir(), f"`make proofs` puts PEFT into {PEFT}"
    _, folder = checkpoint
    (done,) = convert(["to-hf", folder, tmp_path / "hf"])
    assert done.code == 0, done.text
    command = [sys.executable, "-m", "tests.support.peft_logits", model_dir, folder.parent / "peft", tmp_path / "hf"]
    path = os.pathsep.join([str(PEFT), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["moved"] > 0.1
    assert max(found["beside"], found["inside"]) < 1e-4
    assert found["loaded"] > 0


def test_a_base_that_is_gone_or_another_is_said_in_one_sentence(checkpoint, tmp_path):
    _, folder = checkpoint
    other = save_tiny_model(tmp_path / "other", seed=1, num_experts=EXPERTS)
    gone, out = tmp_path / "nowhere", tmp_path / "out"
    wrong = {
        gone: f"{folder} holds adapters, and their model is not in {gone}; name it with --base",
        other: f"{folder} holds adapters of other weights than those of {other}; name theirs with --base",
    }
    calls = [(direction, base) for direction in ("to-hf", "to-peft") for base in wrong]
    answers = convert(*([direction, folder, out, "--base", base] for direction, base in calls))
    for (_, base), answer in zip(calls, answers, strict=True):
        assert answer.code != 0
        assert answer.text.strip().endswith(wrong[base])
        assert not out.exists()
