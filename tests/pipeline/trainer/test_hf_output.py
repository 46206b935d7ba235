"""The weights of a Hugging Face directory, written from a stream."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from pipeline.trainer.hf_output import has_weights, write_weights

TENSORS = {f"layer.{i}": torch.full((10, 10), float(i)) for i in range(5)}  # 400 bytes each


def stream():
    names = list(TENSORS)
    for start in (0, 2, 4):
        yield [(name, TENSORS[name]) for name in names[start : start + 2]]


def test_a_model_that_fits_is_one_file(tmp_path):
    write_weights(stream(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_file(tmp_path / "model.safetensors").items())
    assert has_weights(tmp_path)


def test_a_larger_one_is_numbered_shards_with_an_index_of_every_tensor(tmp_path):
    write_weights(stream(), tmp_path, shard_bytes=900)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    assert sorted(file.name for file in tmp_path.iterdir()) == [*shards, "model.safetensors.index.json"]
    assert index["metadata"]["total_size"] == 2000
    assert index["weight_map"].keys() == TENSORS.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], TENSORS[name])
    assert has_weights(tmp_path)


@pytest.mark.parametrize("shard_bytes", [900, 10_000])
def test_a_stream_that_breaks_leaves_nothing_that_counts(tmp_path, shard_bytes):
    def broken():
        yield from list(stream())[:2]
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        write_weights(broken(), tmp_path, shard_bytes)
    assert not has_weights(tmp_path)
    assert not [file for file in tmp_path.iterdir() if not file.name.startswith(".")]
