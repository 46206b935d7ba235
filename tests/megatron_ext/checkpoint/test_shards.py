"""A checkpoint of the model: written in one layout, read in another, bit for bit."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_ext.config import ParallelConfig, TrainerConfig, TrainerPrecision
from tests.support.ranks import run_ranks
from tests.support.tiny_families import save_family

FAMILIES = ("deepseek_v3", "qwen2_moe", "mixtral")  # layers of two kinds; a gate of the shared expert; tied embeddings
LAYOUTS = [
    {},
    {"ranks": 2, "pipeline": 2, "virtual_pipeline": 2},
    {"ranks": 4, "tensor": 2, "sequence": True, "pipeline": 2, "expert": 2, "expert_tensor": 1},
    {"ranks": 4, "tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {name: str(save_family(name, tmp_path_factory.mktemp("family"))) for name in FAMILIES}


def built(config: ParallelConfig, model: str):
    from megatron_ext.hf.description import read_description
    from megatron_ext.model.build import build_model

    described = read_description(model)
    return build_model(described, config, TrainerConfig(), TrainerPrecision(), replay=False)[1], described


def saved(config: ParallelConfig, jobs):
    from pathlib import Path

    import torch.distributed as dist

    from megatron_ext.checkpoint.shards import save_model
    from megatron_ext.hf.load import load_hf

    for model, folder in jobs:
        chunks, described = built(config, model)
        load_hf(chunks, described, model)
        if dist.get_rank() == 0:
            Path(folder).mkdir()
        dist.barrier()
        save_model(Path(folder), chunks)


def loaded(config: ParallelConfig, jobs):
    """Names of tensors that differ from the model directory's, of each job."""
    from pathlib import Path

    from megatron_ext.checkpoint.shards import load_model
    from megatron_ext.hf.export import HFExporter

    wrong = []
    for model, folder in jobs:
        chunks, described = built(config, model)
        load_model(Path(folder), chunks)
        original = load_file(f"{model}/model.safetensors")
        for bucket in HFExporter(chunks, described):
            wrong += [n for n, t in bucket if not np.array_equal(t.numpy(), original.pop(n))]
        wrong += original
    return wrong


@pytest.mark.parametrize(
    "layout",
    [pytest.param(x, marks=() if number in (0, 2) else pytest.mark.proof) for number, x in enumerate(LAYOUTS)],
    ids=str,
)
def test_any_layout_reads_what_another_wrote(models, tmp_path, layout):
    jobs = [(model, str(tmp_path / name)) for name, model in models.items()]
    run_ranks(saved, ParallelConfig(**layout), jobs)
    for other in (LAYOUTS[0], LAYOUTS[2]):
        for wrong in run_ranks(loaded, ParallelConfig(**other), jobs):
            assert wrong == []


def refusals(config: ParallelConfig, model: str, other: str, folder: str):
    from pathlib import Path

    from megatron_ext.checkpoint.names import CheckpointError
    from megatron_ext.checkpoint.shards import load_model

    path = Path(folder)
    out = []
    for chunks in (built(config, other)[0], built(config, model)[0]):
        try:
            load_model(path, chunks)
        except CheckpointError as error:
            out.append(str(error))
        file = path / "__0_0.distcp"
        file.write_bytes(file.read_bytes()[:-1])
    return out


def test_another_models_and_a_damaged_checkpoint_are_refused_by_name(models, tmp_path):
    run_ranks(saved, ParallelConfig(), [(models["mixtral"], str(tmp_path / "it"))])
    ((another, damaged),) = run_ranks(
        refusals, ParallelConfig(), models["mixtral"], models["qwen2_moe"], str(tmp_path / "it")
    )
    assert "decoder.layers.mlp.shared_experts.gate_weight is not in it" in another
    assert "__0_0.distcp is cut off" in damaged
