"""safetensors reads what is written a tensor at a time, in one file or in several with an index."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.hf.writer import SafetensorsWriter, has_weights, write_weights


def tensors():
    return {
        "odd": torch.arange(15, dtype=torch.bfloat16).view(3, 5),
        "bias": torch.arange(3, dtype=torch.float32),
        "transposed": torch.arange(6, dtype=torch.float32).view(2, 3).T,
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
    }


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "backwards"])
def test_tensors_of_two_dtypes_come_back_in_any_order_of_writing(tmp_path, order):
    with open(tmp_path / "it", "wb") as stream:
        writer = SafetensorsWriter(stream, tensors())
        for name, tensor in list(tensors().items())[::order]:
            writer.write(name, tensor)
    back = load_file(tmp_path / "it")
    assert back.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


TENSORS = {f"layer.{i}": torch.full((10, 10), float(i)) for i in range(5)}  # 400 bytes each


def expected():
    return [(name, tensor.to("meta")) for name, tensor in TENSORS.items()]


def test_a_model_that_fits_is_one_file(tmp_path):
    done = []
    write_weights(expected(), iter(TENSORS.items()), tmp_path, done=done.append)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_file(tmp_path / "model.safetensors").items())
    assert has_weights(tmp_path)
    assert done == [400] * 5


def test_a_larger_one_is_numbered_shards_with_an_index_of_every_tensor(tmp_path):
    write_weights(expected(), iter(TENSORS.items()), tmp_path, shard_bytes=900)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    assert sorted(file.name for file in tmp_path.iterdir()) == [*shards, "model.safetensors.index.json"]
    assert index["metadata"]["total_size"] == 2000
    assert index["weight_map"].keys() == TENSORS.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], TENSORS[name])
    assert has_weights(tmp_path)


def test_a_tensor_that_is_larger_than_a_file_has_one_to_itself(tmp_path):
    write_weights(expected(), iter(TENSORS.items()), tmp_path, shard_bytes=300)
    assert len(list(tmp_path.glob("model-*-of-00005.safetensors"))) == 5


def broken():
    yield from list(TENSORS.items())[:4]
    raise RuntimeError("a rank died")


STREAMS = {
    "it breaks": (broken, RuntimeError, "a rank died"),
    "one is missing": (lambda: iter(list(TENSORS.items())[:4]), ValueError, r"no values of layer\.4"),
    "one too many": (lambda: iter([*TENSORS.items(), ("x", torch.zeros(1))]), ValueError, "x was not expected"),
    "one twice": (lambda: iter([*TENSORS.items()][:1] * 2), ValueError, r"layer\.0 .* was not expected now"),
    "another dtype": (
        lambda: ((name, t.bfloat16()) for name, t in TENSORS.items()), ValueError, "bfloat16 was not expected",
    ),
    "another shape": (lambda: ((name, t[:5]) for name, t in TENSORS.items()), ValueError, r"\[5, 10\] .* not expected"),
}  # fmt: skip


@pytest.mark.parametrize("shard_bytes", [900, 10_000])
@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_of_anything_else_leaves_nothing_that_counts(tmp_path, shard_bytes, kind):
    stream, error, message = STREAMS[kind]
    with pytest.raises(error, match=message):
        write_weights(expected(), stream(), tmp_path, shard_bytes=shard_bytes)
    assert not has_weights(tmp_path)
    assert not [file for file in tmp_path.iterdir() if not file.name.startswith(".")]
