"""What is written is what Megatron-Core's own plan would have written, and planning grows no faster than the shards."""

from __future__ import annotations

import cProfile
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.batch.layout import Sample
from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig, TrainerPrecision
from pipeline.config.model import TinyModelConfig
from tests.support.ranks import run_ranks

SIZES = (4, 16, 64)


def network_of(config: ParallelConfig, experts: int, *, steps: int):
    """With Adam's moments after a step."""
    import torch

    from megatron_ext.hf.description import describe
    from megatron_ext.network import Network

    shape = TinyModelConfig(layers=2, hidden=16, heads=2, kv_heads=1, head_dim=8, experts=experts, moe_intermediate=16)
    torch.manual_seed(experts)
    network = Network(describe(shape.hf_config()), config, TrainerConfig(), TrainerPrecision(), replay=False)
    network.restart_optimizer(OptimizerConfig(lr=1e-3))
    samples = [Sample(np.arange(3, 20, dtype=np.int32), 1) for _ in range(config.ranks)]
    for _ in range(steps):
        network.step(samples, lambda _, q: (q[0].square().sum() / 100, {}), "native")
    return network


def both_ways(config: ParallelConfig, folder: str):
    """A checkpoint of ours, and one whose shards Megatron-Core described and planned, written by the same writer."""
    import torch.distributed as dist

    from megatron_ext.checkpoint import staged_save
    from megatron_ext.checkpoint.training import Networks, begin_save
    from megatron_ext.mcore import MCoreSavePlanner, mcore_to_pyt_state_dict

    networks = Networks(network_of(config, 8, steps=1), None, None)
    mine = staged_save.torch_state, staged_save.SavePlanner
    theirs = mcore_to_pyt_state_dict, lambda: MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    for name, (state, planner) in (("ours", mine), ("theirs", theirs)):
        staged_save.torch_state, staged_save.SavePlanner = state, planner
        if dist.get_rank() == 0:
            (Path(folder) / name).mkdir()
        dist.barrier()
        save = begin_save(Path(folder) / name, networks)
        save.written(wait=True)
        save.finish()


def test_what_is_written_is_what_megatron_cores_own_plan_would_have_written(tmp_path):
    from megatron_ext.checkpoint.plain import read_metadata

    run_ranks(both_ways, ParallelConfig(ranks=2, expert=2), str(tmp_path))
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    one, other = read_metadata(ours), read_metadata(theirs)
    assert one.state_dict_metadata == other.state_dict_metadata
    assert one.storage_data == other.storage_data
    assert len(one.storage_data) > 2 * 8 * 3 * 4  # layers, experts, shards of each, weights and what Adam keeps
    files = sorted(path.name for path in ours.glob("*.distcp"))
    assert files == ["__0_0.distcp", "__1_0.distcp"]
    for name in files:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def calls(config: ParallelConfig, folder: str):
    """Python's calls in a save and in a load, of models with more and more experts."""
    from megatron_ext.checkpoint.training import Networks, begin_save, load

    counts = []
    for turn, experts in enumerate((SIZES[0], *SIZES)):  # the first one imports
        networks, path = Networks(network_of(config, experts, steps=1), None, None), Path(folder) / str(turn)
        path.mkdir()

        def save(networks=networks, path=path):
            saved = begin_save(path, networks)
            saved.written(wait=True)
            saved.finish()

        counts.append([counted(save), counted(lambda networks=networks, path=path: load(path, networks))])
    return counts[1:]


def counted(run) -> int:
    profile = cProfile.Profile()
    profile.runcall(run)
    return sum(entry.callcount for entry in profile.getstats())


def test_saving_and_loading_make_as_many_more_calls_as_there_are_more_shards(tmp_path):
    """Four times as many more experts: pairs would be sixteen times as many more."""
    ((small, middle, large),) = run_ranks(calls, ParallelConfig(), str(tmp_path))
    for before, between, after in zip(small, middle, large, strict=True):
        assert between > before
        assert (after - between) / (between - before) == pytest.approx(4, rel=0.1)


def chunk(at, size):
    from torch import Size
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(Size(at), Size(size))


@pytest.mark.parametrize(
    ("chunks", "wrong"),
    [
        ([((0, 0, 0), (1, 2, 4)), ((0, 2, 0), (1, 2, 4)), ((1, 0, 0), (1, 4, 4))], None),
        ([((0, 0, 0), (1, 2, 4)), ((0, 1, 0), (1, 2, 4))], "overlap"),
        ([((0, 0, 0), (1, 2, 4)), ((1, 0, 0), (1, 4, 2)), ((1, 3, 1), (1, 1, 3))], "overlap"),
        ([((0, 0, 0), (2, 2, 4)), ((1, 0, 3), (1, 4, 1))], "overlap"),
        ([((1, 2, 0), (1, 3, 4))], "lies outside of"),
        ([((2, 0, 0), (1, 4, 4))], "lies outside of"),
    ],
)
def test_shards_that_overlap_or_lie_outside_are_named(chunks, wrong):
    import torch
    from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata

    from megatron_ext.checkpoint.planners import _misplaced

    held = TensorStorageMetadata(TensorProperties(), torch.Size((2, 4, 4)), [chunk(*each) for each in chunks])
    found = list(_misplaced(Metadata({"decoder.weight": held})))
    assert len(found) == (wrong is not None)
    assert all(text.startswith("decoder.weight: ") and wrong in text for text in found)
