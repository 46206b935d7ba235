"""What two places must agree on is defined in one of them. A second definition would go its own way in silence."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import get_args

import pytest

ROOT = Path(__file__).parent.parent
SINGLE = {
    "TILE": "megatron_ext/logprobs/sizes.py",
    "HEAD_TILE": None,
    "Bucket": "megatron_ext/hf/bucket.py",
    "CHECKSUMS": "megatron_ext/checkpoint/names.py",
    "HF_FOLDER": "megatron_ext/checkpoint/names.py",
    "add_metrics": "megatron_ext/parts.py",
    "merge_metrics": None,
    "write_companions": "megatron_ext/hf/companions.py",
    "copy_companions": None,
    "write_weights": "megatron_ext/hf/writer.py",
    "RankFileWriter": "megatron_ext/checkpoint/rank_file.py",
}
"""Name, with or without an underscore before it -> the file that defines it, or None: no file does."""
VALUES = {
    '"checksums.json"': "megatron_ext/checkpoint/names.py",
    "(dcp.FileSystemWriter)": "megatron_ext/checkpoint/rank_file.py",
    '"weight_map": dict': "megatron_ext/hf/writer.py",
    '"num_nextn_predict_layers",': "megatron_ext/hf/config_json.py",
    '"carried.safetensors"': "megatron_ext/hf/writer.py",
}


@functools.cache
def sources() -> dict[str, str]:
    files = [f for package in ("pipeline", "megatron_ext") for f in sorted((ROOT / package).rglob("*.py"))]
    return {str(f.relative_to(ROOT)): f.read_text() for f in files}


@functools.cache
def defined(source: str) -> set[str]:
    """Names that a module binds at its top level, imports aside."""
    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.TypeAlias):
            names.add(node.name.id)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize(("name", "place"), SINGLE.items())
def test_a_name_has_one_definition(name, place):
    found = [file for file, source in sources().items() if {name, f"_{name}"} & defined(source)]
    assert found == ([] if place is None else [place])


@pytest.mark.parametrize(("text", "place"), VALUES.items())
def test_a_value_is_written_in_one_place(text, place):
    assert [file for file, source in sources().items() if text in source] == [place]


def test_every_kind_of_gpu_that_a_configuration_may_name_has_figures_and_no_other_has():
    from pipeline.config.run import GPUName
    from pipeline.plan.hardware import GPUS

    assert sorted(GPUS) == sorted(get_args(GPUName))
    assert all(gpu.name == name for name, gpu in GPUS.items())


def test_a_plan_counts_the_tile_that_the_head_computes_with(monkeypatch):
    from megatron_ext.config import ParallelConfig, TrainerPrecision
    from megatron_ext.hf.description import describe
    from megatron_ext.logprobs import linear, sizes
    from pipeline.config.model import TinyModelConfig
    from pipeline.plan import memory

    assert linear.TILE is sizes.TILE
    model = describe(TinyModelConfig().hf_config() | {"vocab_size": 10**6})
    before = memory.head(model, ParallelConfig(), TrainerPrecision(), 10**6)
    monkeypatch.setitem(sizes.TILE, "cuda", sizes.TILE["cuda"] + 1000)
    assert memory.head(model, ParallelConfig(), TrainerPrecision(), 10**6) - before == 8 * 1000


def test_the_checksums_that_a_trainer_writes_are_those_that_a_run_looks_for():
    from megatron_ext.checkpoint import names
    from pipeline.checkpoints import store

    assert store.CHECKSUMS is names.CHECKSUMS
